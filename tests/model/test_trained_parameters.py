"""Parameters of the base that an adapter trains beside its sites: biases, scales, tokens."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.func import functional_call

import lorafx
from tests.support.oracle import factors_of, fingerprint, frozen, oracle, randomise


class Layer(nn.Module):
    """Straight-line code: a region, whose own parameter stands in its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.k, self.up = (
            nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        )
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.up(torch.tanh(self.q(y) * self.k(y)) * self.scale)


class Encoder(nn.Module):
    """Parameters of its own, and a loop, so that its code stays Python."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.first = nn.Embedding(11, 6), nn.Parameter(torch.randn(1, 6))
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head, self.logit_scale = nn.Linear(6, 11), nn.Parameter(torch.tensor(0.3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.first
        for layer in self.layers:
            x = layer(x)
        return self.head(x) * self.logit_scale.exp()


IDS = torch.tensor([[3, 10, 0, 3], [7, 1, 1, 2]])
TRAINABLE = {
    "*.bias": 9, "logit_scale": 1, "layers.*.scale": 2, "layers.*.norm.weight": 2, "first": 1,
    "layers.1.norm": 2, "up.bias": 2, "tokens.weight": 1}


def encoder() -> Encoder:
    return Encoder().double()


def trained(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """{name in the base: Parameter} of what an adapter trains beside A and B."""
    part = f"trained.{adapter}."
    named = lorafx.named_parameters(model, adapter)
    return {name.replace(part, ""): parameter for name, parameter in named if part in name}


def expected(base: nn.Module, model: nn.Module, adapter: str = "default") -> Tensor:
    """What a model computes, without lorafx: its tensors in the place of the base's."""
    twin = frozen(base)
    for name, parameter in trained(model, adapter).items():
        twin.get_parameter(name).data = parameter.detach().clone()
    sites = [
        site for site in lorafx.sites(base) if site.name in factors_of(model, {adapter: 1.0})
    ]
    return oracle(twin, sites, factors_of(model, {adapter: 1.0}), IDS)


@settings(max_examples=15)
@given(
    patterns=st.lists(st.sampled_from(sorted(TRAINABLE)), min_size=1, max_size=4, unique=True),
    targets=st.sampled_from(["linear", "layers.0.*", ["k", "head"]]),
    group=st.booleans(),
)
def test_identity_and_what_trains(patterns, targets, group):
    base = encoder()
    before = fingerprint(base)
    model = lorafx.inject(base, 2, targets=targets, trainable=patterns, group=group)
    assert torch.equal(model(IDS), frozen(base)(IDS))
    if len(patterns) == 1:
        assert len(trained(model)) == TRAINABLE[patterns[0]]
    assert list(model.state_dict().keys() & base.state_dict().keys()) and (
        base.state_dict().keys() <= model.state_dict().keys())
    randomise(model)
    output = model(IDS)
    torch.testing.assert_close(output, expected(base, model), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lorafx.merge(model)(IDS), output, rtol=1e-10, atol=1e-10)
    with lorafx.disabled(model):
        assert torch.equal(model(IDS), frozen(base)(IDS))
    assert torch.equal(lorafx.eject(model)(IDS), frozen(base)(IDS))
    output.square().sum().backward()
    assert fingerprint(base) == before


def test_gradients():
    base = encoder()
    model = randomise(lorafx.inject(base, 2, targets="linear", trainable=["*.bias", "*scale"]))
    own = trained(model)
    found = torch.autograd.grad(model(IDS).square().sum(), list(own.values()))
    merged = lorafx.merge(model).requires_grad_(False)
    values = {name: parameter.detach().requires_grad_() for name, parameter in own.items()}
    result = functional_call(merged, values, (IDS,)).square().sum()
    wanted = torch.autograd.grad(result, list(values.values()))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    assert all(gradient.abs().max() > 1e-3 for gradient in wanted)


