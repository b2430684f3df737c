"""Merging that is interrupted, fails, or is done twice at once: the old or the new, whole."""

import errno
import fcntl
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

import lorafx
from tests.support.checkpoints import SHARD, files, save_sharded
from tests.support.command_line import MERGE, error, interrupted, main, refused
from tests.support.internals import internal, replace_internal
from tests.support.oracle import randomise
from tests.support.processes import child


CHANGES = ("rename", "replace", "unlink", "rmdir")


def stopping(monkeypatch, after: int, stop: Callable[[], None]) -> None:
    """Stop before what would change names on the disk once more than this often."""
    done = []

    def counted(real):
        def call(*arguments, **options):
            done.append(real)
            if len(done) == after + 1:
                stop()
            return real(*arguments, **options)
        return call

    for name in CHANGES:
        monkeypatch.setattr(os, name, counted(getattr(os, name)))


@pytest.fixture
def replaced(small):
    """The files of a folder to be replaced, those of the new one, and how to begin again."""
    assert main([*MERGE[:-1], "whole"]) == 0
    assert main(["merge", "base", "t.safetensors", "-o", "before"]) == 0
    Path("before/rest").write_text("of before")

    def again():
        for name in ("out", "out.partial"):
            shutil.rmtree(name, ignore_errors=True)
        shutil.copytree("before", "out")

    return files(Path("before")), files(Path("whole")), again


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_killed_at_each_step_of_replacing(replaced, monkeypatch, capsys):
    before, whole, begin = replaced
    absent = moved = 0
    for after in range(100):
        for force in (["--force"], []):
            begin()
            with monkeypatch.context() as patch:
                stopping(patch, after, lambda: os._exit(9))
                code = os.waitstatus_to_exitcode(
                    os.waitpid(child(lambda: os._exit(main([*MERGE, "--force"]))), 0)[1]
                )
            assert code in (0, 9)
            if os.path.exists("out") and files(Path("out")) == whole:
                shutil.rmtree("out")  # the user takes it elsewhere
                moved += 1
            elif not os.path.exists("out"):
                absent += 1
                assert files(Path("out.partial/old")) == before
                assert files(Path("out.partial/new")) == whole
            if (
                not force and not moved
            ):  # it was not replaced, and is not now, nor is what was finished lost
                assert main(["merge", "base", "t.safetensors", "-o", "out"]) == 2
                assert "replace it with --force" in error(capsys)
                assert files(Path("out")) == before
                assert not absent or files(Path("out.partial/new")) == whole
                force = ["--force"]
            assert main([*MERGE, *force]) == 0
            assert files(Path("out")) == whole and not os.path.exists("out.partial")
            capsys.readouterr()
        if code == 0:
            break
    assert absent == 2 and moved > 4 and after > 12


def test_failing_at_each_step_of_replacing(replaced, monkeypatch, capsys):
    before, whole, begin = replaced

    def fail():
        raise OSError(errno.EIO, "the disk fails")

    for after in range(100):
        begin()
        capsys.readouterr()
        with monkeypatch.context() as patch:
            stopping(patch, after, fail)
            code = main([*MERGE, "--force"])
        if code:
            said, found = error(capsys), files(Path("out"))
            assert "the disk fails" in said
            assert found == (whole if "'out' is finished" in said else before)
            assert main([*MERGE, "--force"]) == 0
        assert files(Path("out")) == whole and not os.path.exists("out.partial")
        if code == 0:
            break
    assert after > 12


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_killed_at_any_moment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, rng, cut = nn.Sequential(*[nn.Linear(40, 40) for _ in range(12)]), random.Random(0), 0
    save_sharded(dict(base.state_dict()), Path("base"), 24)
    lorafx.save(randomise(lorafx.inject(base, rank=2)), "a.safetensors")
    began = time.perf_counter()
    assert main([*MERGE[:-1], "whole"]) == 0
    whole, lasts = files(Path("whole")), time.perf_counter() - began
    for _ in range(20):
        pid = child(lambda: os._exit(main(MERGE)))
        time.sleep(rng.uniform(0, 1.2 * lasts))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        cut += os.WIFSIGNALED(status) and os.path.exists("out.partial")
        if os.path.exists("out"):
            assert files(Path("out")) == whole
            shutil.rmtree("out")
    assert cut
    assert main(MERGE) == 0
    assert files(Path("out")) == whole and not os.path.exists("out.partial")


