"""Who reads a weight decides what it gets, wherever in a stack of calls the reader stands."""

import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lorafx
from lorafx._model import readers
from lorafx._model.adapted_weight import AdaptedWeight
from lorafx._model.readers import Answer


class Reading(nn.Linear):
    """Python that reads its weight."""

    def forward(self, x):
        if x.ndim:
            return F.linear(x, self.weight, self.bias)
        return x


def module_named(name, source):
    """A module of Python that is named so."""
    made = types.ModuleType(name)
    exec(source, vars(made))
    return made


READS = """
def directly(layer):
    return layer.weight

def by_getattr(layer):
    return getattr(layer, "weight")

def deeper(layer):
    return [read(layer) for read in (lambda layer: layer.weight,)][0]

def through(call, layer):
    return call(layer)
"""


@pytest.fixture
def row(monkeypatch):
    """Put a row into the table until the test ends."""
    def put(prefix, answer):
        monkeypatch.setitem(readers.READERS, prefix, answer)
        readers.answer_to.cache_clear()

    yield put
    monkeypatch.undo()
    readers.answer_to.cache_clear()


@pytest.fixture
def layer():
    model = lorafx.inject(Reading(4, 3), targets="linear")
    nn.init.normal_(model.lora.default.B)
    return model


@pytest.mark.parametrize("how", ["directly", "by_getattr", "deeper"])
def test_a_row_of_the_table_holds_for_all_modules_with_its_prefix(how, layer, row):
    for answer in Answer:
        row("placing.", answer)
        read = getattr(module_named("placing.weights", READS), how)
        others = getattr(module_named("placings", READS), how)
        whole = layer.frozen_weight + layer.lora.default.B @ layer.lora.default.A
        with torch.no_grad():
            kind = {Answer.ADAPTED: AdaptedWeight, Answer.SUM: torch.Tensor,
                    Answer.PARAMETER: nn.Parameter, Answer.LAYER: nn.Parameter}[answer]
            assert type(read(layer)) is kind and type(others(layer)) is AdaptedWeight
            if answer is Answer.SUM:
                torch.testing.assert_close(read(layer), whole)
        if answer in (Answer.PARAMETER, Answer.LAYER):
            assert read(layer) is layer.frozen_weight
        else:  # also a sum, if a gradient is to go through it
            assert type(read(layer)) is AdaptedWeight


def test_the_reader_is_the_first_that_is_not_of_lorafx(layer, row):
    """Code of lorafx may stand between; the reader's caller does not count."""
    row("placing.", Answer.PARAMETER)
    placing = module_named("placing.weights", READS)
    ours, user = module_named("lorafx.anything", READS), module_named("lorafxes", READS)
    assert ours.through(placing.directly, layer) is layer.frozen_weight
    assert placing.through(ours.directly, layer) is layer.frozen_weight
    assert type(placing.through(user.directly, layer)) is AdaptedWeight


class Scaled(nn.Sequential):
    """A region with a parameter of its own, and one in it."""

    def __init__(self):
        super().__init__(nn.Linear(4, 4), nn.Linear(4, 4))
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self[1](F.linear(x, self[0].weight)) * self.scale


@pytest.mark.parametrize("path, name", [("1", "bias"), ("", "scale")])
def test_a_region_reads_what_is_trained_whoever_calls_it(path, name, row):
    """As accelerate calls the forward of an instance itself."""
    row("placing.", Answer.PARAMETER)
    placing = module_named("placing.hooks", READS)
    model = lorafx.inject(Scaled(), targets=["0", "1"], trainable=f"{path}.{name}".lstrip("."))
    region, x = model.get_submodule(path), torch.randn(2, 4)
    before = region(x)
    with torch.no_grad():
        region.trained.default.get_parameter(name).add_(1)
    after = region(x)
    assert torch.equal(placing.through(region.forward, x), after)
    assert not torch.allclose(before, after, atol=0.1)


def test_no_frame_is_an_unknown_reader():
    assert readers.answer_to(readers.module_of(None)) is Answer.ADAPTED
