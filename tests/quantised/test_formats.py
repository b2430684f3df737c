"""Each way of packing W: identity, outputs and gradients, merging, copies, files."""

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorafx
from tests.support.quantised import FORMATS, HIDDEN, NO_PICKLE, WIDTH, network

RANK = 3


def fill(model: nn.Module, size: float = 0.05) -> nn.Module:
    """Draw A and B, as if they had been trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for factor in lorafx.parameters(model):
            factor.copy_(size * torch.randn(factor.shape, generator=generator))
    return model


def case(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A base, its injected model with drawn factors, and an input."""
    base = network(name)
    x = torch.randn(5, WIDTH, dtype=FORMATS[name].dtype)
    return base, fill(lorafx.inject(base, rank=RANK, targets="linear")), x


def far(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a share of the largest of b."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max())


def oracle(name: str, base: Any, factors: list[Tensor], x: Tensor) -> Tensor:
    """The output in float64: what the base's layers give, with the derivative of the dense W."""
    for number, (layer, A, B) in enumerate(zip((base[0], base[2]), factors[::2], factors[1::2])):
        W = FORMATS[name].dense(layer).double()
        with torch.no_grad():
            given = layer(x.to(FORMATS[name].dtype)).double()
            if FORMATS[name].exact:
                bias = layer(torch.zeros_like(x, dtype=FORMATS[name].dtype)).double()
                torch.testing.assert_close(given, x @ W.t() + bias, rtol=1e-5, atol=1e-5)
        y = x @ W.t()
        y = (given - y).detach() + y + (x @ A.t()) @ B.t()
        x = y.tanh() if number == 0 else y
    return x


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("training", [True, False])
def test_identity_is_bitwise_and_sites_know_their_sizes(name: str, training: bool) -> None:
    base = network(name).train(training)
    x = torch.randn(5, WIDTH, dtype=FORMATS[name].dtype)
    model = lorafx.inject(base, rank=RANK, targets="linear")
    assert torch.equal(model(x), base(x)) and torch.equal(model(x), base(x))
    with torch.no_grad():
        assert torch.equal(model(x[None]), base(x[None]))
    rows = lorafx.summary(model).sites
    assert [(r.in_features, r.out_features) for r in rows] == [(WIDTH, HIDDEN), (HIDDEN, WIDTH)]
    assert {factor.dtype for factor in lorafx.parameters(model)} == {torch.float32}
    with pytest.raises(lorafx.NoSiteError):
        lorafx.inject(base, targets="square")


@pytest.mark.parametrize("name", FORMATS)
def test_outputs_and_gradients_are_those_of_the_dequantised_weight(name: str) -> None:
    base, model, x = case(name)
    x.requires_grad_()
    y = model(x)
    y.float().square().sum().backward()
    wide = x.detach().double().requires_grad_()
    factors = [f.detach().double().requires_grad_() for f in lorafx.parameters(model)]
    expected = oracle(name, base, factors, wide)
    expected.square().sum().backward()
    narrow = FORMATS[name].dtype == torch.bfloat16
    assert far(y, expected) < (2e-2 if narrow else 1e-5)
    assert far(x.grad, wide.grad) < (3e-2 if narrow else 2e-5)
    for factor, exact in zip(lorafx.parameters(model), factors):
        assert far(factor.grad, exact.grad) < (3e-2 if narrow else 2e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_merging_copies_and_ejecting(name: str) -> None:
    base, model, x = case(name)
    y = model(x)
    merged = lorafx.merge(model)
    assert [type(layer) for layer in merged] == [nn.Linear, nn.Tanh, nn.Linear]
    assert {type(p) for p in merged.parameters()} == {nn.Parameter}
    assert {p.dtype for p in merged.parameters()} == {FORMATS[name].dtype}
    exact = FORMATS[name].exact
    assert far(merged(x), y) < (1e-5 if exact else 3e-2)
    assert torch.equal(copy.deepcopy(model)(x), y)
    assert torch.equal(lorafx.eject(model)(x), base(x))
    assert [type(layer) for layer in lorafx.eject(model)] == [type(layer) for layer in base]
    with lorafx.disabled(model):
        assert torch.equal(model(x), base(x))
    if name not in NO_PICKLE:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        assert torch.equal(torch.load(buffer, weights_only=False)(x), y)


@pytest.mark.parametrize("name", sorted(FORMATS.keys() - {"gptq", "awq"}))
def test_quantised_again_is_as_near_as_the_format(name: str) -> None:
    base, model, x = case(name)
    merged: Any = lorafx.merge(model, requantize=True)
    assert [type(layer) for layer in merged] == [type(layer) for layer in base]
    assert list(merged.requantize_error) == ["0", "2"]
    whole = lorafx.merge(model)
    for at, reported in ((0, merged.requantize_error["0"]), (2, merged.requantize_error["2"])):
        stored = FORMATS[name].dense(merged[at]).double()
        total, W = whole[at].weight.double(), FORMATS[name].dense(base[at]).double()
        error = float((stored - total).norm() / (total - W).norm())
        assert reported == pytest.approx(error, rel=0.05, abs=1e-6) and 0 < reported < 3
    assert far(merged(x), whole(x)) < 0.4


@pytest.mark.parametrize("name", ["nf4", "int8", "torchao int8", "dynamic", "gptq"])
def test_files_and_several_adapters(name: str, tmp_path: Path) -> None:
    base, model, x = case(name)
    y = model(x)
    for file in ("a.safetensors", "folder"):
        lorafx.save(model, tmp_path / file)
        assert far(lorafx.load(base, tmp_path / file)(x), y) < 1e-6
    lorafx.add(model, "other", rank=2)
    lorafx.activate(model, ["default", "other"])
    assert far(model(x), y) < 1e-6
    lorafx.remove(model, "default")
    assert far(model(x), base(x)) < 1e-6


@pytest.mark.parametrize("name", ["nf4", "int8", "dynamic", "gptq"])
def test_blocks_of_rows(name: str) -> None:
    base = network(name)
    model = fill(lorafx.inject(base, rank=2, targets=["0[64:128]"]), 0.3)
    x = torch.randn(5, WIDTH)
    changed = (model[0](x) != base[0](x)).any(0)
    assert changed[64:128].all() and not changed[:64].any() and not changed[128:].any()
    assert far(lorafx.merge(model)(x), model(x)) < 3e-2


@pytest.mark.parametrize("name", ["nf4", "torchao int8", "gptq"])
def test_gradient_checkpointing_and_dropout(name: str) -> None:
    from torch.utils.checkpoint import checkpoint

    base, x = network(name), torch.randn(6, WIDTH)
    model = fill(lorafx.inject(base, rank=2, targets="linear", dropout=0.5))
    gradients = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        model.zero_grad()
        torch.manual_seed(3)
        run(x).square().sum().backward()
        gradients.append([f.grad.clone() for f in lorafx.parameters(model)])
    assert all(map(torch.equal, *gradients)) and gradients[0][0].any()
