"""Arguments and paths that are wrong: exit code 2 and one line on stderr, never a traceback."""

import os
from pathlib import Path

import pytest

from tests.support.checkpoints import files
from tests.support.command_line import error, main

THREADS = "is not a whole number from 1 to 1024"
WRONG_ARGUMENTS = {
    "": "lorafx: the following arguments are required: COMMAND; 'lorafx --help' has examples.",
    "fold a": "lorafx: argument COMMAND: invalid choice: 'fold' (choose from ",
    "merge":
        "lorafx merge: the following arguments are required: BASE, -o/--output; "
        "'lorafx merge --help' has",
    "merge base a.safetensors -o out --frob":
        "lorafx merge: unrecognized arguments: --frob; 'lorafx merge --help'",
    "merge base a.safetensors -o out --dtype x":
        "lorafx merge: argument --dtype: invalid choice: 'x' (choose from ",
    "merge base a.safetensors -o out --threads x":
        f"argument --threads: 'x' {THREADS}; 'lorafx merge --help' has",
    "merge base a.safetensors -o out --threads 0": THREADS,
    "merge base a.safetensors -o out --threads 1000000": THREADS,
    "merge base a.safetensors -o out --threads 100000000000000000000": THREADS,
    "merge base --adapter =1 -o out": "argument --adapter: '' is not a path",
    "diff a.safetensors a.safetensors --tolerance nan":
        "argument --tolerance: 'nan' is not a finite number of at least 0",
    "diff a.safetensors a.safetensors --tolerance -1":
        "argument --tolerance: '-1' is not a finite number of at least 0",
    "diff a.safetensors a.safetensors --tolerance inf":
        "argument --tolerance: 'inf' is not a finite number of at least 0",
    "show a.safetensors b c": "lorafx show: unrecognized arguments: c",
}


@pytest.mark.parametrize("arguments", WRONG_ARGUMENTS)
def test_arguments(small, arguments, capsys):
    before = files(Path())
    assert main(arguments.split()) == 2
    assert WRONG_ARGUMENTS[arguments] in error(capsys) and files(Path()) == before


PATHS = {
    "loop.safetensors": "cannot be reached: Too many levels of symbolic links",
    "pipe.safetensors": "is neither a file nor a folder",
    "device.pth": "is neither a file nor a folder",
    "a\0b.safetensors": "'a\\x00b.safetensors' cannot be reached: embedded null byte",
    "\ud800.safetensors": "'\\ud800.safetensors' cannot be reached: 'utf-8' codec",
    "a" * 300 + ".safetensors": "cannot be reached: File name too long",
    "": "'' is not a path",
}
USES = (
    "show {}", "convert {} new.safetensors", "convert a.safetensors {} --force",
    "diff a.safetensors {}", "merge {} a.safetensors -o out", "merge base {} -o out",
    "merge base --adapter {}=0.5 -o out", "merge base a.safetensors -o {} --force"
)


@pytest.mark.parametrize("path", PATHS)
def test_paths(small, path, capsys):
    os.symlink("loop.safetensors", "loop.safetensors")
    os.symlink("/dev/zero", "device.pth")
    os.mkfifo("pipe.safetensors")
    names = sorted(os.listdir())
    for use in USES:
        assert main([part.replace("{}", path) for part in use.split()]) == 2, use
        assert PATHS[path] in error(capsys) and sorted(os.listdir()) == names


def test_a_line_break_in_a_name_breaks_no_line(small, capsys):
    assert main(["show", "no\nfile.safetensors"]) == 2
    assert error(capsys) == "lorafx show: There is no file 'no\\nfile.safetensors'."
