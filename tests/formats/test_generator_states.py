"""Whatever the damage to the state of a random generator, it is a FormatError, and sets nothing."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import lorafx
from tests.support.adapter_files import Model, edit

WRONG = (None, "x", "", [], {}, [[]], {"a": 1}, -1, 1.5, 10**30, True, float("nan"), float("inf"))


def damaged(value: Any) -> Iterator[Any]:
    """A JSON value with one part missing, of another type, out of range, nested or there twice."""
    yield from (wrong for wrong in WRONG if type(wrong) is not type(value))
    if isinstance(value, dict):
        for key in value:
            yield {other: value[other] for other in value if other != key}
            yield from ({**value, key: wrong} for wrong in damaged(value[key]))
    if isinstance(value, list):
        yield from (value[:length] for length in sorted({0, 1, len(value) // 2, len(value) - 1}))
        yield value + value
        for index in sorted({0, len(value) // 2, len(value) - 1}):
            for wrong in damaged(value[index]):
                yield [*value[:index], wrong, *value[index + 1:]]


def damaged_bytes(state: bytes) -> Iterator[bytes]:
    """The bytes of a state cut short, doubled, or replaced."""
    yield from (state[:length] for length in (0, 1, 10, len(state) // 2, len(state) - 1))
    yield from (
        state + state,
        bytes(len(state)),
        b"\xff" * len(state),
        b"null",
        b"[" * 100_000,
        b"\xff\xfe",
    )


def cases(place: str) -> Iterator[bytes]:
    if place == "cpu":
        yield from damaged_bytes(bytes(torch.get_rng_state().tolist()))
        return
    state: Any = random.getstate()
    if place == "numpy":
        state = numpy.random.get_state(legacy=False)
        state["state"]["key"] = state["state"]["key"].tolist()
    state = json.loads(json.dumps(state))
    yield from damaged_bytes(json.dumps(state).encode())
    for value in damaged(state):
        if not means_the_same(value, state):
            yield json.dumps(value).encode()


def means_the_same(value: Any, state: Any) -> bool:
    """A number that waits in a generator may be there or not, and True is 1."""
    if isinstance(state, list):
        return (
            isinstance(value, list)
            and len(value) == 3
            and value[:2] == state[:2]
            and value[2] == 1.5
        )
    if not isinstance(value, dict) or value.keys() != state.keys():
        return False
    return value | {"has_gauss": 0, "gauss": 0.0} == state | {"has_gauss": 0, "gauss": 0.0} and (
        value["has_gauss"] in (0, 1)
        and value["gauss"] in (0.0, 1.5)
        and type(value["gauss"]) is float
    )


def everything() -> list[Any]:
    return [random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist()]


@pytest.mark.parametrize("place", ["python", "numpy", "cpu"])
def test_every_damage_is_a_format_error(tmp_path: Path, place: str) -> None:
    random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
    path, model = tmp_path / "a.safetensors", lorafx.inject(Model(), rank=2)
    optimizer = torch.optim.AdamW(lorafx.parameters(model))
    lorafx.save(model, path, optimizer=optimizer, step=2)
    before, count = everything(), 0
    for state in cases(place):
        tensor = torch.tensor(list(state), dtype=torch.uint8)
        edit(path, lambda tensors, _: tensors.update({f"lorafx:random:{place}": tensor}))
        with pytest.raises(lorafx.FormatError, match="damaged"):
            lorafx.resume(model, optimizer, path)
        count += 1
    assert everything() == before
    assert count >= (11 if place == "cpu" else 80)
