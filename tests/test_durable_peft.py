"""Saving over a PEFT folder, which is two files: what is read is one adapter or the other, whole, or what was there."""

import errno
import fcntl
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from test_durable import child
from test_formats import Model
from test_peft import saved_by_peft
from torch import nn

import lorafx
from lorafx import _files, _peft_write

KINDS = ((4, 4.0, 1.0), (4, 12.0, 2.0), (6, 12.0, 3.0))  # rank, alpha, and the one value of every A and B
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


def adapted(kind: tuple[int, float, float], width: int = 8) -> nn.Module:
    rank, alpha, value = kind
    model = lorafx.inject(Model(width), rank, alpha=alpha, targets="linear")
    with torch.no_grad():
        for parameter in lorafx.parameters(model):
            parameter.fill_(value)
    return model


def kind_of(path: Path, width: int = 8) -> tuple[int, float, float]:
    """The kind of the adapter in a folder, all of which is of that kind."""
    model = lorafx.load(Model(width), path)
    factors = [site.lora.default for site in (model.up, model.head)]
    [rank], [alpha], [value] = ({pair.A.shape[0] for pair in factors}, {pair.scale * len(pair.A) for pair in factors},
                                {x for pair in factors for t in (pair.A, pair.B) for x in t.unique().tolist()})
    return rank, alpha, value


def outcome(path: Path) -> Any:
    """The kind of the adapter in a folder, or None where there is none, as where one of its two files is missing."""
    if not path.exists():
        return None
    try:
        return kind_of(path)
    except lorafx.FormatError as error:
        assert "has no adapter_config.json" in str(error) or "has neither" in str(error), error
        return None


def contents(path: Path) -> dict[str, bytes]:
    return {str(found.relative_to(path)): found.read_bytes() for found in path.rglob("*") if found.is_file()}


OLD = (3, 9.0, 7.0)


def by_peft(path: Path, **options: Any) -> None:
    model = saved_by_peft(Model(8), path, target_modules=["up", "head"], r=3, lora_alpha=9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.fill_(7.0)
    model.save_pretrained(path, **options)


def only(name: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        lorafx.save(adapted(OLD), path)
        for other in path.iterdir():
            if other.name != name:
                other.unlink()
    return make


def old_bin(path: Path) -> None:
    by_peft(path, safe_serialization=False)
    (path / "adapter_model.safetensors").unlink()


def cut(path: Path) -> None:
    """What a save leaves that was killed after its tensors were renamed."""
    lorafx.save(adapted(KINDS[0]), path)
    config = (path / "adapter_config.json").read_bytes()
    lorafx.save(adapted(OLD), path)
    (path / "adapter_config.json").write_bytes(config)


THERE = {"lorafx": lambda path: lorafx.save(adapted(OLD), path), "PEFT": by_peft, "bin": old_bin, "cut": cut,
         "config": only("adapter_config.json"), "tensors": only("adapter_model.safetensors"), "nothing": only(""),
         "new": lambda path: None}
CALLS = ("open", "fsync", "replace", "rename", "unlink", "mkdir")


def at_step(last: int, act: Callable[[], None], once: bool) -> tuple[dict[str, Callable[..., Any]], list[str]]:
    """Calls to the system by name, with an act before that of this number, or before all from it on; and those made."""
    made: list[str] = []

    def watched(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any, **keywords: Any) -> Any:
            made.append(name)
            if len(made) == last or len(made) > last and not once:
                act()
            return real(*args, **keywords)
        return call

    return {name: watched(name) for name in CALLS}, made


def copies(tmp_path: Path, make: Callable[[Path], None]) -> Iterator[tuple[int, Path]]:
    """Number upon number, and a folder for each that holds what `make` makes, if that is anything."""
    make(tmp_path / "old")
    for step in range(1, 100):
        (tmp_path / str(step)).mkdir()
        if (tmp_path / "old").exists():
            shutil.copytree(tmp_path / "old", tmp_path / str(step) / "x")
        yield step, tmp_path / str(step) / "x"


@pytest.mark.parametrize("make", THERE.values(), ids=THERE)
def test_killed_at_every_step(tmp_path: Path, make: Callable[[Path], None]) -> None:
    model, another, seen = adapted(KINDS[1]), adapted(KINDS[2]), []

    def work(path: Path, step: int) -> None:
        calls, _ = at_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL), once=True)
        for name, call in calls.items():
            setattr(os, name, call)
        lorafx.save(model, path)

    for step, path in copies(tmp_path, make):
        pid = child(lambda path=path, step=step: work(path, step))
        if os.waitpid(pid, 0)[1] == 0:
            break
        seen.append(outcome(path))
        lorafx.save(another, path)
        assert kind_of(path) == KINDS[2]
        assert os.listdir(path.parent) == ["x"] and not [name for name in os.listdir(path) if name[0] == "."]
    before = outcome(tmp_path / "old")
    assert len(seen) > 10 and set(seen) == {before, KINDS[1]}
    assert seen == sorted(seen, key=lambda kind: kind != before)  # the old one up to some step, and then the new one


@pytest.mark.parametrize("once", [True, False], ids=["once", "from then on"])
@pytest.mark.parametrize("make", THERE.values(), ids=THERE)
def test_an_error_at_every_step(tmp_path: Path, make: Callable[[Path], None], once: bool) -> None:
    model, kept = adapted(KINDS[1]), 0

    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "hidden")

    for step, path in copies(tmp_path, make):
        calls, made = at_step(step, fail, once)
        with pytest.MonkeyPatch.context() as patch:
            for name, call in calls.items():
                patch.setattr(os, name, call)
            try:
                lorafx.save(model, path)
                message = ""
            except (OSError, lorafx.FormatError) as error:
                message = str(error)
                assert f"'{path}" in message and "hidden" not in message
                assert isinstance(error, lorafx.FormatError) or error.errno == errno.ENOSPC
        if "stays as it was" in message:
            kept += 1
            assert contents(path) == contents(tmp_path / "old") and path.exists() == (tmp_path / "old").exists(), made
        elif "cannot be put back" in message:
            assert not once and outcome(path) in (KINDS[1], None)
        else:
            assert not message or "is there, whole, but its name may not be on the disk yet" in message
            assert kind_of(path) == KINDS[1]
            if len(made) < step:
                break
    assert kept > 3
