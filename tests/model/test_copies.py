"""What a copy of a model keeps, and what it shares with the original."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lorafx
from tests.support.oracle import randomise


def test_cached_tensors_of_a_graph_are_copied_by_value():
    base = nn.Sequential(nn.Linear(3, 3))
    base.cache = base[0].weight * 2
    model = lorafx.inject(base)
    assert torch.equal(model.cache, base.cache)
    assert model.cache is not base.cache
    assert not model.cache.requires_grad


def test_parameters_keep_their_own_attributes():
    base = nn.Linear(3, 3)
    base.weight.no_decay = True
    model = lorafx.inject(base)
    assert model.weight.no_decay and lorafx.merge(model).weight.no_decay


def test_a_buffer_on_a_parameter_stays_one():
    base = nn.Linear(3, 3)
    base.register_buffer("view", base.weight.data)
    base.register_buffer("own", torch.ones(2))
    model = lorafx.inject(base)
    with torch.no_grad():
        base.weight.mul_(2)
        base.own.mul_(2)
    assert torch.equal(model.view, base.weight) and model.own.sum() == 2


def test_a_metaclass_is_not_woken():
    known = {}

    class Meta(type):
        def __init__(cls, name, bases, space):
            known[name] = cls

    class Layer(nn.Linear, metaclass=Meta):
        pass

    assert not lorafx.sites(nn.Sequential(Layer(3, 3), nn.Linear(3, 3)), "1")[0].aliases
    assert known["Layer"] is Layer


def test_copies_within_disabled_are_refused():
    model = lorafx.inject(nn.Linear(3, 3))
    with lorafx.disabled(model):
        for call in (copy.deepcopy, pickle.dumps, lorafx.merge, lorafx.eject):
            with pytest.raises(
                lorafx.AdapterError, match="adapters are disabled: copy, pickle, merge or eject"
            ):
                call(model)
    copy.deepcopy(model)


X = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Wrap(nn.Module):
    """Hands on to its child what it has not."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x):
        return self.inner(x) * 2


def test_a_parent_that_hands_attributes_on_is_copied_as_itself():
    model = randomise(lorafx.inject(Wrap().double()))
    twin = copy.deepcopy(model)
    assert type(twin) is type(model) and torch.equal(twin(X), model(X))
    torch.testing.assert_close(lorafx.merge(model)(X), model(X))


class Tower(nn.Module):
    """Python that calls one layer after another."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def tower():
    model = lorafx.inject(Tower().double(), rank=2, adapter="a", dtype=torch.float64)
    lorafx.add(model, "b", rank=3)
    return randomise(model)


def merged(model, spec):
    """What it gives with W + s B A of these adapters in the place of each W."""
    x = X
    for layer in model.layers:
        weight = layer.frozen_weight
        for name, share in spec.items():
            factors = layer.lora.get_submodule(name)
            weight = weight + share * factors.scale * factors.B @ factors.A
        x = torch.tanh(x @ weight.T + layer.bias)
    return x


def test_a_copied_layer_follows_its_model():
    model = tower()
    outside = copy.deepcopy(model.layers[0])
    model.layers.append(copy.deepcopy(model.layers[1]))
    lorafx.activate(model, "b")
    torch.testing.assert_close(model(X), merged(model, {"b": 1}))
    torch.testing.assert_close(outside(X), model.layers[0](X))
    with lorafx.using(model, {"a": 0.5, "b": -2.0}):
        torch.testing.assert_close(model(X), merged(model, {"a": 0.5, "b": -2.0}))
    with lorafx.rows(model, ["a", None, None, None, "b"]):
        found = model(X)
    for row, spec in ((0, {"a": 1}), (1, {}), (4, {"b": 1})):
        torch.testing.assert_close(found[row], merged(model, spec)[row])


def test_a_copy_of_the_whole_does_not_follow():
    """Also where a part of it was met first."""
    model = tower()
    _, twin = copy.deepcopy([model.layers[1], model])
    lorafx.activate(model, "b")
    torch.testing.assert_close(twin(X), merged(model, {"a": 1}))
    lorafx.activate(twin, ["a", "b"])
    torch.testing.assert_close(twin(X), merged(model, {"a": 1, "b": 1}))
    torch.testing.assert_close(model(X), merged(model, {"b": 1}))


@pytest.mark.parametrize("taken", [
    lambda model: tower().layers[0],
    lambda model: copy.deepcopy(model).layers[0],
    lambda model: pickle.loads(pickle.dumps(model.layers[0])),
])
def test_a_layer_of_another_model_is_refused(taken):
    model = tower()
    model.layers.append(taken(model))
    for call in (
        lambda: model(X), lambda: lorafx.activate(model, "b"), lambda: lorafx.add(model, "c"),
        lambda: lorafx.remove(model, "b"),
    ):
        with pytest.raises(lorafx.AdapterError, match="'layers.2.lora' is part of another"):
            call()
    assert lorafx.adapters(model) == ["a", "b"]
    del model.layers[2]
    torch.testing.assert_close(model(X), merged(model, {"a": 1}))


def test_a_model_that_asks_another_for_a_part():
    """Of which it holds none."""
    teacher, model = tower(), tower()
    expected = model(X) + teacher.layers[0](X)
    handle = model.register_forward_hook(lambda module, args, y: y + teacher.layers[0](X))
    torch.testing.assert_close(model(X), expected)
    handle.remove()
    model.teacher = teacher  # whose own call says what it uses
    model.register_forward_hook(lambda module, args, y: y + module.teacher(X))
    expected = merged(model, {"a": 1}) + merged(teacher, {"b": 1})
    lorafx.activate(teacher, "b")
    torch.testing.assert_close(model(X), expected)
