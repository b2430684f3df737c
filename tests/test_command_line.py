"""The command line: a sentence and an exit code for every mistake, and what the commands print."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from oracle import randomise
from stream_files import error, files, same, small_files
from torch import nn

import lorafx
from lorafx import _checkpoint, _formats, _output
from lorafx.__main__ import main
from lorafx._adapter import Adapter, LoRAConfig, Pair


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return small_files(tmp_path)


BAD_PATHS = {
    "base a.safetensors -o base": "'base' is 'base' itself or in it",
    "base a.safetensors -o base/new": "'base/new' is 'base' itself or in it",
    "base a.safetensors -o . --force": "'.' is there already and is no folder with a checkpoint",
    "base a.safetensors -o a.safetensors --force": "is there already and is no folder with a checkpoint",
    "base.safetensors a.safetensors -o base.safetensors --force": "itself or in it",
    "base.safetensors a.safetensors -o a.safetensors --force": "'a.safetensors' is 'a.safetensors' or in it",
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
    "base/sub a.safetensors -o out": "holds neither model.safetensors.index.json nor model.safetensors",
    "base/config.json a.safetensors -o out": "is no checkpoint by its ending",
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
    "other shapes": (lambda s: s.update({"0.weight": torch.ones(6, 5)}), "do not fit the tensor (6, 5)"),
    "the other way": (lambda s: s.update({"0.weight": torch.ones(4, 6)}), "do not fit the tensor (4, 6)"),
    "no tensor": (lambda s: s.update({"0_weight": s.pop("0.weight")}), "has '0', but 'base.safetensors' has no such"),
    "integers": (lambda s: s.update({"0.weight": torch.ones(6, 4, dtype=torch.int8)}), "stored as torch.int8"),
    "two ways": (lambda s: s.update({p + n: s.pop(n) if p == "model." else s[n].clone() for p in ("module.", "model.")
                                     for n in list(s) if n[0] in "01"}), "in several ways"),
    "trained of another shape": (lambda s: s.update({"1.bias": torch.ones(2)}), "has it as (2,)"),
}


@pytest.mark.parametrize("case", BAD_BASES)
def test_a_base_that_the_adapter_does_not_fit(small, case, capsys):
    change, message = BAD_BASES[case]
    other(change)
    assert main(["merge", "base.safetensors", "h.safetensors", "-o", "out.safetensors"]) == 2
    assert message in error(capsys) and not [path for path in os.listdir() if path.startswith("out")]


BAD_FILES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "empty": lambda path: path.write_bytes(b""),
    "a header that lies": lambda path: path.write_bytes(path.read_bytes().replace(b"[6,4]", b"[9,4]")),
    "a tensor twice": lambda path: path.write_bytes(path.read_bytes().replace(b'"1.bias"', b'"0.bias"')),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_damaged_bases(small, case, capsys):
    shutil.copy("base.safetensors", "base/model.safetensors")
    os.remove("base/model.safetensors.index.json")
    BAD_FILES[case](Path("base/model.safetensors"))
    assert main(["merge", "base", "a.safetensors", "-o", "out"]) == 2
    assert "is damaged or no safetensors file" in error(capsys) and not os.path.exists("out")


@pytest.mark.parametrize("place, message", [
    ("../base.safetensors", "which is no file in its folder"), ("/etc/passwd", "which is no file in its folder"),
    ("none.safetensors", "none.safetensors"), ("model-00001-of-00002.safetensors", "the index is of other shards")])
def test_indices_that_lie(small, place, message, capsys):
    index = Path("base", _checkpoint.INDEX)
    content = json.loads(index.read_text())
    content["weight_map"]["0.weight"] = content["weight_map"]["1.weight"] = place
    index.write_text(json.dumps(content))
    assert main(["merge", "base", "a.safetensors", "-o", "out"]) == 2
    assert message in error(capsys)


def test_bases_of_torch_save_that_hold_more(small, capsys):
    for content, message in (({"model": small}, "holds 'model', a dict"), ([small], "holds a list"),
                             ({"a": Path("x")}, "holds more than tensors")):
        torch.save(content, "more.pth")
        assert main(["merge", "more.pth", "a.safetensors", "-o", "out.pth"]) == 2
        assert message in error(capsys)


def test_no_room(small, monkeypatch, capsys):
    monkeypatch.setattr(_output.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
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
    assert files(Path("out")) == whole and not [path for path in os.listdir() if path.startswith(".")]
    assert main(["merge", "base.pth", "a.safetensors", "-o", "base2.pth"]) == 0
    assert main(["merge", "base.pth", "t.safetensors", "-o", "base2.pth", "--force"]) == 0
    assert not torch.equal(torch.load("base2.pth")["0.weight"], small["0.weight"])
    assert torch.equal(torch.load("base2.pth")["1.weight"], small["1.weight"])


# The other commands.

def test_show(small, capsys):
    assert main(["show", "h.safetensors", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    tensors = safetensors.torch.load_file("h.safetensors")
    delta = tensors["0.lora.B"] @ tensors["0.lora.A"]
    assert about["sites"]["0"]["norm"] == pytest.approx(delta.norm().item(), rel=1e-5)
    assert (about["name"], about["format"], about["sites"]["0"]["rank"]) == ("h", "lorafx", 2)
    assert set(about["trained"]) == {"1.weight", "1.bias"}
    assert main(["show", "h.safetensors"]) == 0
    shown = capsys.readouterr().out
    assert "adapter 'h' (lorafx), 1 site and 2 tensors trained whole, 41 parameters, 164 B" in shown


def test_convert_and_diff(small, capsys):
    assert main(["convert", "a.safetensors", "a.pth"]) == 0
    assert main(["convert", "a.safetensors", "a.pth"]) == 2 and "there already" in error(capsys)
    assert main(["convert", "h.safetensors", "h.pth"]) == 2 and "the trained '1.weight'" in error(capsys)
    assert main(["convert", "a.safetensors", "copy.safetensors"]) == 0
    first, second = (safetensors.safe_open(f"{name}.safetensors", "pt") for name in ("copy", "a"))
    assert first.metadata() == second.metadata()
    assert main(["diff", "a.safetensors", "copy.safetensors"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 of 2 common weights equal"
    assert main(["diff", "a.safetensors", "t.safetensors"]) == 1
    assert "only in a.safetensors: 1\n" in capsys.readouterr().out
    assert main(["diff", "a.safetensors", "a.pth", "--json"]) == 1
    found, tensors = json.loads(capsys.readouterr().out), safetensors.torch.load_file("a.safetensors")
    B, A = (tensors[f"0.lora.{factor}"].double() for factor in "BA")
    delta = B @ A
    assert found["sites"]["0"] == pytest.approx(((B.half().double() @ A.half().double() - delta).norm() / delta.norm())
                                                .item(), rel=1e-6)
    assert found["config"]["name"] == ["a", "default"] and not found["equal"]
    assert main(["diff", "a.safetensors", "none.safetensors"]) == 2


def pair_file(path, B, A, scale=1.0, name="default", trained=None, **config):
    """An adapter of one site, '0'."""
    pairs = {"0": Pair(A, B, scale)}
    config = LoRAConfig(rank=A.shape[0], targets=["0"], trainable=list(trained or ()), **config)
    _formats.write(Adapter(name, config, pairs, trained or {}), path, None, None)


@pytest.mark.parametrize("alpha", [8, 3, 0.1])
def test_a_file_is_as_its_conversion(small, alpha, capsys):
    """What says nothing of the weights is noted: the name, the base, an alpha that is folded into B."""
    model = lorafx.inject(nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 64)), rank=4, alpha=alpha, dropout=0.1,
                          targets="linear", adapter="french")
    lorafx.save(randomise(model), "french.safetensors")
    assert main(["convert", "french.safetensors", "french.pth"]) == 0
    capsys.readouterr()
    assert main(["diff", "french.safetensors", "french.pth", "--tolerance", "1e-3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "note: name is 'french' in french.safetensors, 'default' in french.pth" in lines
    assert f"note: alpha is {alpha} in french.safetensors, None in french.pth" in lines
    assert lines[-1] == "2 of 2 common weights equal to a relative 0.001"
    assert main(["diff", "french.safetensors", "french.pth", "--tolerance", "1e-3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["equal"] and found["config"]["dropout"] == [0.1, 0.0]
    assert main(["diff", "french.safetensors", "french.pth"]) == 1
    assert main(["convert", "french.pth", "again.safetensors"]) == 0
    assert main(["diff", "french.pth", "again.safetensors"]) == 0


def test_no_difference_is_too_small(tmp_path, monkeypatch):
    """At tolerance 0 the same numbers s B and A are equal, and nothing else, however close."""
    monkeypatch.chdir(tmp_path)
    B, A = torch.randn(6, 2, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    pair_file("a.safetensors", B, A, scale=2.0)
    pair_file("folded.safetensors", 2 * B, A, name="other", alpha=2)
    assert main(["diff", "a.safetensors", "folded.safetensors"]) == 0
    for i in range(B.numel()):
        near = B.clone()
        near.view(-1)[i] = torch.nextafter(near.view(-1)[i], torch.tensor(9.0, dtype=torch.float64))
        pair_file("near.safetensors", near, A, scale=2.0)
        assert main(["diff", "a.safetensors", "near.safetensors"]) == 1
        assert main(["diff", "a.safetensors", "near.safetensors", "--tolerance", "1e-12"]) == 0
    tiny = torch.full((3,), 1e-200, dtype=torch.float64)
    pair_file("t.safetensors", B, A, trained={"1.bias": torch.cat([torch.ones(1), tiny])})
    pair_file("u.safetensors", B, A, trained={"1.bias": torch.cat([torch.ones(1), 2 * tiny])})
    assert main(["diff", "t.safetensors", "t.safetensors"]) == 0
    assert main(["diff", "t.safetensors", "u.safetensors"]) == 1
    pair_file("zero.safetensors", 0 * B, A)
    pair_file("zeros.safetensors", 0 * B, A + 1)
    assert main(["diff", "zero.safetensors", "zeros.safetensors"]) == 0
    assert main(["diff", "zero.safetensors", "a.safetensors", "--tolerance", "9"]) == 1


def test_what_json_lacks_is_null(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    large = torch.full((4, 2), 1e300, dtype=torch.float64)
    pair_file("large.safetensors", large, large.T, trained={"1.bias": large[0].clone()})
    pair_file("wide.safetensors", torch.ones(5, 2), torch.ones(2, 4), trained={"1.bias": torch.ones(3)})

    def read(*arguments):
        main([*arguments, "--json"])
        return json.loads(capsys.readouterr().out, parse_constant=pytest.fail)

    about = read("show", "large.safetensors")
    assert about["sites"]["0"]["norm"] is about["trained"]["1.bias"]["norm"] is None
    found = read("diff", "large.safetensors", "wide.safetensors")
    assert found["sites"] == {"0": None} and found["trained"] == {"1.bias": None} and not found["equal"]
    assert read("diff", "large.safetensors", "large.safetensors")["equal"]


def test_converting_what_is_being_trained(small, capsys):
    """Only .safetensors keeps the state of a training run; where it is left out, a line says so."""
    model = lorafx.inject(nn.Sequential(nn.Linear(4, 6)), rank=2, targets="linear", adapter="run")
    optimizer = torch.optim.AdamW(lorafx.parameters(model))
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    lorafx.save(model, "run.safetensors", optimizer=optimizer, step=3)
    assert main(["convert", "run.safetensors", "run.pth"]) == 0
    assert capsys.readouterr().out == ("run.pth: adapter 'run' (MiniMind), 1 site; the optimizer and step of its "
                                       "training are left out, as that format keeps none\n")
    assert main(["convert", "run.safetensors", "copy.safetensors"]) == 0
    assert capsys.readouterr().out == "copy.safetensors: adapter 'run' (lorafx), 1 site\n"
    first, second = (safetensors.safe_open(f"{name}.safetensors", "pt") for name in ("copy", "run"))
    assert first.metadata() == second.metadata() and '"training"' in first.metadata()["adapter"]
    assert same(*(safetensors.torch.load_file(f"{name}.safetensors") for name in ("copy", "run")))
    assert main(["diff", "run.safetensors", "run.pth", "--tolerance", "1e-3"]) == 0


def test_a_folder_of_several_adapters(tmp_path, monkeypatch, capsys):
    """Each is named by its own folder, and the error says so."""
    monkeypatch.chdir(tmp_path)
    model = lorafx.inject(nn.Sequential(nn.Linear(4, 6)), rank=2, targets="linear", adapter="french")
    lorafx.add(model, "german", rank=3)
    for name in ("french", "german"):
        lorafx.save(randomise(model), "both", name)
    for command in (["show"], ["convert", "new.safetensors"], ["diff", "both/french"]):
        assert main([command[0], "both", *command[1:]]) == 2
        assert error(capsys) == (f"lorafx {command[0]}: 'both' has 'french', 'german': name one with adapter=..., or "
                                 "by its own folder, such as 'both/french'.")
    assert main(["show", "both/german"]) == 0 and "0     3     1" in capsys.readouterr().out
    assert main(["convert", "both/german", "german.safetensors"]) == 0
    assert main(["diff", "both/german", "german.safetensors"]) == 0 == main(["show", "german.safetensors"])
    assert main(["diff", "both/german", "both/french"]) == 1


def test_ranks_beyond_the_matrix_and_matrices_without_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    B, A = torch.randn(3, 5000), torch.randn(5000, 4)
    pair_file("large.safetensors", B, A)
    pair_file("empty.safetensors", torch.ones(0, 2), torch.ones(2, 4))
    assert main(["show", "large.safetensors", "--json"]) == 0
    norm = json.loads(capsys.readouterr().out)["sites"]["0"]["norm"]
    assert norm == pytest.approx((B.double() @ A.double()).norm().item(), rel=1e-9)
    assert main(["show", "empty.safetensors"]) == 0 and "0 x 2  float32  0\n" in capsys.readouterr().out
    assert main(["diff", "empty.safetensors", "empty.safetensors"]) == 0
    assert main(["diff", "empty.safetensors", "large.safetensors"]) == 1


def test_as_a_program(small):
    def run(*arguments):
        env = os.environ | {"PYTHONPATH": str(Path(lorafx.__file__).parents[1])}
        return subprocess.run([sys.executable, "-m", "lorafx", *arguments], capture_output=True, text=True, env=env)

    done = run("merge", "base", "a.safetensors", "-o", "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("out: 2 of 4 tensors changed; 5 files, ")
    done = run("merge", "base", "a.safetensors", "-o", "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ("lorafx merge: 'out' is there already: choose another path, or replace it with --force.\n")


def test_help(capsys):
    for command in ("merge", "show", "convert", "diff"):
        assert main([command, "--help"]) == 0 and f"examples:\n  lorafx {command} " in capsys.readouterr().out
    assert main(["--help"]) == 0 and "examples:\n  lorafx merge " in capsys.readouterr().out
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"lorafx {lorafx.__version__}\n"
