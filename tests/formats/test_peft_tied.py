"""PEFT's folders for models that tie a head to an embedding: as one tensor, or each by itself."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

import lorafx
from tests.formats.test_peft_heads import saved_by_peft
from tests.support.command_line import main

pytestmark = pytest.mark.filterwarnings("ignore")  # what PEFT says of ties, and of old options

IDS = torch.tensor([[1, 2, 3, 4]])
TIED = {"ensure_weight_tying": True}
TINY = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)


def qwen() -> nn.Module:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**TINY)).eval()


def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_a_pair_that_is_kept_tied(tmp_path: Path, saved: list[str]) -> None:
    """PEFT saves it under both names; here it is one tensor, and so it is on a disk."""
    base = qwen()
    theirs = saved_by_peft(
        base, tmp_path / "peft", target_modules=["q_proj"], modules_to_save=saved, **TIED)
    model = lorafx.load(base, tmp_path / "peft")
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-6)
    assert len([name for name, _ in lorafx.named_parameters(model) if "trained" in name]) == 1
    base.save_pretrained(tmp_path / "base")
    assert not main(["merge", str(tmp_path / "base"), str(tmp_path / "peft"), "-o",
                     str(tmp_path / "merged")])
    merged = Qwen2ForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert torch.equal(logits(merged), logits(lorafx.merge(model)))


def test_a_pair_that_is_said_to_be_tied_and_is_not(tmp_path: Path) -> None:
    saved_by_peft(qwen(), tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"], **TIED)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace("tying\": true", "tying\": 1"))
    with pytest.raises(lorafx.FormatError, match="ensure_weight_tying=1, which PEFT does not mean"):
        lorafx.load(qwen(), tmp_path)


@pytest.mark.parametrize("config", [
    dict(modules_to_save=["embed_tokens", "lm_head"]), dict(modules_to_save=["lm_head"]),
    dict(modules_to_save=["embed_tokens"]), dict(target_modules=["q_proj", "lm_head"])], ids=str)
def test_each_of_a_tied_pair_by_itself(tmp_path: Path, config: dict[str, list[str]]) -> None:
    """untie=True gives each a place of its own, on the memory of the base."""
    base = qwen()
    theirs = saved_by_peft(base, tmp_path / "peft", **{"target_modules": ["q_proj"], **config})
    if "modules_to_save" in config:
        with pytest.raises(lorafx.MismatchError, match="tied to '.*': load it with untie=True"):
            lorafx.load(base, tmp_path / "peft")
    model = lorafx.load(base, tmp_path / "peft", untie=True)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-6)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    head, embedding = (dict(model.named_parameters())[name] for name in (
        "lm_head.weight", "model.embed_tokens.weight"))
    assert head is not embedding and head.data_ptr() == embedding.data_ptr()
    for form in ("again.safetensors", "again"):
        lorafx.save(model, tmp_path / form)
        again = lorafx.load(base, tmp_path / form, untie=True)
        assert torch.equal(logits(again), logits(model))
    lorafx.merge(model).save_pretrained(tmp_path / "merged")
    merged = Qwen2ForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), logits(theirs), rtol=1e-4, atol=1e-5)


def test_what_an_untied_model_saves_is_not_loaded_into_a_tied_pair(tmp_path: Path) -> None:
    base = qwen()
    saved_by_peft(
        base, tmp_path / "peft", target_modules=["q_proj"], modules_to_save=["lm_head"])
    lorafx.save(lorafx.load(base, tmp_path / "peft", untie=True), tmp_path / "own.safetensors")
    with pytest.raises(lorafx.MismatchError, match="'lm_head.weight' of its own.*untie=True"):
        lorafx.load(base, tmp_path / "own.safetensors")


def test_what_cannot_be_untied(tmp_path: Path) -> None:
    base = qwen()
    saved_by_peft(base, tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"])
    injected = lorafx.inject(base, targets=["q_proj"], adapter="other")
    with pytest.raises(lorafx.AdapterError, match="injected model is tied: load it into the base"):
        lorafx.load(injected, tmp_path, untie=True)
    assert lorafx.adapters(injected) == ["other"]
    shared = nn.Module()
    shared.first = shared.second = nn.Linear(4, 4)
    apart = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
    lorafx.save(lorafx.inject(apart, targets=["first"]), tmp_path / "a.safetensors")
    with pytest.raises(lorafx.MismatchError, match="that of 'second.weight' too.*cannot be untied"):
        lorafx.load(shared, tmp_path / "a.safetensors", untie=True)
