"""Thousands of damaged files: each is a clean error that changes nothing, or loads as what it says.

"What it says" is read independently, by safetensors and by torch.load: the same names, shapes, bits
and scales.
"""

import io
import json
import os
import random
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch

import lorafx
from tests.support.adapter_files import Model, injected
from tests.support.internals import internal
from tests.support.mutations import SEED, Dice, mutate_native, mutate_zip, tensors_of


def native(path: Path) -> None:
    """A file with all that an adapter can have."""
    lorafx.save(
        lorafx.inject(Model(), 2, targets="up", alpha=4, rank_pattern={"u.": 2}, trainable="head"),
        path,
    )


def begun() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A training run after one step, with two parameter groups."""
    model = lorafx.inject(Model(), 2, targets="up", trainable="head")
    first, *rest = lorafx.parameters(model)
    optimizer = torch.optim.AdamW([{"params": [first]}, {"params": rest, "lr": 0.1}])
    model(torch.ones(2, 5)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def with_training(path: Path) -> None:
    """A file from which a training run can go on."""
    model, optimizer = begun()
    random.seed(SEED)  # the file holds the states of all generators
    numpy.random.seed(SEED)
    lorafx.save(model, path, optimizer=optimizer, step=1)


KINDS: dict[str, tuple[str, int, Callable[[Path], None], Callable[[bytes, Dice], bytes]]] = {
    "native": ("a.safetensors", 2000, native, mutate_native),
    "training": ("a.safetensors", 1000, with_training, mutate_native),
    "zip": ("a.pth", 1500, lambda path: lorafx.save(injected(), path), mutate_zip),
}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same, to the bit."""
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(
        one.contiguous().flatten().view(torch.uint8), other.contiguous().flatten().view(torch.uint8)
    )


def check_as_the_file_says(path: Path) -> None:
    """What lorafx reads from a file that it accepts is what safetensors and torch.load read."""
    adapter, _ = internal("read_adapter")(path)
    if path.suffix == ".pth":
        expected = torch.load(tidied(path), "cpu", weights_only=True)
        scales = dict.fromkeys(adapter.pairs, 1.0)
        found = {f"{name}.weight": tensor for name, tensor in adapter.tensors()}
    else:
        everything, found = safetensors.torch.load(path.read_bytes()), dict(adapter.tensors())
        expected = {
            name: tensor for name, tensor in everything.items() if not name.startswith("lorafx:")
        }
        with safetensors.safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["adapter"])
        scales = about["scales"]
        trained = sorted(set(about["trained"]))
        assert adapter.name == about["name"] and sorted(adapter.trained) == trained
    assert found.keys() == expected.keys()
    assert all(same_bits(found[name], expected[name]) for name in found)
    assert {site: pair.scale for site, pair in adapter.pairs.items()} == scales
    assert all(tensor.isfinite().all() for tensor in found.values())


def tidied(path: Path) -> io.BytesIO:
    """A .pth file without the members that only torch reads: damage there hurts no tensor."""
    data, buffer = path.read_bytes(), io.BytesIO()
    if not zipfile.is_zipfile(path):
        return io.BytesIO(data)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(buffer, "w") as made:
        for name in source.namelist():
            if name.endswith("/data.pkl") or "/data/" in name:
                made.writestr(name, source.read(name))
        made.writestr(source.namelist()[0].partition("/")[0] + "/version", "3\n")
    buffer.seek(0)
    return buffer


# Odd patterns and bytes are warned of.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(kind: str, tmp_path: Path) -> None:
    name, count, write, mutate = KINDS[kind]
    path, outcomes = tmp_path / name, Counter[str]()
    write(path)
    whole = path.read_bytes()
    models = [Model(), injected(adapter="here")]
    before = [tensors_of(model) for model in models]
    for index in range(count):
        data = mutate(whole, Dice(f"{SEED} {kind} {index}"))
        path.unlink()  # some file systems wait for the disk when a file is made empty
        path.write_bytes(data)
        try:
            outcome = outcome_of(path, models[index % 2], before[index % 2])
            assert path.read_bytes() == data and os.listdir(tmp_path) == [name]
        except BaseException as error:
            raise AssertionError(
                f"{kind!r} {index} (seed {SEED}), in {path}: {data[:4000]!r}"
            ) from error
        outcomes[outcome] += 1
    print(kind, dict(outcomes))
    assert outcomes["FormatError"] > count / 2 and outcomes["loaded"] > count / 100


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_damaged_training_states(tmp_path: Path) -> None:
    path, outcomes = tmp_path / "a.safetensors", Counter[str]()
    with_training(path)
    whole, (model, optimizer) = path.read_bytes(), begun()
    before = state_of(model, optimizer)
    for index in range(1500):
        data = mutate_native(whole, Dice(f"{SEED} resume {index}"))
        path.unlink()  # some file systems wait for the disk when a file is made empty
        path.write_bytes(data)
        try:
            outcomes[resumed(path, model, optimizer, before)] += 1
        except BaseException as error:
            raise AssertionError(
                f"Mutation {index} (seed {SEED}), in {path}: {data[:4000]!r}"
            ) from error
        if state_of(model, optimizer) != before:
            model, optimizer = begun()
            before = state_of(model, optimizer)
    print("resume", dict(outcomes))
    assert outcomes["FormatError"] > 500 and outcomes["resumed"] > 50


def resumed(
    path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, before: Any
) -> str:
    """How resuming ends: with an error that leaves all as it was, or with a run that can go on."""
    try:
        step = lorafx.resume(model, optimizer, path)
    except lorafx.LorafxError as error:
        assert str(error).isprintable() and len(str(error)) < 1000, error
        assert state_of(model, optimizer) == before
        return type(error).__name__
    with safetensors.safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["adapter"])
        assert about["training"]["step"] == step
        for name, tensor in state_tensors(model, optimizer).items():
            kept = file.get_tensor(name)
            if name == "lorafx:random:cpu":  # of which some bytes mean nothing
                kept = torch.Generator().set_state(kept).get_state()
            assert same_bits(tensor, kept), name
    optimizer.step()
    return "resumed"


def state_tensors(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """The tensors of a run under their names in a file."""
    names = {"up.lora.default.A": "up.lora.A", "up.lora.default.B": "up.lora.B",
             "head.trained.default.weight": "head.weight", "head.trained.default.bias": "head.bias"}
    live = {names[name]: parameter for name, parameter in lorafx.named_parameters(model)}
    return {name: parameter.detach() for name, parameter in live.items()} | {
        f"lorafx:state:{key}:{name}": value for name, parameter in live.items()
        for key, value in optimizer.state[parameter].items() if isinstance(value, torch.Tensor)} | {
        "lorafx:random:cpu": torch.get_rng_state()}


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """All that a run depends on, to be compared."""
    tensors = {name: tensor.tolist() for name, tensor in state_tensors(model, optimizer).items()}
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    return tensors, groups, random.getstate()


def outcome_of(path: Path, model: torch.nn.Module, before: dict[str, torch.Tensor]) -> str:
    """How loading into a plain or an injected model ends; the model must be left as it was."""
    try:
        loaded, outcome = lorafx.load(model, path), "loaded"
        check_as_the_file_says(path)
        if loaded is model:
            lorafx.remove(model, lorafx.adapters(model)[-1])
    except lorafx.LorafxError as error:
        outcome = type(error).__name__
        assert str(error).isprintable() and len(str(error)) < 1000, error
    now = tensors_of(model)
    assert now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in now)
    return outcome
