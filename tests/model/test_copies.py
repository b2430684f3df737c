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
