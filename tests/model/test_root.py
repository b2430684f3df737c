"""The class of an injected model: that of the user's, whose calls pin what they use."""

import asyncio
import copy
import gc
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import lorafx
from lorafx._model.choice import Choice
from tests.support.models import TOKENS, Block
from tests.support.oracle import randomise


class Twice(nn.Module):
    """A model of which another is a part."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, *args):
        return 2 * self.part(*args)


@pytest.fixture
def model():
    return randomise(lorafx.inject(Block().eval(), targets="linear"))


@pytest.fixture
def pins(monkeypatch):
    """One for each call that pinned something."""
    found, own = [], Choice.pin

    def pin(self, *args):
        pinned = own(self, *args)
        found.append(pinned is not None)
        return pinned

    monkeypatch.setattr(Choice, "pin", pin)
    return found


@pytest.mark.parametrize("go", [
    lambda model: model,
    copy.deepcopy,
    copy.copy,
    lambda model: pickle.loads(pickle.dumps(model)),
    Twice,
    lambda model: torch.compile(model, backend="eager"),
    lambda model: model.compile(backend="eager") or model,
    lambda model: model.compile(backend="eager") or copy.deepcopy(model),
], ids="itself deepcopy copy pickle part compiled compile copied".split())
def test_each_call_pins_what_it_uses(model, pins, go):
    other, factor = go(model), 2 if go is Twice else 1
    torch.testing.assert_close(other(TOKENS), factor * model(TOKENS))
    assert pins == [True, True] and isinstance(model, Block)
    with lorafx.using(model, "default"):
        model(TOKENS)
    assert pins == [True, True, True]


def test_a_graph_module_pins_what_it_uses(pins):
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    model, x = lorafx.inject(graph), torch.ones(2, 4)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin(x)
        twin.recompile()
        torch.compile(twin, backend="eager", fullgraph=True)(x)
    assert pins == [True] * 6
    lorafx.eject(model)(x)
    assert len(pins) == 6


def test_as_a_part_of_what_is_compiled_it_is_traced(model, pins):
    counter = CompileCounter()
    call = torch.compile(Twice(model), backend=counter, fullgraph=True)
    torch.testing.assert_close(call(TOKENS), Twice(model)(TOKENS))
    assert counter.frame_count == 1 and pins == [True]


def test_exported(model):
    program = torch.export.export(model, (TOKENS,)).module()
    torch.testing.assert_close(program(TOKENS), model(TOKENS))


def test_undone_it_is_of_the_users_class(model, pins):
    assert type(lorafx.eject(model)) is type(lorafx.merge(model, untie=True)) is Block
    lorafx.eject(model)(TOKENS)
    assert pins == []


class Later(nn.Module):
    """Two layers, of which `how` returns a forward that runs step by step."""

    def __init__(self, how):
        super().__init__()
        self.one, self.two, self.how = nn.Linear(4, 4), nn.Linear(4, 4), how

    def forward(self, x):
        return self.how(self, x)


def generated(self, x):
    x = self.one(x)
    again = yield x
    yield again + self.two(x)


async def generated_async(self, x):
    x = self.one(x)
    again = yield x
    await asyncio.sleep(0)
    yield again + self.two(x)


def all_of(generator, change):
    first = next(generator)
    change()
    second = generator.send(first)
    with pytest.raises(ZeroDivisionError):
        generator.throw(ZeroDivisionError)
    return second


async def all_of_async(generator, change):
    first = await anext(generator)
    change()
    second = await generator.asend(first)
    with pytest.raises(ZeroDivisionError):
        await generator.athrow(ZeroDivisionError)
    return second


@pytest.mark.parametrize("how", [generated, generated_async])
def test_generators_use_to_their_end_what_they_began_with(how):
    model, x = lorafx.inject(Later(how), adapter="a"), torch.ones(2, 4)
    lorafx.add(model, "b")
    randomise(model)
    run = all_of if how is generated else lambda *args: asyncio.run(all_of_async(*args))
    expected = run(model(x), lambda: None)
    other = lorafx.activate(model, "b") or run(model(x), lambda: None)
    assert not torch.allclose(expected, other)

    def change():
        lorafx.activate(model, "b")
        assert torch.equal(model.one(x), of_b)  # nothing holds between steps

    of_b = model.one(x)
    lorafx.activate(model, "a")
    began = model(x)
    assert torch.equal(run(began, change), expected)
    with lorafx.using(model, "a"):
        began = model(x)
    assert torch.equal(run(began, change), expected)


class Awaited(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    async def forward(self, x):
        x = self.one(x)
        await asyncio.sleep(0)
        return self.two(x)


def test_a_coroutine_uses_to_its_end_what_it_began_with():
    with warnings.catch_warnings(record=True) as found:
        model, x = lorafx.inject(Awaited(), adapter="a"), torch.ones(2, 4)
        lorafx.add(model, "b")
        gc.collect()
    assert not found
    randomise(model)
    expected = asyncio.run(model(x))

    async def change():
        lorafx.activate(model, "b")

    async def both():
        return await asyncio.gather(model(x), change())

    assert torch.equal(asyncio.run(both())[0], expected)
    assert not torch.allclose(asyncio.run(model(x)), expected)
