"""What ends a command from outside: a closed output, a full disk, Ctrl-C, no memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import lorafx
from tests.support.command_line import INTERRUPTED, error, main
from tests.support.internals import replace_internal


def run(*arguments, **more):
    env = os.environ | {"PYTHONPATH": str(Path(lorafx.__file__).parents[1])} | more.pop("env", {})
    return subprocess.run(
        [sys.executable, *arguments], text=True, env=env, stderr=subprocess.PIPE, **more
    )


def test_output_that_nobody_reads(small):
    reader, writer = os.pipe()
    os.close(reader)
    for arguments, buffered in (
        (["show", "a.safetensors"], ""),
        (["--help"], ""),
        (["--help"], "1"),
    ):
        done = run("-m", "lorafx", *arguments, stdout=writer, env={"PYTHONUNBUFFERED": buffered})
        assert (done.returncode, done.stderr) == (141, "")
    os.close(writer)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no full device")
def test_output_that_finds_no_room(small):
    with open("/dev/full", "w") as full:
        for arguments, name, buffered in (
            (["show", "a.safetensors"], "lorafx show", ""),
            (["--help"], "lorafx", "1"),
        ):
            done = run("-m", "lorafx", *arguments, stdout=full, env={"PYTHONUNBUFFERED": buffered})
            assert done.returncode == 2
            assert (
                done.stderr == f"{name}: the output cannot be written: No space left on device.\n"
            )


def test_letters_that_the_output_lacks(tmp_path):
    model = lorafx.inject(nn.ModuleDict({"größe": nn.Linear(4, 4)}), targets="größe", adapter="été")
    lorafx.save(model, tmp_path / "a.safetensors")
    path = str(tmp_path / "a.safetensors")
    done = run(
        "-m", "lorafx", "show", path, stdout=subprocess.PIPE, env={"PYTHONIOENCODING": "ascii"}
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "adapter '\\xe9t\\xe9' (lorafx)" in done.stdout and "gr\\xf6\\xdfe" in done.stdout


def test_interrupted_while_it_runs(small, tmp_path):
    """Ctrl-C gives no traceback."""
    Path("lorafx").write_text(INTERRUPTED)
    done = run("lorafx", "show", "a.safetensors")
    assert (done.returncode, done.stderr) == (130, "lorafx show: interrupted.\n")


@pytest.mark.parametrize(
    "arguments, closed, code",
    [
        ("show a.safetensors", ">&-", 0),
        ("--version", ">&- 2>&-", 0),
        ("show none.safetensors", "2>&-", 2),
        ("merge base.pth a.safetensors -o out.pth", "2>&-", 0),
    ],
)
def test_without_an_output(small, arguments, closed, code):
    done = subprocess.run(
        f"{sys.executable} -m lorafx {arguments} {closed}", shell=True, capture_output=True,
        text=True, env=os.environ | {"PYTHONPATH": str(Path(lorafx.__file__).parents[1])}
    )
    assert (done.returncode, done.stderr) == (code, "") and (code == 0 or not done.stdout)


def test_no_memory(small, monkeypatch, capsys):
    def fail(*arguments):
        raise MemoryError

    replace_internal(monkeypatch, "read_adapter", fail)
    assert main(["show", "a.safetensors"]) == 2
    assert error(capsys) == "lorafx show: there is not enough memory."


def test_only_the_merge_of_a_folder_goes_on(small, monkeypatch, capsys):
    def stop(*arguments, **more):
        raise KeyboardInterrupt

    replace_internal(monkeypatch, "merge", stop)
    assert main(["merge", "base", "a.safetensors", "-o", "out"]) == 130
    assert error(capsys) == "lorafx merge: interrupted; the same command goes on."
    assert main(["merge", "base.pth", "a.safetensors", "-o", "out.pth"]) == 130
    assert error(capsys) == "lorafx merge: interrupted."
    replace_internal(monkeypatch, "read_adapter", stop)
    assert main(["diff", "a.safetensors", "a.safetensors"]) == 130
    assert error(capsys) == "lorafx diff: interrupted."
    replace_internal(monkeypatch, "parse", stop)
    assert main(["show", "a.safetensors"]) == 130
    assert error(capsys) == "lorafx: interrupted."
