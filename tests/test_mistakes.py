"""The command line, misused: exit code 2 and one line on stderr, never a traceback; and what ends it from outside."""

import json
import os
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from stream_files import error, files, small_files
from torch import nn

import lorafx
from lorafx import __main__ as program
from lorafx import _checkpoint
from lorafx.__main__ import main


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return small_files(tmp_path)


THREADS = "is no whole number from 1 to 1024"
MISTAKES = {
    "": "lorafx: the following arguments are required: COMMAND; 'lorafx --help' has examples.",
    "fold a": "lorafx: argument COMMAND: invalid choice: 'fold' (choose from ",
    "merge": "lorafx merge: the following arguments are required: BASE, -o/--output; 'lorafx merge --help' has",
    "merge base a.safetensors -o out --frob": "lorafx merge: unrecognized arguments: --frob; 'lorafx merge --help'",
    "merge base a.safetensors -o out --dtype x": "lorafx merge: argument --dtype: invalid choice: 'x' (choose from ",
    "merge base a.safetensors -o out --threads x": f"argument --threads: 'x' {THREADS}; 'lorafx merge --help' has",
    "merge base a.safetensors -o out --threads 0": THREADS,
    "merge base a.safetensors -o out --threads 1000000": THREADS,
    "merge base a.safetensors -o out --threads 100000000000000000000": THREADS,
    "merge base --adapter =1 -o out": "argument --adapter: '' is no path",
    "diff a.safetensors a.safetensors --tolerance nan": "argument --tolerance: 'nan' is no finite number of at least 0",
    "diff a.safetensors a.safetensors --tolerance -1": "argument --tolerance: '-1' is no finite number of at least 0",
    "diff a.safetensors a.safetensors --tolerance inf": "argument --tolerance: 'inf' is no finite number of at least 0",
    "show a.safetensors b": "lorafx show: unrecognized arguments: b",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_arguments(small, arguments, capsys):
    before = files(Path())
    assert main(arguments.split()) == 2
    assert MISTAKES[arguments] in error(capsys) and files(Path()) == before


PATHS = {
    "loop.safetensors": "cannot be reached: Too many levels of symbolic links",
    "pipe.safetensors": "is neither a file nor a folder",
    "device.pth": "is neither a file nor a folder",
    "a\0b.safetensors": "'a\\x00b.safetensors' cannot be reached: embedded null byte",
    "\ud800.safetensors": "'\\ud800.safetensors' cannot be reached: 'utf-8' codec",
    "a" * 300 + ".safetensors": "cannot be reached: File name too long",
    "": "'' is no path",
}
USES = ("show {}", "convert {} new.safetensors", "convert a.safetensors {} --force", "diff a.safetensors {}",
        "merge {} a.safetensors -o out", "merge base {} -o out", "merge base --adapter {}=0.5 -o out",
        "merge base a.safetensors -o {} --force")


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


# What bases hold.

def odd_tensors():
    whole = torch.ones(6, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such kinds are in beta, or deprecated
        return {"meta": whole.to("meta"), "nested": torch.nested.nested_tensor([whole]),
                "expanded": torch.ones(1).expand(6, 4), "sparse": whole.to_sparse(), "csr": whole.to_sparse_csr(),
                "quantised": torch.quantize_per_tensor(whole, 1, 0, torch.qint8), "parameter": nn.Parameter(whole)}


@pytest.mark.parametrize("kind, message", [
    ("meta", "is on the meta device"), ("nested", "is a nested tensor"), ("expanded", "is expanded"),
    ("sparse", "torch.sparse_coo"), ("csr", "torch.sparse_csr"), ("quantised", "torch.qint8"),
    ("parameter", "a Parameter, where only named tensors are read")])
@pytest.mark.parametrize("name", ["0.weight", "other"])
def test_tensors_that_are_not_plain(small, kind, message, name, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({**small, name: odd_tensors()[kind]}, "odd.pth")
    for more in ([], ["--dtype", "bfloat16"]):
        assert main(["merge", "odd.pth", "t.safetensors", "-o", "out.pth", *more]) == 2
        line = error(capsys)
        assert f"'{name}'" in line and message in line and not os.path.exists("out.pth")


def rewrite(change) -> None:
    """odd.pth, the archive base.pth with other members."""
    with zipfile.ZipFile("base.pth") as old, zipfile.ZipFile("odd.pth", "w") as new:
        change(new, {name: old.read(name) for name in old.namelist()})


def twice(archive, members):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's own, of what this is for
        for name, content in [*members.items(), *list(members.items())[-1:]]:
            archive.writestr(name, content)


def compressed(archive, members):
    for name, content in members.items():
        archive.writestr(name, content, zipfile.ZIP_DEFLATED)


def two_folders(archive, members):
    for name, content in [*members.items(), ("other/data", b"1")]:
        archive.writestr(name, content)


@pytest.mark.parametrize("change, message", [
    (twice, "has two members of one name"), (compressed, "is compressed"), (two_folders, "has two members")])
def test_archives_that_lie(small, change, message, capsys):
    rewrite(change)
    assert main(["merge", "odd.pth", "t.safetensors", "-o", "out.pth"]) == 2
    assert f"'odd.pth' is damaged or holds more than tensors: its archive {message}" in error(capsys)


def test_code_is_not_recommended(small, capsys):
    torch.save({"a": nn.Linear(2, 2)}, "code.pth")
    assert main(["merge", "code.pth", "t.safetensors", "-o", "out.pth"]) == 2
    assert error(capsys).endswith("more than tensors: torch.load with weights_only=True does not let it in.")


@pytest.mark.parametrize("shape", [(0,), (4, 0), (0, 4), (3, 0, 2)])
def test_empty_tensors_are_cast(small, shape):
    state = {**small, "empty": torch.empty(shape)}
    safetensors.torch.save_file(state, "e.safetensors")
    torch.save(state, "e.pth")
    for name, load in (("e.safetensors", safetensors.torch.load_file), ("e.pth", torch.load)):
        assert main(["merge", name, "a.safetensors", "-o", "out" + name, "--dtype", "bfloat16"]) == 0
        assert (load("out" + name)["empty"].shape, load("out" + name)["empty"].dtype) == (shape, torch.bfloat16)


@pytest.mark.parametrize("depth, message", [(100_000, "is no JSON"), (900, "nested more than 100 deep"),
                                            (101, "nested more than 100 deep"), (100, None)])
@pytest.mark.parametrize("file", ["config.json", _checkpoint.INDEX])
def test_json_that_is_nested_deep(small, depth, message, file, capsys):
    path = Path("base", file)
    text = '{"a":' * (depth - 1) + "{}" + "}" * (depth - 1)
    path.write_text(path.read_text().rstrip()[:-1] + f', "deep": {text}' + "}" if depth == 100_000 else
                    path.read_text().rstrip()[:-1] + f', "deep": {text[5:-1]}' + "}")
    assert main(["merge", "base", "a.safetensors", "-o", "out", "--dtype", "bfloat16"]) == (2 if message else 0)
    if message:
        line = error(capsys)
        assert f"'{path}' is no JSON" in line and message in line and not os.path.exists("out")


@pytest.mark.parametrize("file", ["config.json", _checkpoint.INDEX])
def test_json_that_cannot_be_written_again(small, file, capsys):
    path = Path("base", file)
    path.write_text(path.read_text().rstrip()[:-1] + r', "name": "\ud800"}')
    assert main(["merge", "base", "a.safetensors", "-o", "out", "--dtype", "bfloat16"]) == 2
    assert f"'{path}' is no JSON that can be read: 'utf-8' codec can't encode" in error(capsys)


@pytest.mark.parametrize("config", [
    {"tie_word_embeddings": "yes"}, {"tie_word_embeddings": [1]}, {"tie_word_embeddings": None, "vocab_size": [3]},
    {"vocab_size": {"a": 1}}, {"vocab_size": True, "dtype": [3]}, {"text_config": {"vocab_size": "6"}}])
def test_configs_of_odd_types(small, config, capsys):
    Path("base/config.json").write_text(json.dumps(config))
    for more in ([], ["--untie", "--dtype", "bfloat16"]):
        shutil.rmtree("out", ignore_errors=True)
        code = main(["merge", "base", "a.safetensors", "-o", "out", *more])
        assert code in (0, 2) and Path("out").is_dir() == (code == 0)
        if code:
            error(capsys)


def test_a_shard_that_is_a_pipe(small, capsys):
    os.remove("base/model-00001-of-00002.safetensors")
    os.mkfifo("base/model-00001-of-00002.safetensors")
    assert main(["merge", "base", "a.safetensors", "-o", "out"]) == 2
    assert "'base/model-00001-of-00002.safetensors' is no file" in error(capsys)


# What ends a command from outside.

def run(*arguments, **more):
    env = os.environ | {"PYTHONPATH": str(Path(lorafx.__file__).parents[1])} | more.pop("env", {})
    return subprocess.run([sys.executable, *arguments], text=True, env=env, stderr=subprocess.PIPE, **more)


def test_output_that_nobody_reads(small):
    reader, writer = os.pipe()
    os.close(reader)
    for arguments, buffered in ((["show", "a.safetensors"], ""), (["--help"], ""), (["--help"], "1")):
        done = run("-m", "lorafx", *arguments, stdout=writer, env={"PYTHONUNBUFFERED": buffered})
        assert (done.returncode, done.stderr) == (141, "")
    os.close(writer)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no full device")
def test_output_that_finds_no_room(small):
    with open("/dev/full", "w") as full:
        for arguments, name, buffered in ((["show", "a.safetensors"], "lorafx show", ""), (["--help"], "lorafx", "1")):
            done = run("-m", "lorafx", *arguments, stdout=full, env={"PYTHONUNBUFFERED": buffered})
            assert done.returncode == 2
            assert done.stderr == f"{name}: the output cannot be written: No space left on device.\n"


def test_letters_that_the_output_lacks(tmp_path):
    model = lorafx.inject(nn.ModuleDict({"größe": nn.Linear(4, 4)}), targets="größe", adapter="été")
    lorafx.save(model, tmp_path / "a.safetensors")
    path = str(tmp_path / "a.safetensors")
    done = run("-m", "lorafx", "show", path, stdout=subprocess.PIPE, env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "adapter '\\xe9t\\xe9' (lorafx)" in done.stdout and "gr\\xf6\\xdfe" in done.stdout


def test_interrupted_while_it_runs(small, tmp_path):
    """Ctrl-C gives no traceback."""
    Path("lorafx").write_text("""if True:
        import os, signal, time
        from lorafx import _arguments, __main__ as program
        signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
        def show(options):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(9)
        program._COMMANDS["show"] = show
        raise SystemExit(program.main())""")
    done = run("lorafx", "show", "a.safetensors")
    assert (done.returncode, done.stderr) == (130, "lorafx show: interrupted.\n")


@pytest.mark.parametrize("arguments, closed, code", [
    ("show a.safetensors", ">&-", 0), ("--version", ">&- 2>&-", 0), ("show none.safetensors", "2>&-", 2),
    ("merge base.pth a.safetensors -o out.pth", "2>&-", 0)])
def test_without_an_output(small, arguments, closed, code):
    done = subprocess.run(f"{sys.executable} -m lorafx {arguments} {closed}", shell=True, capture_output=True,
                          text=True, env=os.environ | {"PYTHONPATH": str(Path(lorafx.__file__).parents[1])})
    assert (done.returncode, done.stderr) == (code, "") and (code == 0 or not done.stdout)


def test_no_memory(small, monkeypatch, capsys):
    def fail(*arguments):
        raise MemoryError

    monkeypatch.setattr(program._formats, "read", fail)
    assert main(["show", "a.safetensors"]) == 2
    assert error(capsys) == "lorafx show: there is not enough memory."


def test_only_the_merge_of_a_folder_goes_on(small, monkeypatch, capsys):
    def stop(*arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "merge", stop)
    assert main(["merge", "base", "a.safetensors", "-o", "out"]) == 130
    assert error(capsys) == "lorafx merge: interrupted; the same command goes on."
    assert main(["merge", "base.pth", "a.safetensors", "-o", "out.pth"]) == 130
    assert error(capsys) == "lorafx merge: interrupted."
    monkeypatch.setattr(program._formats, "read", stop)
    assert main(["diff", "a.safetensors", "a.safetensors"]) == 130
    assert error(capsys) == "lorafx diff: interrupted."
    monkeypatch.setattr(program, "parse", stop)
    assert main(["show", "a.safetensors"]) == 130
    assert error(capsys) == "lorafx: interrupted."
