"""Bases that hold tensors, archives or JSON of unusual kinds: merged, or refused in one line."""

import json
import os
import shutil
import warnings
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from tests.support.command_line import error, main
from tests.support.internals import INDEX


def odd_tensors():
    whole = torch.ones(6, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such kinds are in beta, or deprecated
        return {
            "meta": whole.to("meta"),
            "nested": torch.nested.nested_tensor([whole]),
            "expanded": torch.ones(1).expand(6, 4),
            "sparse": whole.to_sparse(),
            "csr": whole.to_sparse_csr(),
            "quantised": torch.quantize_per_tensor(whole, 1, 0, torch.qint8),
            "parameter": nn.Parameter(whole),
        }


@pytest.mark.parametrize(
    "kind, message",
    [
        ("meta", "is on the meta device"),
        ("nested", "is a nested tensor"),
        ("expanded", "is expanded"),
        ("sparse", "torch.sparse_coo"),
        ("csr", "torch.sparse_csr"),
        ("quantised", "torch.qint8"),
        ("parameter", "a Parameter, where only named tensors are read"),
    ],
)
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


@pytest.mark.parametrize(
    "change, message",
    [
        (twice, "has two members of one name"),
        (compressed, "is compressed"),
        (two_folders, "has two members"),
    ],
)
def test_archives_that_lie(small, change, message, capsys):
    rewrite(change)
    assert main(["merge", "odd.pth", "t.safetensors", "-o", "out.pth"]) == 2
    assert f"'odd.pth' is damaged or holds more than tensors: its archive {message}" in error(
        capsys
    )


def test_code_is_not_recommended(small, capsys):
    torch.save({"a": nn.Linear(2, 2)}, "code.pth")
    assert main(["merge", "code.pth", "t.safetensors", "-o", "out.pth"]) == 2
    assert error(capsys).endswith(
        "more than tensors: torch.load with weights_only=True does not let it in."
    )


@pytest.mark.parametrize("shape", [(0,), (4, 0), (0, 4), (3, 0, 2)])
def test_empty_tensors_are_cast(small, shape):
    state = {**small, "empty": torch.empty(shape)}
    safetensors.torch.save_file(state, "e.safetensors")
    torch.save(state, "e.pth")
    for name, load in (("e.safetensors", safetensors.torch.load_file), ("e.pth", torch.load)):
        assert (
            main(["merge", name, "a.safetensors", "-o", "out" + name, "--dtype", "bfloat16"]) == 0
        )
        assert (load("out" + name)["empty"].shape, load("out" + name)["empty"].dtype) == (
            shape,
            torch.bfloat16,
        )


@pytest.mark.parametrize(
    "depth, message",
    [
        (100_000, "is not JSON"),
        (900, "nested more than 100 deep"),
        (101, "nested more than 100 deep"),
        (100, None),
    ],
)
@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_json_that_is_nested_deep(small, depth, message, file, capsys):
    path = Path("base", file)
    text = '{"a":' * (depth - 1) + "{}" + "}" * (depth - 1)
    path.write_text(
        path.read_text().rstrip()[:-1] + f', "deep": {text}' + "}"
        if depth == 100_000
        else path.read_text().rstrip()[:-1] + f', "deep": {text[5:-1]}' + "}"
    )
    assert main(["merge", "base", "a.safetensors", "-o", "out", "--dtype", "bfloat16"]) == (
        2 if message else 0
    )
    if message:
        line = error(capsys)
        assert f"'{path}' is not JSON" in line and message in line and not os.path.exists("out")


@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_json_that_cannot_be_written_again(small, file, capsys):
    path = Path("base", file)
    path.write_text(path.read_text().rstrip()[:-1] + r', "name": "\ud800"}')
    assert main(["merge", "base", "a.safetensors", "-o", "out", "--dtype", "bfloat16"]) == 2
    assert f"'{path}' is not JSON that can be read: 'utf-8' codec can't encode" in error(capsys)


@pytest.mark.parametrize(
    "config",
    [
        {"tie_word_embeddings": "yes"},
        {"tie_word_embeddings": [1]},
        {"tie_word_embeddings": None, "vocab_size": [3]},
        {"vocab_size": {"a": 1}},
        {"vocab_size": True, "dtype": [3]},
        {"text_config": {"vocab_size": "6"}},
    ],
)
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
    assert "'base/model-00001-of-00002.safetensors' is not a file" in error(capsys)


def test_a_base_in_a_checkpoint_of_a_training_run(small, capsys):
    torch.save({"epoch": 3, "model": small}, "run.pth")
    assert main(["merge", "run.pth", "a.safetensors", "-o", "out.pth"]) == 2
    message = (
        "'run.pth' holds tensors under 'model': save that part by itself, "
        "torch.save(content['model'], ...)."
    )
    assert message in error(capsys) and not os.path.exists("out.pth")
