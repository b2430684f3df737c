"""Saving survives processes and disks: the file at a path is the old one or the new one, whole."""

import errno
import fcntl
import os
import random
import signal
import stat
import time
from pathlib import Path

import pytest
import torch

import lorafx
from tests.support.adapter_files import Model, injected
from tests.support.processes import child, seconds

KILLS = 100


def constant(value: float) -> torch.nn.Module:
    """An injected model whose every A and B is one value, so large that writing takes a moment."""
    model = lorafx.inject(Model(160), 64, targets="linear")
    with torch.no_grad():
        for parameter in lorafx.parameters(model):
            parameter.fill_(value)
    return model


def value_of(path: Path) -> float:
    """The one value that all tensors of a whole file have."""
    loaded = lorafx.load(Model(160), path)
    [value] = {
        x for parameter in lorafx.parameters(loaded) for x in parameter.detach().unique().tolist()
    }
    return value


def save_forever(models: list[torch.nn.Module], path: Path) -> None:
    """Save one after the other to one path."""
    while True:
        for model in models:
            lorafx.save(model, path)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_killed_at_any_moment(tmp_path: Path) -> None:
    path, dice = tmp_path / "a.safetensors", random.Random(0)
    models = [constant(1.0), constant(2.0)]
    lorafx.save(models[0], path)
    lorafx.load(Model(160), path)
    seen, leftovers, once = [], 0, seconds(lambda: lorafx.save(models[0], path))
    for _ in range(KILLS):
        pid = child(lambda: save_forever(models, path))
        time.sleep(dice.uniform(0, 4 * once))
        os.kill(pid, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        names = sorted(os.listdir(tmp_path))
        assert (
            len(names) <= 2 and "a.safetensors" in names
        ), names  # a child leaves one file at most
        leftovers += len(names) - 1
        seen.append(value_of(path))
    print(
        leftovers, "temporary files left in", KILLS, "kills;", seen.count(1.0), "old,",
        seen.count(2.0), "new"
    )
    assert {1.0, 2.0} == set(seen) and leftovers > 0
    lorafx.save(models[0], path)
    assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_two_processes_never_mix(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    lorafx.save(constant(1.0), path)

    def save_often(value: float) -> None:
        model = constant(value)
        for _ in range(60):
            lorafx.save(model, path)
        (tmp_path / f"{value} is done").touch()

    pids = [child(lambda value=value: save_often(value)) for value in (1.0, 2.0, 3.0)]
    seen = set()
    while pids:
        seen.add(value_of(path))
        pids = [pid for pid in pids if os.waitpid(pid, os.WNOHANG)[0] == 0]
    assert len(seen) > 1
    assert sorted(os.listdir(tmp_path)) == [
        "1.0 is done",
        "2.0 is done",
        "3.0 is done",
        "a.safetensors",
    ]


def test_only_abandoned_files_of_this_path_are_removed(tmp_path: Path) -> None:
    hexes = "0123456789abcdef" * 2
    names = [
        f".a.safetensors.{hexes}.tmp", f".a.safetensors.{hexes}", f".b.a.safetensors.{hexes}.tmp",
        f".a.safetensors.b.{hexes}.tmp", "a.safetensors.tmp"
    ]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / f".a.safetensors.{hexes[::-1]}.tmp").symlink_to(tmp_path / names[1])
    lorafx.save(injected(), tmp_path / "a.safetensors")
    assert sorted(os.listdir(tmp_path)) == sorted(
        [*names[1:], f".a.safetensors.{hexes[::-1]}.tmp", "a.safetensors"]
    )


@pytest.mark.parametrize(
    "step, code",
    [
        ("fsync", errno.ENOSPC),
        ("fsync", errno.EIO),
        ("replace", errno.EACCES),
        ("open", errno.EROFS),
        ("open", errno.ENOSPC),
    ],
)
def test_a_disk_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, code: int
) -> None:
    path = tmp_path / "a.safetensors"
    lorafx.save(injected(), path)
    before = path.read_bytes()

    def broken(*_: object) -> None:
        raise OSError(code, os.strerror(code), "hidden")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, broken)
        with pytest.raises(
            OSError,
            match=f"a.safetensors' cannot be written, and stays as it was: {os.strerror(code)}",
        ) as caught:
            lorafx.save(injected(rslora=True, alpha=3), path)
    assert caught.value.errno == code and "hidden" not in str(caught.value)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.safetensors"]