def test_going_on_writes_only_the_rest_and_only_of_the_same(small, monkeypatch, capsys):
    assert main([*MERGE[:-1], "whole"]) == 0
    assert interrupted(monkeypatch, 1, MERGE) == 1
    assert "the disk is gone" in error(capsys) and not os.path.exists("out")
    for base in ("out.partial", "out.partial/new"):
        assert "is what an interrupted lorafx merge left" in refused(
            capsys, "merge", base, "a.safetensors", "-o", "no"
        )
    first = "model-00001-of-00002.safetensors"
    kept = Path("out.partial/new", first).stat().st_mtime_ns
    os.mkdir("elsewhere")
    with monkeypatch.context() as patch:
        patch.chdir("elsewhere")
        assert main(["merge", "../base", "../a.safetensors", "-o", "../out"]) == 0
    assert files(Path("out")) == files(Path("whole"))
    assert Path("out", first).stat().st_mtime_ns == kept


OTHERWISE = {"another adapter": ["merge", "base", "t.safetensors"],
             "another dtype": [*MERGE[:3], "--dtype", "bfloat16"],
             "another weight": ["merge", "base", "--adapter", "a.safetensors=0.5"],
             "more threads": [*MERGE[:3], "--threads", "2"]}


@pytest.mark.parametrize("case", OTHERWISE)
def test_another_merge_starts_over(small, monkeypatch, case):
    assert main([*OTHERWISE[case], "-o", "wanted"]) == 0
    for arguments in (MERGE, [*OTHERWISE[case], "-o", "out"]):
        assert interrupted(monkeypatch, 3, MERGE) == 3
        for name in files(Path("out.partial/new")):
            Path("out.partial/new", name).write_text("finished before")
        assert main(arguments) == 0
        assert (files(Path("out")) == files(Path("wanted"))) is (arguments is not MERGE)
        shutil.rmtree("out")


def test_a_source_that_was_replaced(small, monkeypatch):
    """Its size and the time of its last change are what they were."""
    interrupted(monkeypatch, 4, MERGE)
    for path in (Path("base", SHARD), Path("base/config.json")):
        before, new = path.stat(), bytearray(path.read_bytes())
        new[-3] ^= 1
        Path("new").write_bytes(new)
        os.replace("new", path)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (
            before.st_size,
            before.st_mtime_ns,
        )
    assert main([*MERGE[:-1], "wanted"]) == 0
    assert main(MERGE) == 0
    assert files(Path("out")) == files(Path("wanted"))


@pytest.mark.parametrize(
    "base, changed",
    [
        ("base", f"base/{SHARD}"),
        ("base", "base/config.json"),
        ("base", "base/new.txt"),
        ("base.pth", "base.pth"),
        ("base.safetensors", "base.safetensors"),
    ],
)
def test_a_source_that_changes_meanwhile(small, monkeypatch, base, changed, capsys):
    out, real, path = "out" + Path(base).suffix, shutil.disk_usage, Path(changed)

    def usage(folder):  # asked for once all headers are read
        path.with_name("n").write_bytes(path.read_bytes() if path.exists() else b"new")
        os.replace(path.with_name("n"), path)
        return real(folder)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", usage)
        assert main(["merge", base, "a.safetensors", "-o", out]) == 2
    assert f"{changed}' changed while '{base}' was merged: run the same command again" in error(
        capsys
    )
    assert not Path(out).exists()
    assert main(["merge", base, "a.safetensors", "-o", out]) == 0


