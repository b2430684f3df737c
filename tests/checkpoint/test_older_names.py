"""Adapters whose names are not those of a checkpoint, as transformers renames and stacks tensors.

What transformers saves has the older names; the adapter has those of today, or the other way.
"""

from pathlib import Path

import pytest
import torch
from torch import nn

import lorafx
from tests.formats.test_older_names import (
    change_json, clip_text, llava, mixtral, named_as_before, one_by_one, qwen2_vl, qwen3_moe
)
from tests.formats.test_peft_heads import saved_by_peft
from tests.support.command_line import main
from tests.support.oracle import randomise

pytestmark = pytest.mark.filterwarnings("ignore")  # what PEFT says of old options

MODELS = [
    (qwen2_vl, ["q_proj", "qkv"], []), (llava, ["q_proj", "linear_1"], ["linear_2"]),
    (clip_text, ["q_proj"], ["final_layer_norm"]),
    (mixtral, ["q_proj", "gate", "gate_up_proj", "down_proj"], ["norm"]),
    (qwen3_moe, ["gate_up_proj", "down_proj"], [])]


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("build, targets, trainable", MODELS)
def test_names_of_today_in_a_checkpoint(
    tmp_path: Path, build, targets: list[str], trainable: list[str], original: bool
) -> None:
    """Folded on a disk and in memory, the same comes out, to the bit."""
    base = build().eval()
    model = randomise(lorafx.inject(base, 2, alpha=3, targets=targets, trainable=trainable))
    lorafx.save(model, tmp_path / "a.safetensors")
    base.save_pretrained(tmp_path / "base", save_original_format=original)
    merge(tmp_path, "a.safetensors")
    check(tmp_path, base, lorafx.merge(model))


def merge(folder: Path, adapter: str) -> None:
    assert not main(arguments(folder, adapter))


def arguments(folder: Path, adapter: str) -> list[str]:
    return ["merge", str(folder / "base"), str(folder / adapter), "-o", str(folder / "merged")]


def check(folder: Path, base: nn.Module, wanted: nn.Module) -> None:
    merged = type(base).from_pretrained(folder / "merged").eval()
    found, expected = merged.state_dict(), wanted.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    changed = [name for name, tensor in base.state_dict().items()
               if not torch.equal(found[name], tensor)]
    assert len(changed) >= 1


@pytest.mark.parametrize("original", [True, False])
def test_experts_one_by_one(tmp_path: Path, original: bool) -> None:
    base = mixtral().eval()
    one_by_one(tmp_path / "peft", base, "block_sparse_moe", ("w1", "w2", "w3"))
    base.save_pretrained(tmp_path / "base", save_original_format=original)
    merge(tmp_path, "peft")
    check(tmp_path, base, lorafx.merge(lorafx.load(base, tmp_path / "peft")))


def test_older_names_in_a_checkpoint_of_today(tmp_path: Path) -> None:
    base = qwen2_vl().eval()
    saved_by_peft(base, tmp_path / "peft", target_modules=["q_proj"])
    named_as_before(tmp_path / "peft", [("model.", "model.language_model.")])
    base.save_pretrained(tmp_path / "base", save_original_format=False)
    merge(tmp_path, "peft")
    check(tmp_path, base, lorafx.merge(lorafx.load(base, tmp_path / "peft")))


@pytest.mark.parametrize("config", [
    {"architectures": ["MixtralForAnything"]}, {"architectures": ["AutoModel"]},
    {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, {"architectures": None},
    {"num_hidden_layers": "many"},
], ids=str)
def test_a_config_of_which_there_is_no_table(
    tmp_path: Path, config: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    """What is missing is said as ever, and nothing is written."""
    base = mixtral().eval()
    lorafx.save(lorafx.inject(base, targets=["gate_up_proj"]), tmp_path / "a.safetensors")
    base.save_pretrained(tmp_path / "base")
    change_json(tmp_path / "base" / "config.json", **config)
    assert main(arguments(tmp_path, "a.safetensors")) == 2
    assert "no such tensor" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_without_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = mixtral().eval()
    lorafx.save(lorafx.inject(base, targets=["gate_up_proj"]), tmp_path / "a.safetensors")
    base.save_pretrained(tmp_path / "base")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(arguments(tmp_path, "a.safetensors")) == 2
    assert "fold the adapter in memory, by lorafx.merge" in capsys.readouterr().err
