"""Models that are made on the meta device and get their weights later."""

import copy

import pytest
import torch
from torch import nn

import lorafx
from tests.support.oracle import randomise

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 6), nn.Linear(6, 2))


def empty() -> nn.Module:
    with torch.device("meta"):
        return net()


def adapted(base: nn.Module, seed: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return lorafx.inject(base, rank=2, targets=["0", "2"], trainable="3")


def by_assignment(model):
    return model.load_state_dict(net().state_dict(), strict=False, assign=True)


def by_copy(model):
    model.to_empty(device="cpu")
    return model.load_state_dict(net().state_dict(), strict=False)


def by_reset_parameters_of_each_module(model):
    """As FSDP1 and training loops do, then the base."""
    for module in model.modules():
        if [*module.parameters(recurse=False)]:
            module.to_empty(device="cpu", recurse=False)
            module.reset_parameters()
    return model.load_state_dict(net().state_dict(), strict=False)


WAYS = [by_assignment, by_copy, by_reset_parameters_of_each_module]


@pytest.fixture
def path(tmp_path):
    """A file with an adapter that is not zero."""
    lorafx.save(randomise(adapted(net())), tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def same_tensors(model, other):
    mine, theirs = (dict(lorafx.named_parameters(m)) for m in (model, other))
    assert mine.keys() == theirs.keys() and len(mine) == 6
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=0, atol=0)
        assert mine[name].requires_grad and type(mine[name]) is type(tensor)


@pytest.mark.parametrize("give", WAYS)
def test_reset_parameters_makes_the_adapter_that_inject_makes(give):
    model, real = adapted(empty()), adapted(net())
    assert all(tensor.is_meta for tensor in lorafx.parameters(model))
    give(model)
    torch.manual_seed(5)
    lorafx.reset_parameters(model)
    same_tensors(model, real)
    assert torch.equal(model(X), net()(X))
    randomise(model)(X).sum().backward()
    assert all(tensor.grad is not None for tensor in lorafx.parameters(model))
    lorafx.reset_parameters(model, "default")
    assert torch.equal(model(X), net()(X))


@pytest.mark.parametrize("give", WAYS)
def test_an_adapter_that_was_loaded_first_is_kept(give, path):
    model = lorafx.load(empty(), path)
    assert not any(tensor.is_meta for tensor in lorafx.parameters(model))
    give(model)
    lorafx.reset_parameters(model)
    same_tensors(model, real := lorafx.load(net(), path))
    assert torch.equal(model(X), real(X))
    lorafx.save(model, path.with_name("again.safetensors"))
    same_tensors(lorafx.load(net(), path.with_name("again.safetensors")), real)
    lorafx.reset_parameters(model, "default")  # asked for by name
    assert torch.equal(model(X), net()(X))


@pytest.mark.parametrize("give", WAYS[1:])
def test_factors_are_drawn_with_the_memory_that_they_get(give):
    torch.manual_seed(1)
    model = lorafx.inject(empty(), rank=64, targets=["0", "2"])
    give(model)
    A = torch.cat([model[0].lora.default.A.flatten(), model[2].lora.default.A.flatten()])
    assert 0.015 < A.std() < 0.025
    assert not any(model[at].lora.default.B.any() for at in (0, 2))
    assert torch.equal(model(X), net()(X))


@pytest.mark.parametrize("move", [
    lambda model: model.to_empty(device="cpu"), nn.Module.double, nn.Module.share_memory,
    lambda model: model.to(torch.float64), copy.deepcopy],
    ids=["to_empty", "double", "share_memory", "to", "deepcopy"])
def test_whatever_moves_an_adapter_keeps_its_values(move, path):
    model = lorafx.load(net(), path)
    before = {name: tensor.detach().clone() for name, tensor in lorafx.named_parameters(model)}
    for tensor in lorafx.parameters(model):
        tensor.grad = torch.full_like(tensor, 2)
    for name, tensor in lorafx.named_parameters(move(model)):
        assert torch.equal(tensor, before[name].to(tensor.dtype)), name
        assert tensor.grad is None or bool((tensor.grad == 2).all())


def test_values_that_went_to_meta_are_missed_until_they_are_loaded(path):
    model = lorafx.load(net(), path)
    state = model.state_dict()
    model.to("meta").to_empty(device="cpu")
    base = {name: tensor for name, tensor in state.items()
            if ".lora." not in name and ".trained." not in name}
    model.load_state_dict(base, strict=False)
    lorafx.activate(model, "default")
    for use in (lambda: model(X), lambda: lorafx.save(model, path), lambda: model[0].weight + 0):
        with pytest.raises(lorafx.AdapterError, match="have no values since they were on the meta"):
            use()
    model.load_state_dict(state)
    assert torch.equal(model(X), lorafx.load(net(), path)(X))
    model.to("meta")
    model.load_state_dict(state, assign=True)
    assert torch.equal(model(X), lorafx.load(net(), path)(X))


def test_values_that_are_written_in_place_are_seen(path):
    model = lorafx.load(net(), path)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to("meta").to_empty(device="cpu")
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(state[name])
    assert torch.equal(model(X), lorafx.load(net(), path)(X))


@pytest.mark.parametrize("use", [
    lambda model, path: model(X), lambda model, path: model[0].weight @ X.T,
    lambda model, path: lorafx.save(model, path), lambda model, path: lorafx.merge(model),
    lambda model, path: lorafx.compose(model, {"default": 2.0}, adapter="twice"),
    lambda model, path: model[3](torch.ones(1, 6))])
def test_an_adapter_on_meta_says_what_comes_first(use, path):
    model = adapted(empty())
    by_assignment(model)
    with pytest.raises(lorafx.AdapterError, match=r"still on the meta device.*reset_parameters"):
        use(model, path)


def test_what_is_trained_whole_waits_for_the_base():
    model = adapted(empty()).to_empty(device="cpu")
    with pytest.raises(lorafx.AdapterError, match="have no values"):
        model[3](torch.ones(1, 6))
    model.load_state_dict(net().state_dict(), strict=False)
    lorafx.reset_parameters(model)
    assert torch.equal(model(X), net()(X))


def test_without_the_base_nothing_is_reset(path):
    for model in (adapted(empty()), lorafx.load(empty(), path)):
        state = {name: tensor.clone() for name, tensor in lorafx.named_parameters(model)}
        with pytest.raises(lorafx.AdapterError, match="of the base is still on the meta device"):
            lorafx.reset_parameters(model, "default")
        for name, tensor in lorafx.named_parameters(model):
            assert tensor.is_meta or torch.equal(tensor, state[name])


def test_a_loaded_adapter_is_not_folded_into_nothing(path):
    with pytest.raises(lorafx.UnsupportedModelError, match="load the base before lorafx.merge"):
        lorafx.merge(lorafx.load(empty(), path))
