"""What the merge of a checkpoint refuses before anything is written, and what --force replaces."""

import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.support.checkpoints import files
from tests.support.command_line import error, main
from tests.support.internals import INDEX

BAD_PATHS = {
    "base a.safetensors -o base": "'base' is 'base' itself or in it",
    "base a.safetensors -o base/new": "'base/new' is 'base' itself or in it",
    "base a.safetensors -o . --force": "'.' is there already and is not a folder with a checkpoint",
    "base a.safetensors -o a.safetensors --force":
        "is there already and is not a folder with a checkpoint",
    "base.safetensors a.safetensors -o base.safetensors --force": "itself or in it",
    "base.safetensors a.safetensors -o a.safetensors --force":
        "'a.safetensors' is 'a.safetensors' or in it",
    "base.safetensors a.safetensors -o t.safetensors": "'t.safetensors' is there already",
    "base.safetensors a.safetensors -o out.pth": "end 'out.pth' in .safetensors",
    "base.pth a.safetensors -o base": "end 'base' in .pth or .pt",
    "base.txt a.safetensors -o out.txt": "There is no checkpoint 'base.txt'",
    "base none.safetensors -o out": "There is no file 'none.safetensors'",
    "base -o out": "there is no adapter to fold",
    "base a.safetensors --adapter ./a.safetensors=2 -o out": "is given more than once",
    "base --adapter a.safetensors=inf -o out": "must be a finite number, not inf",
    "base --adapter h.safetensors=0.5 -o out": "which cannot be weighed by 0.5",
    "base h.safetensors --adapter i.safetensors -o out": "both train '1.weight' whole",
    "base/sub a.safetensors -o out":
        "holds neither model.safetensors.index.json nor model.safetensors",
    "base/config.json a.safetensors -o out": "is not a checkpoint by its ending",
}


@pytest.mark.parametrize("arguments", BAD_PATHS)
def test_refused_before_anything_is_written(small, arguments, capsys):
    before = files(Path())
    assert main(["merge", *arguments.split()]) == 2
    assert BAD_PATHS[arguments] in error(capsys) and files(Path()) == before


def other(change, name="base.safetensors"):
    state = safetensors.torch.load_file("base.safetensors")
    change(state)
    safetensors.torch.save_file(state, name)


BAD_BASES = {
    "other shapes": (
        lambda s: s.update({"0.weight": torch.ones(6, 5)}), "do not fit the tensor (6, 5)"
    ),
    "the other way": (
        lambda s: s.update({"0.weight": torch.ones(4, 6)}), "do not fit the tensor (4, 6)"
    ),
    "no tensor": (
        lambda s: s.update({"0_weight": s.pop("0.weight")}),
        "has '0', but 'base.safetensors' has no such"
    ),
    "integers": (
        lambda s: s.update({"0.weight": torch.ones(6, 4, dtype=torch.int8)}), "stored as torch.int8"
    ),
    "float8": (
        lambda s: s.update({"0.weight": torch.ones(6, 4).to(torch.float8_e4m3fn)}),
        "is stored as a type that is only carried along, such as float8, in which there is no W + s"
    ),
    "two ways": (
        lambda s: s.update(
            {
                p + n: s.pop(n) if p == "model." else s[n].clone()
                for p in ("module.", "model.") for n in list(s) if n[0] in "01"
            }
        ),
        "in several ways"
    ),
    "trained of another shape": (lambda s: s.update({"1.bias": torch.ones(2)}), "has it as (2,)"),
}


@pytest.mark.parametrize("case", BAD_BASES)
def test_a_base_that_the_adapter_does_not_fit(small, case, capsys):
    change, message = BAD_BASES[case]
    other(change)
    assert main(["merge", "base.safetensors", "h.safetensors", "-o", "out.safetensors"]) == 2
    assert message in error(capsys)
    assert not [path for path in os.listdir() if path.startswith("out")]


BAD_FILES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "empty": lambda path: path.write_bytes(b""),
    "a header that lies": lambda path: path.write_bytes(
        path.read_bytes().replace(b"[6,4]", b"[9,4]")
    ),
    "a tensor twice": lambda path: path.write_bytes(
        path.read_bytes().replace(b'"1.bias"', b'"0.bias"')
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_damaged_bases(small, case, capsys):
    shutil.copy("base.safetensors", "base/model.safetensors")
    os.remove("base/model.safetensors.index.json")
    BAD_FILES[case](Path("base/model.safetensors"))
    assert main(["merge", "base", "a.safetensors", "-o", "out"]) == 2
    assert "is damaged or not a safetensors file" in error(capsys) and not os.path.exists("out")


@pytest.mark.parametrize(
    "place, message",
    [
        ("../base.safetensors", "which is not a file in its folder"),
        ("/etc/passwd", "which is not a file in its folder"),
        ("none.safetensors", "none.safetensors"),
        ("model-00001-of-00002.safetensors", "the index is of other shards"),
    ],
)
def test_indices_that_lie(small, place, message, capsys):
    index = Path("base", INDEX)
    content = json.loads(index.read_text())
    content["weight_map"]["0.weight"] = content["weight_map"]["1.weight"] = place
    index.write_text(json.dumps(content))
    assert main(["merge", "base", "a.safetensors", "-o", "out"]) == 2
    assert message in error(capsys)


def test_bases_of_torch_save_that_hold_more(small, capsys):
    for content, message in (
        ({"model": small}, "holds tensors under 'model': save that part by itself"),
        ({**small, "model": {"epoch": 3}}, "holds 'model', a dict, where only named tensors"),
        ([small], "holds a list"),
        ({"a": Path("x")}, "holds more than tensors"),
    ):
        torch.save(content, "more.pth")
        assert main(["merge", "more.pth", "a.safetensors", "-o", "out.pth"]) == 2
        assert message in error(capsys)


def test_no_room(small, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    for base in ("base", "base.pth", "base.safetensors"):
        assert main(["merge", base, "a.safetensors", "-o", "out" + Path(base).suffix]) == 2
        assert "but only 10 are free" in error(capsys)


def test_float16_is_not_exceeded_in_silence(small, capsys):
    other(lambda state: state.update({"0.weight": torch.full((6, 4), 1e5)}), "large.safetensors")
    arguments = ["merge", "large.safetensors", "a.safetensors", "-o", "out.safetensors", "--dtype"]
    assert main([*arguments, "float16"]) == 2
    assert "'0.weight' exceeds float16's 65504" in error(capsys)
    assert main([*arguments, "bfloat16"]) == 0


def test_force_replaces(small):
    assert main(["merge", "base", "a.safetensors", "-o", "out"]) == 0
    whole = files(Path("out"))
    Path("out/rest").write_text("of before")
    assert main(["merge", "base", "a.safetensors", "-o", "out", "--force"]) == 0
    assert files(Path("out")) == whole
    assert not [path for path in os.listdir() if path.startswith(".")]
    assert main(["merge", "base.pth", "a.safetensors", "-o", "base2.pth"]) == 0
    assert main(["merge", "base.pth", "t.safetensors", "-o", "base2.pth", "--force"]) == 0
    assert not torch.equal(torch.load("base2.pth")["0.weight"], small["0.weight"])
    assert torch.equal(torch.load("base2.pth")["1.weight"], small["1.weight"])
