"""QLoRA on a model that transformers loads in 4 bits: beside PEFT, files, what was merged."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import lorafx
from tests.quantised.test_formats import far, fill

# PEFT asks transformers 5 for a name that it deprecates
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.arange(32).view(2, 16)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """A small Llama in 4 bits."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2)).save_pretrained(folder)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                bnb_4bit_use_double_quant=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


@pytest.fixture
def peft(base: nn.Module) -> nn.Module:
    """PEFT's model on the same base, with drawn A and B."""
    model = get_peft_model(copy.deepcopy(base), LoraConfig(
        r=4, lora_alpha=8, target_modules=TARGETS))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.05)
    return model


def losses(model: nn.Module, parameters: list[nn.Parameter], steps: int = 10) -> list[float]:
    """Those of some steps of training."""
    optimizer, found = torch.optim.AdamW(parameters, lr=1e-3), []
    for _ in range(steps):
        loss = model.train()(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def test_ten_steps_are_those_of_peft(base: nn.Module, peft: nn.Module, tmp_path: Path) -> None:
    peft.save_pretrained(tmp_path / "peft")
    model = lorafx.load(base, tmp_path / "peft")
    ours = losses(model, list(lorafx.parameters(model)))
    theirs = losses(peft, [p for p in peft.parameters() if p.requires_grad])
    assert ours == pytest.approx(theirs, rel=2e-6) and ours[-1] < ours[0] - 0.05


def test_peft_folders_go_both_ways(base: nn.Module, peft: nn.Module, tmp_path: Path) -> None:
    peft.save_pretrained(tmp_path / "peft")
    model = lorafx.load(base, tmp_path / "peft").train()
    assert far(model(IDS).logits, peft.train()(input_ids=IDS).logits) < 1e-5
    lorafx.save(model, tmp_path / "ours")
    file = "adapter_model.safetensors"
    theirs, ours = load_file(tmp_path / "peft" / file), load_file(tmp_path / "ours" / file)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").train()
    assert far(again(input_ids=IDS).logits, model(IDS).logits) < 1e-5


@pytest.mark.parametrize("targets", [TARGETS, ["q_proj", "v_proj"]])
def test_what_was_merged_is_saved_and_loaded(
    base: nn.Module, targets: list[str], tmp_path: Path
) -> None:
    model = fill(lorafx.inject(base, rank=4, targets=targets)).train()
    merged = lorafx.merge(model)
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    config = json.loads((tmp_path / "config.json").read_text())
    assert ("quantization_config" in config) == (targets != TARGETS)
    assert far(merged(IDS).logits, model(IDS).logits) < 1e-5
    assert far(again(IDS).logits, merged(IDS).logits) < 1e-6
    assert base.config.quantization_config is not None and base.is_quantized


def test_a_quantised_folder_is_not_merged_on_a_disk(
    base: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorafx._cli.main import main

    base.save_pretrained(tmp_path / "base")
    lorafx.save(lorafx.inject(base, targets=["q_proj"]), tmp_path / "a.safetensors")
    folders = [str(tmp_path / name) for name in ("base", "a.safetensors", "out")]
    assert main(["merge", *folders[:2], "-o", folders[2]]) != 0
    said = capsys.readouterr().err
    assert "stored quantised (bitsandbytes" in said and "lorafx.merge" in said
    assert not (tmp_path / "out").exists()
