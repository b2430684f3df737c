"""Saving over a PEFT folder, two files: what is read is one adapter or the other, whole."""

import copy
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
import safetensors.torch
import torch
from peft import PeftModel
from torch import nn

import lorafx
from tests.support.adapter_files import Model
from tests.support.internals import DIGEST, WHOLE, internal, replace_internal
from tests.support.peft_adapters import saved_by_peft
from tests.support.processes import child, seconds

KINDS = (
    (4, 4.0, 1.0),
    (4, 12.0, 2.0),
    (6, 12.0, 3.0),
)  # rank, alpha, and the one value of every A and B
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
    [rank], [alpha], [value] = (
        {pair.A.shape[0] for pair in factors},
        {pair.scale * len(pair.A) for pair in factors},
        {x for pair in factors for t in (pair.A, pair.B) for x in t.unique().tolist()},
    )
    return rank, alpha, value


def outcome(path: Path) -> Any:
    """The kind of the adapter in a folder, or None where one of its two files is missing."""
    if not path.exists():
        return None
    try:
        return kind_of(path)
    except lorafx.FormatError as error:
        assert "has no adapter_config.json" in str(error) or "has neither" in str(error), error
        return None


def contents(path: Path) -> dict[str, bytes]:
    return {
        str(found.relative_to(path)): found.read_bytes()
        for found in path.rglob("*") if found.is_file()
    }


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
        assert os.listdir(path.parent) == ["x"] and not [
            name for name in os.listdir(path) if name[0] == "."
        ]
    before = outcome(tmp_path / "old")
    assert len(seen) > 7 and set(seen) == {before, KINDS[1]}
    assert seen == sorted(
        seen, key=lambda kind: kind != before
    )  # the old one up to some step, and then the new one


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


def test_what_is_read_meanwhile_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, models = tmp_path / "x", [adapted(kind) for kind in KINDS]
    lorafx.save(models[0], path)
    read, others = internal("read_safetensors"), models[1:]

    def late(file: Path) -> Any:
        while others:
            lorafx.save(others.pop(0), path)
        return read(file)

    replace_internal(monkeypatch, "read_safetensors", late)
    assert kind_of(path) == KINDS[2]


def test_a_config_of_another_adapter(tmp_path: Path) -> None:
    path = tmp_path / "x"
    lorafx.save(adapted(KINDS[0]), path)
    lorafx.save(adapted(KINDS[1]), path)
    config = json.loads((path / "adapter_config.json").read_text())
    for change in ({"lora_alpha": 5}, {"r": 9}):
        (path / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(
            lorafx.FormatError,
            match="was not written together with the adapter_config.json beside it",
        ):
            lorafx.load(Model(8), path)
    (path / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "mine"})
    )
    assert kind_of(path) == KINDS[1]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is missing or damaged"),
        ("[", "is missing or damaged"),
        ('{"peft_type": "LOHA"}', "lorafx reads 'LORA'"),
        ('{"peft_type": "LORA", "r": 9}', "was not written together"),
    ],
)
def test_a_config_in_the_tensors_that_lies(tmp_path: Path, text: str, message: str) -> None:
    cut(tmp_path)
    with safetensors.safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        tensors, header = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    assert kind_of(tmp_path) == OLD
    safetensors.torch.save_file(
        tensors, tmp_path / "adapter_model.safetensors", header | {WHOLE: text}
    )
    with pytest.raises(lorafx.FormatError, match=message):
        lorafx.load(Model(8), tmp_path)


def test_an_older_file_beside_a_newer_adapter(tmp_path: Path) -> None:
    old_bin(tmp_path / "x")
    assert kind_of(tmp_path / "x" / "adapter_model.bin") == kind_of(tmp_path / "x") == OLD
    lorafx.save(adapted((3, 27.0, 2.0)), tmp_path / "x")
    assert kind_of(tmp_path / "x") == (3, 27.0, 2.0)
    with pytest.raises(
        lorafx.FormatError, match="bin' is of an older adapter than adapter_model.safetensors and"
    ):
        lorafx.load(Model(8), tmp_path / "x" / "adapter_model.bin")


def test_the_header_and_what_stays(tmp_path: Path) -> None:
    path = tmp_path / "x"
    lorafx.save(adapted(KINDS[0]), path)
    assert header_of(path).keys() == {"format", DIGEST}
    lorafx.save(adapted(KINDS[1]), path)
    assert header_of(path)[WHOLE] == (path / "adapter_config.json").read_text()
    base, x = Model(8), torch.randn(3, 8)
    torch.testing.assert_close(
        PeftModel.from_pretrained(copy.deepcopy(base), path)(x), lorafx.load(base, path)(x)
    )
    config = (path / "adapter_config.json").stat()
    model = adapted(KINDS[1])
    with torch.no_grad():
        model.up.lora.default.A.fill_(5.0)
    lorafx.save(model, path)
    assert header_of(path).keys() == {"format", DIGEST}
    assert (path / "adapter_config.json").stat() == config  # equal, and so not written again
    assert lorafx.load(Model(8), path).up.lora.default.A.unique() == 5.0


def header_of(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path / "adapter_model.safetensors", "pt") as file:
        return file.metadata()


def test_links_and_permissions(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "x").symlink_to(tmp_path / "far" / "real")  # to nothing
    lorafx.save(adapted(KINDS[0]), tmp_path / "x")
    assert (tmp_path / "x").is_symlink() and kind_of(tmp_path / "far" / "real") == KINDS[0]
    assert os.listdir(tmp_path / "far") == ["real"]
    tensors = tmp_path / "far" / "real" / "adapter_model.safetensors"
    tensors.rename(tmp_path / "blob")
    tensors.symlink_to(tmp_path / "blob")
    (tmp_path / "blob").chmod(0o600)
    lorafx.save(adapted(KINDS[1]), tmp_path / "x")
    assert tensors.is_symlink() and kind_of(tmp_path / "x") == KINDS[1]
    assert (tmp_path / "blob").stat().st_mode & 0o777 == 0o600
    assert sorted(os.listdir(tmp_path)) == ["blob", "far", "x"]
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(
        OSError, match="loop' cannot be written, and stays as it was: Too many levels"
    ):
        lorafx.save(adapted(KINDS[1]), tmp_path / "loop")
    assert (tmp_path / "loop").is_symlink()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_what_is_in_the_way(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(lorafx.FormatError, match=f"{name}' is in the way"):
        lorafx.save(adapted(KINDS[0]), tmp_path)
    assert os.listdir(tmp_path) == [name]
