"""Each benchmark's command runs, small."""

import json
import os
import re
import signal
import time

import claims
import coverage
import decode
import draw
import facts
import finetune
import pytest
import qlora
import readme
import stream
import torch
from safetensors.torch import load_file

from common import progress
from common.readme import README, fill, markdown
from tests.support.processes import child


def test_finetune(tmp_path, capsys):
    options = [
        "--hidden", "16", "--layers", "1", "--steps", "3", "--pretrain-steps", "3", "--batch", "4",
        "--length", "16", "--out", str(tmp_path / "out"), "--checkpoints",
        str(tmp_path / "checkpoints"), "--device", "cpu", "--no-check-learning"
    ]
    first, second = finetune.main(options), finetune.main(options)
    assert [row["loss"] for row in first["models"].values()] == [
        row["loss"] for row in second["models"].values()
    ]
    assert len(first["checks"]) >= 18 and first["checks"] == second["checks"]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["models"] == second["models"]
    assert (tmp_path / "out" / "finetune.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (tmp_path / "out" / "lora").iterdir()} == {
        "prose_16.safetensors",
        "prose_16.pth",
        "table_16.safetensors",
        "table_16.pth",
        "both_16.safetensors",
    }
    assert "LoRA on prose" in capsys.readouterr().out


def killed_when(path, options):
    """Run finetune in another process, and kill that when a file appears."""
    pid, late = child(lambda: finetune.main(options)), time.monotonic() + 120
    while not path.exists() and time.monotonic() < late:
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "it ended by itself"
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    assert path.exists(), "it stands still"
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_finetune_goes_on_after_a_kill(tmp_path, capsys):
    options = [
        "--hidden", "16", "--layers", "1", "--steps", "60", "--pretrain-steps", "3", "--batch", "4",
        "--length", "16", "--checkpoints", str(tmp_path / "checkpoints"), "--device", "cpu",
        "--no-check-learning", "--save-every", "7"
    ]
    whole, out = finetune.main([*options, "--out", str(tmp_path / "whole")]), tmp_path / "out"
    options += ["--out", str(out)]
    killed_when(out / "unfinished" / "prose.safetensors", options)
    killed_when(out / "unfinished" / "table.safetensors", [*options, "--resume"])
    with pytest.raises(
        SystemExit,
        match="was trained with rate = 0.02, not 0.5: resume with the options of the run",
    ):
        finetune.main([*options, "--resume", "--rate", "0.5"])
    capsys.readouterr()
    resumed = finetune.main([*options, "--resume"])
    steps = dict(re.findall(r"Resumed (\w+) after step (\d+)", capsys.readouterr().out))
    assert steps["prose"] == "60" and 0 < int(steps["table"]) < 60
    for results in (whole, resumed):
        for run in (run for runs in results["runs"].values() for run in runs.values()):
            assert run.pop("seconds") > 0
            # an input is kept where it is not computed again bit for bit, as processes may differ
            assert run["memory"].pop("saved for backward") > 0
    assert resumed["runs"] == whole["runs"] and resumed["checks"] == whole["checks"]
    for path in (tmp_path / "whole" / "lora").glob("*.safetensors"):
        one, other = load_file(path), load_file(out / "lora" / path.name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert not (out / "unfinished").exists()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_coverage(capsys):
    rows = {
        row.name: row
        for row in coverage.main(["--only", "llama", "siglip", "mixtral", "rwkv", "--jobs", "2"])
    }
    for name, layers in (("llama", 2 * 7), ("siglip", 31)):
        assert rows[name].lorafx.identical()
        assert rows[name].lorafx.no_silent()
        assert rows[name].lorafx.layers >= layers
    assert rows["siglip"].peft.silent and "AdaptedWeightError" in rows["rwkv"].lorafx.error
    assert "1 silent, such as vision_model.head.attention.out_proj" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_decode(tmp_path, capsys):
    found = decode.main(["--tiny", "--json", str(tmp_path / "decode.json")])
    assert [case["name"] for case in found["cases"]] == ["layer", "decoding", "prefill"]
    for case in found["cases"]:
        assert not any(row["void"] for row in case["rows"].values())
        assert all(len(row["times"]) == 3 for row in case["rows"].values())
    assert json.loads((tmp_path / "decode.json").read_text()) == json.loads(json.dumps(found))
    assert decode.table(found["cases"]) in capsys.readouterr().out


def test_stream(tmp_path, capsys):
    found = stream.main(
        ["--tiny", "--no-peft", "--folder", str(tmp_path), "--json", str(tmp_path / "stream.json")]
    )
    assert found["sites"] == 105 and found["shards"] > 2 and len(found["ratios"]) == 1
    assert json.loads((tmp_path / "stream.json").read_text()) == found
    assert "was left out: --no-peft" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_qlora(tmp_path, capsys):
    found = qlora.main(["--tiny", "--json", str(tmp_path / "qlora.json")])
    ours, theirs = found["rows"]["lorafx"], found["rows"]["PEFT"]
    assert ours["trained"] == theirs["trained"] and ours["losses"][0] == theirs["losses"][0]
    assert json.loads((tmp_path / "qlora.json").read_text()) == found
    assert qlora.table(found) in capsys.readouterr().out


def test_claims(tmp_path, capsys):
    rows = {
        (row.model, row.reading): row
        for row in claims.main(["--tiny", "--json", str(tmp_path / "claims.json")])
    }
    square = rows["40B decoder", "square: q, o"]
    assert (square.base, square.sites, square.trainable) == (
        40_010_439_168,
        116,
        58 * 2 * 2 * 8 * 8192,
    )
    assert rows["BERT-large", "q, k, v, o"].trainable == 24 * 4 * 2 * 8 * 1024 == 1_572_864
    assert rows["BERT-large", "q, v"].trainable == 786_432
    assert rows["Falcon-40B", "attention"].trainable == 8 * (8192 + 9216 + 2 * 8192)
    assert claims.FALCON_LAYERS * rows["Falcon-40B", "all but the head"].trainable == 55_541_760
    assert all(row.seconds < 30 and row.float32_bytes == 4 * row.trainable for row in rows.values())
    said, kept = capsys.readouterr().out, json.loads((tmp_path / "claims.json").read_text())
    assert "no reading gives it" in said and "to 263 MB. 150 MB or more: 40B" in said
    assert len(kept["rows"]) == len(rows) and len(kept["steps"]) == 3
    assert "faster" in claims.readme(kept)[-1]


def test_facts(tmp_path, capsys):
    """What the first page says of PEFT and of lorafx is measured anew; numbers are seeded."""
    rows = {row["case"]: row for row in facts.main(["--json", str(tmp_path / "facts.json")])}
    measured = [row for row in rows.values() if row["lorafx"].endswith("%")]
    assert len(measured) == 9 and all(row["lorafx"] == "0.0 %" for row in measured)
    assert all(float(row["PEFT"].split()[0]) > 1 for row in measured if row["PEFT"].endswith("%"))
    saved = rows["bfloat16, q, k, v of one x"]
    assert float(saved["lorafx"].split()[0]) <= 1.2 < 6 < float(saved["PEFT"].split()[0])
    for name in ("Llama", "BERT"):
        for when, most, least in (("before backward", 1.05, 1.4), ("at the peak", 1.05, 1.2)):
            held = rows[f"linears of {name} layers, {when}"]
            assert float(held["lorafx"].split()[0]) <= most < least < float(held["PEFT"].split()[0])
    assert rows["a target that matches nothing, in a list"]["lorafx"] == "NoSiteError"
    assert json.loads((tmp_path / "facts.json").read_text()) == list(rows.values())
    assert facts.table(list(rows.values())) in capsys.readouterr().out


def test_the_picture_on_the_first_page_is_what_the_command_draws(tmp_path):
    draw.main([str(tmp_path / "block.svg")])
    assert (tmp_path / "block.svg").read_text() == draw.PICTURE.read_text()
    assert f"](benchmarks/{draw.PICTURE.name})" in (README.parents[1] / "README.md").read_text()


def test_a_section_of_the_readme():
    text = "a\n<!-- some: a command -->\nold\n<!-- end of some -->\nb\n"
    filled = fill(text, "some", markdown(["new \\1", "a table\n-------"]))
    assert filled == text.replace("old", "new \\1\n\n```\na table\n-------\n```")
    with pytest.raises(ValueError, match="The section 'other' is marked 0 times, not once"):
        fill(text, "other", "")
    sections = re.findall("<!-- (\\w+): .* -->", README.read_text())
    assert sections == [name for name, _, _ in readme.SECTIONS]


def test_progress_in_a_log(capsys, monkeypatch):
    """A line at the start, one now and then, one at the end; no carriage return."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.05)
    for _ in progress.progress(range(20), desc="work"):
        time.sleep(0.01)
    lines = capsys.readouterr().err.splitlines()
    assert "\r" not in "".join(lines) and 3 <= len(lines) < 20
    assert lines[0].startswith("work:   0%") and lines[-1].startswith("work: 100%")