def test_files_and_a_run_that_goes_on(tmp_path):
    base, path = encoder(), tmp_path / "a.safetensors"
    model = lorafx.inject(base, 2, targets="q", trainable=["*.bias", "logit_scale"])

    def train(model, optimizer):
        optimizer.zero_grad()
        model(IDS).square().sum().backward()
        optimizer.step()

    optimizer = torch.optim.AdamW(lorafx.parameters(model), lr=0.1)
    train(model, optimizer)
    lorafx.save(model, path, optimizer=optimizer, step=1)
    train(model, optimizer)
    again = lorafx.load(base, path)
    assert trained(again).keys() == trained(model).keys() >= {"layers.0.q.bias", "logit_scale"}
    optimizer = torch.optim.AdamW(lorafx.parameters(again), lr=0.1)
    assert lorafx.resume(again, optimizer, path) == 1
    train(again, optimizer)
    assert torch.equal(again(IDS), model(IDS))


def test_two_adapters():
    """They may train different parameters of one module together, and not the same one."""
    base = encoder()
    model = lorafx.inject(base, 2, targets="q", trainable="layers.0.norm.weight")
    lorafx.add(model, "b", targets="k", trainable=["layers.0.norm.bias", "layers.0.scale"])
    lorafx.add(model, "c", targets="k", trainable="norm")
    randomise(model)
    alone = expected(base, model, "b")
    lorafx.activate(model, "b")
    torch.testing.assert_close(model(IDS), alone, rtol=1e-10, atol=1e-10)
    lorafx.activate(model, ["default", "b"])
    both = model(IDS)
    torch.testing.assert_close(lorafx.merge(model)(IDS), both, rtol=1e-10, atol=1e-10)
    lorafx.compose(model, {"default": 1, "b": 1}, "both")
    lorafx.activate(model, "both")
    torch.testing.assert_close(model(IDS), both, rtol=1e-10, atol=1e-10)
    assert (alone - both).abs().max() > 1e-3
    with pytest.raises(
        lorafx.AdapterError, match="'b' and 'c' both train 'layers.0.norm.bias', and one"
    ):
        lorafx.activate(model, ["b", "c"])
    lorafx.remove(model, "both")
    assert torch.equal(lorafx.eject(model)(IDS), frozen(base)(IDS))


def test_a_module_that_gets_an_adapter_later():
    """It is read again, where its parameter is another by now."""
    base = encoder()
    model = randomise(lorafx.inject(base, 2, targets="head", trainable=["*.scale", "*.up.bias"]))
    output = model(IDS)
    lorafx.add(model, "b", targets=["up", "q"])
    lorafx.activate(model, ["default", "b"])
    torch.testing.assert_close(model(IDS), output, rtol=1e-10, atol=1e-10)
    randomise(model)
    assert (model(IDS) - output).abs().max() > 1e-3
    torch.testing.assert_close(lorafx.merge(model)(IDS), model(IDS), rtol=1e-10, atol=1e-10)


def test_a_typo():
    with pytest.raises(
        lorafx.NoSiteError,
        match=r"matches trainable='\*.bais'; this model has .*'head.bias'"
    ):
        lorafx.inject(encoder(), trainable="*.bais")


class Announced(Encoder):
    """A class that keeps a list of those that derive from it, as transformers' do something."""

    derived: list[type] = []

    def __init_subclass__(cls) -> None:
        Announced.derived.append(cls)


def test_a_class_that_hears_of_those_that_derive_from_it_hears_of_no_more() -> None:
    base = Announced().double()
    model = randomise(lorafx.inject(base, 2, targets="q", trainable=["logit_scale", "first"]))
    torch.testing.assert_close(model(IDS), expected(base, model), rtol=0, atol=1e-10)
    assert not Announced.derived and isinstance(model, Announced)
    assert type(lorafx.merge(model)) is type(lorafx.eject(model)) is Announced
    torch.testing.assert_close(lorafx.merge(model)(IDS), model(IDS), rtol=0, atol=1e-10)
