"""What show, convert and diff print, and the commands as a program."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import lorafx
from tests.support.checkpoints import same
from tests.support.command_line import error, main
from tests.support.internals import write_pair
from tests.support.oracle import randomise


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
    assert main(["convert", "h.safetensors", "h.pth"]) == 2
    assert "the trained '1.weight'" in error(capsys)
    assert main(["convert", "a.safetensors", "copy.safetensors"]) == 0
    first, second = (safetensors.safe_open(f"{name}.safetensors", "pt") for name in ("copy", "a"))
    assert first.metadata() == second.metadata()
    assert main(["diff", "a.safetensors", "copy.safetensors"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 of 2 common weights equal"
    assert main(["diff", "a.safetensors", "t.safetensors"]) == 1
    assert "only in a.safetensors: 1\n" in capsys.readouterr().out
    assert main(["diff", "a.safetensors", "a.pth", "--json"]) == 1
    found, tensors = json.loads(capsys.readouterr().out), safetensors.torch.load_file(
        "a.safetensors"
    )
    B, A = (tensors[f"0.lora.{factor}"].double() for factor in "BA")
    delta = B @ A
    assert found["sites"]["0"] == pytest.approx(
        ((B.half().double() @ A.half().double() - delta).norm() / delta.norm()).item(), rel=1e-6
    )
    assert found["config"]["name"] == ["a", "default"] and not found["equal"]
    assert main(["diff", "a.safetensors", "none.safetensors"]) == 2


@pytest.mark.parametrize("alpha", [8, 3, 0.1])
def test_a_file_is_as_its_conversion(small, alpha, capsys):
    """What says nothing of the weights is noted: the name, the base, an alpha folded into B."""
    model = lorafx.inject(
        nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 64)), rank=4, alpha=alpha, dropout=0.1,
        targets="linear", adapter="french"
    )
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
    write_pair("a.safetensors", B, A, scale=2.0)
    write_pair("folded.safetensors", 2 * B, A, name="other", alpha=2)
    assert main(["diff", "a.safetensors", "folded.safetensors"]) == 0
    for i in range(B.numel()):
        near = B.clone()
        near.view(-1)[i] = torch.nextafter(near.view(-1)[i], torch.tensor(9.0, dtype=torch.float64))
        write_pair("near.safetensors", near, A, scale=2.0)
        assert main(["diff", "a.safetensors", "near.safetensors"]) == 1
        assert main(["diff", "a.safetensors", "near.safetensors", "--tolerance", "1e-12"]) == 0
    tiny = torch.full((3,), 1e-200, dtype=torch.float64)
    write_pair("t.safetensors", B, A, trained={"1.bias": torch.cat([torch.ones(1), tiny])})
    write_pair("u.safetensors", B, A, trained={"1.bias": torch.cat([torch.ones(1), 2 * tiny])})
    assert main(["diff", "t.safetensors", "t.safetensors"]) == 0
    assert main(["diff", "t.safetensors", "u.safetensors"]) == 1
    write_pair("zero.safetensors", 0 * B, A)
    write_pair("zeros.safetensors", 0 * B, A + 1)
    assert main(["diff", "zero.safetensors", "zeros.safetensors"]) == 0
    assert main(["diff", "zero.safetensors", "a.safetensors", "--tolerance", "9"]) == 1


def test_what_json_lacks_is_null(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    large = torch.full((4, 2), 1e300, dtype=torch.float64)
    write_pair("large.safetensors", large, large.T, trained={"1.bias": large[0].clone()})
    write_pair(
        "wide.safetensors", torch.ones(5, 2), torch.ones(2, 4), trained={"1.bias": torch.ones(3)}
    )

    def read(*arguments):
        main([*arguments, "--json"])
        return json.loads(capsys.readouterr().out, parse_constant=pytest.fail)

    about = read("show", "large.safetensors")
    assert about["sites"]["0"]["norm"] is about["trained"]["1.bias"]["norm"] is None
    found = read("diff", "large.safetensors", "wide.safetensors")
    assert found["sites"] == {"0": None}
    assert found["trained"] == {"1.bias": None}
    assert not found["equal"]
    assert read("diff", "large.safetensors", "large.safetensors")["equal"]


def test_converting_what_is_being_trained(small, capsys):
    """Only .safetensors keeps the state of a training run; where it is left out, a line says so."""
    model = lorafx.inject(nn.Sequential(nn.Linear(4, 6)), rank=2, targets="linear", adapter="run")
    optimizer = torch.optim.AdamW(lorafx.parameters(model))
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    lorafx.save(model, "run.safetensors", optimizer=optimizer, step=3)
    assert main(["convert", "run.safetensors", "run.pth"]) == 0
    assert capsys.readouterr().out == (
        "run.pth: adapter 'run' (MiniMind), 1 site; the optimizer and step of its "
        "training are left out, as that format keeps none\n"
    )
    assert main(["convert", "run.safetensors", "copy.safetensors"]) == 0
    assert capsys.readouterr().out == "copy.safetensors: adapter 'run' (lorafx), 1 site\n"
    first, second = (safetensors.safe_open(f"{name}.safetensors", "pt") for name in ("copy", "run"))
    assert first.metadata() == second.metadata() and '"training"' in first.metadata()["adapter"]
    assert same(*(safetensors.torch.load_file(f"{name}.safetensors") for name in ("copy", "run")))
    assert main(["diff", "run.safetensors", "run.pth", "--tolerance", "1e-3"]) == 0


def test_a_folder_of_several_adapters(tmp_path, monkeypatch, capsys):
    """Each is named by its own folder, and the error says so."""
    monkeypatch.chdir(tmp_path)
    model = lorafx.inject(
        nn.Sequential(nn.Linear(4, 6)), rank=2, targets="linear", adapter="french"
    )
    lorafx.add(model, "german", rank=3)
    for name in ("french", "german"):
        lorafx.save(randomise(model), "both", name)
    for command in (["show"], ["convert", "new.safetensors"], ["diff", "both/french"]):
        assert main([command[0], "both", *command[1:]]) == 2
        assert error(capsys) == (
            f"lorafx {command[0]}: 'both' has 'french', 'german': name one with adapter=..., or "
            "by its own folder, such as 'both/french'."
        )
    assert main(["show", "both/german"]) == 0 and "0     3     1" in capsys.readouterr().out
    assert main(["convert", "both/german", "german.safetensors"]) == 0
    assert (
        main(["diff", "both/german", "german.safetensors"])
        == 0
        == main(["show", "german.safetensors"])
    )
    assert main(["diff", "both/german", "both/french"]) == 1


def test_ranks_beyond_the_matrix_and_matrices_without_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    B, A = torch.randn(3, 5000), torch.randn(5000, 4)
    write_pair("large.safetensors", B, A)
    write_pair("empty.safetensors", torch.ones(0, 2), torch.ones(2, 4))
    assert main(["show", "large.safetensors", "--json"]) == 0
    norm = json.loads(capsys.readouterr().out)["sites"]["0"]["norm"]
    assert norm == pytest.approx((B.double() @ A.double()).norm().item(), rel=1e-9)
    assert main(["show", "empty.safetensors"]) == 0
    assert "0 x 2  float32  0\n" in capsys.readouterr().out
    assert main(["diff", "empty.safetensors", "empty.safetensors"]) == 0
    assert main(["diff", "empty.safetensors", "large.safetensors"]) == 1


def test_as_a_program(small):
    def run(*arguments):
        env = os.environ | {"PYTHONPATH": str(Path(lorafx.__file__).parents[1])}
        return subprocess.run(
            [sys.executable, "-m", "lorafx", *arguments], capture_output=True, text=True, env=env
        )

    done = run("merge", "base", "a.safetensors", "-o", "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("out: 2 of 4 tensors changed; 5 files, ")
    done = run("merge", "base", "a.safetensors", "-o", "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "lorafx merge: 'out' is there already: choose another path, or replace it with --force.\n"
    )


def test_help(capsys):
    for command in ("merge", "show", "convert", "diff"):
        assert main([command, "--help"]) == 0
        assert f"examples:\n  lorafx {command} " in capsys.readouterr().out
    assert main(["--help"]) == 0 and "examples:\n  lorafx merge " in capsys.readouterr().out
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"lorafx {lorafx.__version__}\n"
