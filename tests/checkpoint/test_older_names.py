"""Adapters whose names are not those of a checkpoint, as transformers renames and stacks tensors.

What transformers saves has the older names; the adapter has those of today, or the other way.
"""

from pathlib import Path

import pytest
import torch
from torch import nn

import lorafx
from tests.formats.test_older_names import (
    clip_text, llava, mixtral, named_as_before, one_by_one, qwen2_vl, qwen3_moe
)
from tests.formats.test_peft_heads import saved_by_peft
from tests.support.command_line import main
from tests.support.oracle import randomise

pytestmark = pytest.mark.filterwarnings("ignore")  # what PEFT says of old options

MODELS = [
    (qwen2_vl, ["q_proj", "qkv"]), (llava, ["q_proj", "linear_1"]), (clip_text, ["q_proj"]),
    (mixtral, ["q_proj", "gate", "gate_up_proj", "down_proj"]),
    (qwen3_moe, ["gate_up_proj", "down_proj"])]


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("build, targets", MODELS)
def test_names_of_today_in_a_checkpoint(
    tmp_path: Path, build, targets: list[str], original: bool
) -> None:
    """Folded on a disk and in memory, the same comes out, to the bit."""
    base = build().eval()
    model = randomise(lorafx.inject(base, 2, alpha=3, targets=targets))
    lorafx.save(model, tmp_path / "a.safetensors")
    base.save_pretrained(tmp_path / "base", save_original_format=original)
    merge(tmp_path, "a.safetensors")
    check(tmp_path, base, lorafx.merge(model))


def merge(folder: Path, adapter: str) -> None:
    assert not main(["merge", str(folder / "base"), str(folder / adapter), "-o",
                     str(folder / "merged")])


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
