"""Benchmarks that several processes run: what they print, and what they count."""

from pathlib import Path
from typing import Any

import finetune
import pytest
import sharded

from common.timing import threads
from tests.benchmarks.in_processes import TINY
from tests.support.torchrun import torchrun


def losses(results: dict[str, Any]) -> dict[str, Any]:
    """All of them under a name each."""
    found = {}
    for name, row in results["models"].items():
        for text, loss in row["loss"].items():
            found[f"{name}, {text}"] = loss
    for text, runs in results["runs"].items():
        for method, run in runs.items():
            for step, loss in enumerate([*run["training"], *(loss for _, loss in run["held_out"])]):
                found[f"{method} on {text}, {step}"] = loss
    return found


def printed_once(ran: dict[str, Any]) -> bool:
    """By the first process, the table, and by the other nothing."""
    first, other = ran["printed"]
    return other == "" and first.count("LoRA on prose") == 1


def test_finetune_in_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    folders = ["--out", str(tmp_path / "one"), "--checkpoints", str(tmp_path / "checkpoints")]
    with threads(2):  # as many as two processes have
        alone = finetune.main([*TINY, *folders])
    found = torchrun(["benchmarks.in_processes"], 2)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1
    for way in ("ddp", "fsdp2"):
        whole = found[f"in_processes.finetune_{way}"]["whole"]
        assert losses(whole["results"]) == pytest.approx(losses(alone), abs=2e-6, rel=0)
        assert whole["results"]["processes"] == 2
        assert whole["results"]["checks"] == alone["checks"]
        assert printed_once(whole)
        assert len(list((tmp_path / way / "lora").iterdir())) == 5
        assert (tmp_path / way / "results.json").exists()
    resumed = found["in_processes.finetune_fsdp2"]["resumed"]
    assert losses(resumed["results"]) == losses(whole["results"])
    assert resumed["results"]["checks"] == alone["checks"]
    assert printed_once(resumed)
    assert "Resumed table after step 4." in resumed["printed"][0]
    assert not (tmp_path / "fsdp2_stopped" / "unfinished").exists()


def test_sharded(tmp_path: Path) -> None:
    """Every set-up has one process's losses, and none reduces more than the adapter but FSDP1."""
    path = tmp_path / "sharded.json"
    rows = {row["name"]: row for row in
            sharded.main(["--processes", "2", "--json", str(path)])["rows"]}
    assert rows.keys() == sharded.SETUPS.keys()
    for name, row in rows.items():
        assert row["difference"] < (1e-3 if "bfloat16" in name else 1e-5), name
    for name in ("DDP", "FSDP2", "FSDP2, bfloat16"):
        assert rows[name]["traffic"]["gradients reduced"] == rows[name]["adapter"]
    assert rows["FSDP2"]["held"] == rows["one process"]["held"] // 2
