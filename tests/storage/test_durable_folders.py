"""Saving over a PEFT folder, two files: what is read is one adapter or the other, whole."""

import errno
import fcntl
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import lorafx
from tests.support.adapters_by_kind import (
    KINDS, OLD, adapted, by_peft, contents, cut, kind_of, old_bin,
)
from tests.support.internals import replace_internal
from tests.support.processes import child, seconds

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


def outcome(path: Path) -> Any:
    """The kind of the adapter in a folder, or None where one of its two files is missing."""
    if not path.exists():
        return None
    try:
        return kind_of(path)
    except lorafx.FormatError as error:
        assert "has no adapter_config.json" in str(error) or "has neither" in str(error), error
        return None


def only(name: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        lorafx.save(adapted(OLD), path)
        for other in path.iterdir():
            if other.name != name:
                other.unlink()
    return make


THERE = {
    "lorafx": lambda path: lorafx.save(adapted(OLD), path),
    "PEFT": by_peft,
    "bin": old_bin,
    "cut": cut,
    "config": only("adapter_config.json"),
    "tensors": only("adapter_model.safetensors"),
    "nothing": only(""),
    "new": lambda path: None,
}
CALLS = ("fsync", "replace", "rename", "open", "mkdir", "unlink")


def at_step(
    last: int, act: Callable[[], None], once: bool, names: Iterable[str]
) -> tuple[dict[str, Callable[..., Any]], list[str]]:
    """System calls that act before the one of this number (or all from it on), and those made."""
    made: list[str] = []

    def watched(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any, **keywords: Any) -> Any:
            made.append(name)
            if len(made) == last or len(made) > last and not once:
                act()
            return real(*args, **keywords)
        return call

    return {name: watched(name) for name in names}, made


def copies(tmp_path: Path, make: Callable[[Path], None]) -> Iterator[tuple[int, Path]]:
    """Number upon number, and a folder for each that holds what `make` makes, if anything."""
    make(tmp_path / "old")
    for step in range(1, 100):
        (tmp_path / str(step)).mkdir()
        if (tmp_path / "old").exists():
            shutil.copytree(tmp_path / "old", tmp_path / str(step) / "x")
        yield step, tmp_path / str(step) / "x"


@pytest.mark.parametrize("there", ["lorafx", "bin", "cut", "config", "new"])
def test_killed_at_every_step(tmp_path: Path, there: str) -> None:
    model, another, seen = adapted(KINDS[1]), adapted(KINDS[2]), []

    def work(path: Path, step: int) -> None:
        calls, _ = at_step(
            step, lambda: os.kill(os.getpid(), signal.SIGKILL), True, CALLS[:3] + CALLS[-1:]
        )
        for name, call in calls.items():
            setattr(os, name, call)
        lorafx.save(model, path)

    for step, path in copies(tmp_path, THERE[there]):
        pid = child(lambda path=path, step=step: work(path, step))
        if os.waitpid(pid, 0)[1] == 0:
            break
        seen.append(outcome(path))
        lorafx.save(another, path)
        assert kind_of(path) == KINDS[2]
        assert os.listdir(path.parent) == ["x"]
        assert not [name for name in os.listdir(path) if name[0] == "."]
    before = outcome(tmp_path / "old")
    assert len(seen) > 7 and set(seen) == {before, KINDS[1]}
    # the old one up to some step, and then the new one
    assert seen == sorted(seen, key=lambda kind: kind != before)


@pytest.mark.parametrize("once", [True, False], ids=["once", "from then on"])
@pytest.mark.parametrize("make", THERE.values(), ids=THERE)
def test_an_error_at_every_step(tmp_path: Path, make: Callable[[Path], None], once: bool) -> None:
    model, kept = adapted(KINDS[1]), 0

    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "hidden")

    for step, path in copies(tmp_path, make):
        calls, made = at_step(step, fail, once, CALLS[:-1])
        with pytest.MonkeyPatch.context() as patch:
            for name, call in calls.items():
                patch.setattr(os, name, call)
            try:
                lorafx.save(model, path)
                message = ""
            except (OSError, lorafx.FormatError) as error:
                message = str(error)
                assert str(path.parent) in message and "hidden" not in message
                assert isinstance(error, lorafx.FormatError) or error.errno == errno.ENOSPC
        if "stays as it was" in message:
            kept += 1
            assert (
                contents(path) == contents(tmp_path / "old")
                and path.exists() == (tmp_path / "old").exists()
            ), made
        elif "cannot be put back" in message:
            assert not once and outcome(path) in (KINDS[1], None)
        else:
            assert (
                not message or "is there, whole, but its name may not be on the disk yet" in message
            )
            assert kind_of(path) == KINDS[1]
            if len(made) < step:
                break
    assert kept > 3


def save_forever(models: Iterable[nn.Module], path: Path) -> None:
    while True:
        for model in models:
            lorafx.save(model, path)