@pytest.mark.parametrize("name", ["base.pth", "base.safetensors"])
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_file_that_fails_or_is_killed(small, monkeypatch, name):
    out = Path("out" + Path(name).suffix)
    arguments = ["merge", name, "a.safetensors", "-o", str(out)]
    before = sorted(os.listdir())
    assert interrupted(monkeypatch, 0, arguments) == 0 and sorted(os.listdir()) == before
    # it only lacks its name
    assert interrupted(monkeypatch, 1, arguments) == 1 and not out.exists()
    assert main(arguments) == 0 and sorted(os.listdir()) == sorted([*before, out.name])
    whole = out.read_bytes()
    for after in range(6):
        out.write_bytes(b"old")
        with monkeypatch.context() as patch:
            stopping(patch, after, lambda: os._exit(9))
            os.waitpid(child(lambda: os._exit(main([*arguments, "--force"]))), 0)
        assert out.read_bytes() in (b"old", whole)
        assert main([*arguments, "--force"]) == 0
        assert out.read_bytes() == whole and sorted(os.listdir()) == sorted([*before, out.name])


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("base", ["base", "base.safetensors"])
def test_two_at_once(small, monkeypatch, base, capsys):
    out = "out" + Path(base).suffix
    reading, writing = os.pipe()

    def wait_when_written(*arguments):
        os.write(writing, b"x")
        time.sleep(60)

    with monkeypatch.context() as patch:
        replace_internal(patch, "put", wait_when_written)
        pid = child(lambda: os._exit(main(["merge", base, "t.safetensors", "-o", out])))
    try:
        os.read(reading, 1)
        said = refused(capsys, "merge", base, "a.safetensors", "-o", out)
        assert f"Another process is writing '{Path(out).resolve()}.partial': wait for it" in said
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reading)
        os.close(writing)
    assert main(["merge", base, "a.safetensors", "-o", out]) == 0
    assert main(["merge", base, "a.safetensors", "-o", "wanted" + out]) == 0
    wanted, found = (files(Path(name)) or Path(name).read_bytes() for name in ("wanted" + out, out))
    assert found == wanted


def test_a_disk_without_locks(small, monkeypatch, capsys):
    def unable(code):
        def flock(file, how):
            raise OSError(code, os.strerror(code))
        monkeypatch.setattr(fcntl, "flock", flock)

    unable(errno.ENOLCK)
    assert main(MERGE) == 0
    unable(errno.EIO)
    assert main([*MERGE[:-1], "new"]) == 2 and "Input/output error" in error(capsys)


@pytest.mark.parametrize("base", ["base", "base.safetensors"])
def test_a_name_that_may_not_be_on_the_disk(small, monkeypatch, base, capsys):
    out, real = "out" + Path(base).suffix, internal("sync_folder")

    def sync(folder):
        if folder == Path().resolve():
            raise OSError(errno.EIO, "Input/output error")
        real(folder)

    arguments = ["merge", base, "a.safetensors", "-o"]
    assert main([*arguments, "whole" + out]) == 0
    with monkeypatch.context() as patch:
        replace_internal(patch, "sync_folder", sync)
        assert main([*arguments, out]) == 2
        assert f"'{out}' is finished and has its name, but" in error(capsys)
        assert main([*arguments, out, "--force"]) == 2
    wanted, found = (files(Path(name)) or Path(name).read_bytes() for name in ("whole" + out, out))
    assert found == wanted
    assert main([*arguments, out, "--force"]) == 0 and not os.path.exists(out + ".partial")


def test_progress_is_shown_on_a_terminal_only(small, monkeypatch):
    shown = []

    class Bar:
        def __init__(self, total, **options):
            shown.append([total])

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def update(self, count):
            shown[-1].append(count)

    replace_internal(monkeypatch, "progress", Bar)
    assert main(MERGE) == 0 and not shown
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    interrupted(monkeypatch, 2, [*MERGE[:-1], "new"])
    assert main([*MERGE[:-1], "new"]) == 0
    for total, *counts in shown:
        assert total == sum(map(len, files(Path("out")).values()))
    assert sum(shown[1][1:]) == total and shown[1][1] > 0
