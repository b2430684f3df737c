"""What DeepSpeed's ZeRO-3 partitions; it is not installed here: by what it does to parameters.

It gives each a `ds_id` and a `ds_shape`, and leaves it empty outside of GatheredParameters.
"""

import contextlib
import sys
import types

import pytest
import torch
from torch import nn

import lorafx
from tests.support.oracle import randomise

X = torch.randn(2, 4)


@pytest.fixture(autouse=True)
def deepspeed(monkeypatch):
    module = types.ModuleType("deepspeed.runtime.zero.partition_parameters")
    module.is_zero_param = lambda parameter: hasattr(parameter, "ds_id")
    monkeypatch.setitem(sys.modules, module.__name__, module)


def partition(model):
    """As deepspeed.initialize does it in stage 3: the values of all, by parameter."""
    values = {}
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.ds_shape = number, parameter.shape
        values[parameter] = parameter.data
        parameter.data = torch.empty(0)
    return values


@contextlib.contextmanager
def gathered(values):
    for parameter, value in values.items():
        parameter.data = value
    yield
    for parameter in values:
        parameter.data = torch.empty(0)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def test_a_partitioned_model_is_not_injected(tmp_path):
    lorafx.save(lorafx.inject(net()), tmp_path / "a.safetensors")
    model = net()
    partition(model)
    for make in (lorafx.inject, lorafx.sites,
                 lambda base: lorafx.load(base, tmp_path / "a.safetensors")):
        with pytest.raises(lorafx.UnsupportedModelError, match="'0.weight'.*ZeRO stage"):
            make(model)


def test_a_partitioned_adapter_is_saved_where_it_is_gathered(tmp_path):
    path = tmp_path / "a.safetensors"
    model = randomise(lorafx.inject(net()))
    expected = model(X)
    lorafx.save(model, path)
    values = partition(model)
    for use in (lambda: lorafx.save(model, tmp_path / "b.safetensors"), lambda: lorafx.merge(model),
                lambda: lorafx.load(model, path, adapter="b"), lambda: lorafx.add(model, "b"),
                lambda: lorafx.compose(model, ["default"], adapter="b")):
        with pytest.raises(lorafx.UnsupportedModelError, match="zero.GatheredParameters"):
            use()
    assert lorafx.adapters(model) == ["default"] and not (tmp_path / "b.safetensors").exists()
    with gathered(values):
        lorafx.save(model, tmp_path / "b.safetensors")
    assert torch.equal(lorafx.load(net(), tmp_path / "b.safetensors")(X), expected)