def test_killed_at_any_moment(tmp_path: Path) -> None:
    path, dice = tmp_path / "x", random.Random(0)
    models = [adapted(kind, 64) for kind in KINDS]
    lorafx.save(models[0], path)
    seen, leftovers, between, once = [], 0, 0, seconds(lambda: lorafx.save(models[0], path))
    for number in range(100):
        pid = child(lambda first=number % 3: save_forever(models[first:] + models[:first], path))
        time.sleep(dice.uniform(0, 3 * once))
        os.kill(pid, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        leftovers += len(os.listdir(path)) - 2
        seen.append(kind_of(path, 64))
        between += (
            json.loads((path / "adapter_config.json").read_text())["lora_alpha"] != seen[-1][1]
        )
    print(
        leftovers, "temporary files left in 100 kills,", between,
        "of them between the two renames;", set(seen)
    )
    assert set(seen) == set(KINDS) and leftovers > 0
    lorafx.save(models[0], path)
    lorafx.save(models[1], path)
    assert sorted(os.listdir(path)) == ["adapter_config.json", "adapter_model.safetensors"]
    assert kind_of(path, 64) == KINDS[1]


def test_killed_first_saves(tmp_path: Path) -> None:
    dice, model, leftovers, there, kills = random.Random(0), adapted(KINDS[0]), 0, 0, 0
    path = tmp_path / "x"
    once = seconds(lambda: lorafx.save(model, path))
    while kills < 40 or not leftovers and kills < 400:
        kills += 1
        shutil.rmtree(path, ignore_errors=True)
        pid = child(lambda: lorafx.save(model, path))
        time.sleep(dice.uniform(0, once))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if path.exists():
            there += 1
            assert kind_of(path) == KINDS[0]
        assert len(os.listdir(tmp_path)) <= 2  # each removes what the one before has left
        leftovers += any(name[0] == "." for name in os.listdir(tmp_path))
    print(leftovers, "temporary folders left in", kills, "kills,", there, "adapters")
    assert leftovers
    lorafx.save(model, path)
    assert os.listdir(tmp_path) == ["x"]


def test_only_abandoned_folders_of_this_path_are_removed(tmp_path: Path) -> None:
    hexes = "0123456789abcdef" * 2
    names = [
        f".x.{hexes}", f".y.x.{hexes}.tmp", f".x.y.{hexes}.tmp", "x.tmp", f".x.{hexes[::-1]}.tmp"
    ]
    gone = [f".x.{hexes}.tmp", f".x.{hexes[1:]}0.tmp"]
    for name in (*names, *gone):
        (tmp_path / name / "within").mkdir(parents=True)
        (tmp_path / name / "within" / "file").touch()
    link = f".x.{hexes[2:]}00.tmp"
    (tmp_path / link).symlink_to(tmp_path / names[0])
    handle = os.open(tmp_path / names[-1], os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)  # its process lives
    try:
        lorafx.save(adapted(KINDS[0]), tmp_path / "x")
    finally:
        os.close(handle)
    assert sorted(os.listdir(tmp_path)) == sorted([*names, link, "x"])
    assert all((tmp_path / name / "within" / "file").exists() for name in (*names, link))


@pytest.mark.parametrize("first", [False, True], ids=["over", "first"])
def test_savers_never_mix(tmp_path: Path, first: bool) -> None:
    models = [adapted(kind, 64) for kind in KINDS]
    paths = [tmp_path / str(number) for number in range(30 if first else 1)]
    if not first:
        lorafx.save(models[0], paths[0])

    def save_often(model: nn.Module) -> None:
        for path in paths:
            for _ in range(1 if first else 40):
                lorafx.save(model, path)
        (tmp_path / f"{model.up.lora.default.scale} is done").touch()

    pids, seen = [child(lambda model=model: save_often(model)) for model in models], set()
    while pids:
        seen |= {kind_of(path, 64) for path in paths if path.exists()}
        pids = [pid for pid in pids if os.waitpid(pid, os.WNOHANG)[0] == 0]
    assert len(seen) > 1 and seen <= set(KINDS)
    assert {kind_of(path, 64) for path in paths} <= set(KINDS)
    assert sorted(os.listdir(tmp_path)) == sorted(
        [path.name for path in paths]
        + [f"{model.up.lora.default.scale} is done" for model in models]
    )
    assert all(len(os.listdir(path)) == 2 for path in paths)


def test_a_saver_that_does_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    lorafx.save(adapted(KINDS[0]), path)
    before = contents(path)
    replace_internal(monkeypatch, "patience", 0.05)
    handle = os.open(path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        with pytest.raises(
            OSError,
            match="x' cannot be written, and stays as it was: another process has been writing "
            "to it for 0.05 seconds",
        ):
            lorafx.save(adapted(KINDS[1]), path)
        assert contents(path) == before and kind_of(path) == KINDS[0]  # readers do not wait
    finally:
        os.close(handle)
    lorafx.save(adapted(KINDS[1]), path)
    assert kind_of(path) == KINDS[1]