def test_a_disk_that_is_full_half_way(tmp_path: Path) -> None:
    import resource
    path = tmp_path / "a.safetensors"
    lorafx.save(injected(), path)
    before, model = path.read_bytes(), constant(1.0)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(
        signal.SIGXFSZ, signal.SIG_IGN
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot be written, and stays as it was: File too large"):
            lorafx.save(model, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    lorafx.save(injected(), tmp_path / "a.safetensors")
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="cannot be written, and stays as it was"):
            lorafx.save(injected(), tmp_path / "a.safetensors")
    finally:
        tmp_path.chmod(0o700)
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_name_that_may_not_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "a.safetensors"
    real = os.fsync

    def broken(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(handle)

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(
        OSError,
        match="What was saved in '.*new' is there, whole, but its name may not be on the disk "
        "yet, .* what was there before: Input/output error",
    ) as caught:
        lorafx.save(constant(1.0), path)
    assert caught.value.errno == errno.EIO and value_of(path) == 1.0


def test_nothing_waits_for_a_process_that_stands_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, held = os.open, []

    def watched(path: Path, flags: int, *mode: int) -> int:
        handle = real(path, flags, *mode)
        if (
            flags & os.O_CREAT and len(held) < 3
        ):  # another save takes it for abandoned, and is stopped there
            held.append(real(path, os.O_RDWR))
            fcntl.flock(held[-1], fcntl.LOCK_EX)
        return handle

    def late(*_: object) -> None:
        raise TimeoutError("it waits")

    model, handler = injected(), signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", watched)
            lorafx.save(model, tmp_path / "a.safetensors")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        for handle in held:
            os.close(handle)
    assert len(held) == 3 and os.listdir(tmp_path) == ["a.safetensors"]
    lorafx.load(Model(), tmp_path / "a.safetensors")


def test_a_link_stays_one(tmp_path: Path) -> None:
    far, path = tmp_path / "far" / "b.safetensors", tmp_path / "a.safetensors"
    path.symlink_to("between")
    (tmp_path / "between").symlink_to(far)  # where nothing is yet, not even the folder
    for value in (1.0, 2.0):
        lorafx.save(constant(value), path)
        assert path.is_symlink() and (tmp_path / "between").is_symlink() and not far.is_symlink()
        assert value_of(path) == value_of(far) == value
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "between", "far"]
    assert os.listdir(tmp_path / "far") == ["b.safetensors"]


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.symlink_to("b.safetensors")
    (tmp_path / "b.safetensors").symlink_to(path)
    with pytest.raises(
        OSError,
        match="a.safetensors' cannot be written, and stays as it was: Too many levels of sym",
    ):
        lorafx.save(injected(), path)
    (tmp_path / "c.safetensors").symlink_to("/dev/null")
    with pytest.raises(
        lorafx.FormatError,
        match="c.safetensors' is in the way, and is not a file that can be replaced",
    ):
        lorafx.save(injected(), tmp_path / "c.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "b.safetensors", "c.safetensors"]
    assert path.is_symlink() and not Path("/dev/null").is_file()


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o400])
def test_permissions_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int) -> None:
    path, real, seen = tmp_path / "a.safetensors", os.fsync, []
    before = os.umask(0o027)
    try:
        lorafx.save(injected(), path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(mode)
        with monkeypatch.context() as patch:
            patch.setattr(
                os, "fsync", lambda handle: (seen.append(os.fstat(handle).st_mode), real(handle))
            )
            lorafx.save(injected(alpha=3), path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(seen[0]) == mode
    assert lorafx.load(Model(), path).up.lora.default.scale == 1.5


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_the_owner_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    lorafx.save(injected(), path)
    os.chown(path, 12345, 54321)
    lorafx.save(injected(alpha=3), path)
    assert (path.stat().st_uid, path.stat().st_gid) == (12345, 54321)
