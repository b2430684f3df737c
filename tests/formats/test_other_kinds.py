"""Adapters that lorafx does not read are called what they are, with how many weights are so."""

import copy
import json
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from torch import nn

import lorafx

pytestmark = pytest.mark.filterwarnings("ignore")  # what PEFT says of its own

TWO = ["q", "v"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.conv = nn.Embedding(9, 8), nn.Conv2d(4, 4, 3, padding=1)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return self.v(self.k(self.q(self.emb(x))))


def says(found: str) -> str:
    return rf"^'.*' adapts {found}, which lorafx does not support\.$"


def by(kind: str) -> str:
    return says(rf"2 of its 2 weights by {kind}, such as 'base_model\.model\.q'")


ALL_OF_IT = "is for PEFT's '{}', as all of the {} tensors beside it are: lorafx reads 'LORA'"
KINDS = {
    "LoHa": (peft.LoHaConfig(target_modules=TWO), by("LoHa")),
    "LoKr": (peft.LoKrConfig(target_modules=TWO), by("LoKr")),
    "OFT": (peft.OFTConfig(target_modules=TWO, oft_block_size=4), by("OFT")),
    "BOFT": (peft.BOFTConfig(target_modules=TWO, boft_block_size=4), by("BOFT")),
    "IA3": (peft.IA3Config(target_modules=TWO, feedforward_modules=[]), by(r"\(IA\)3")),
    "VeRA": (peft.VeraConfig(target_modules=TWO), by("VeRA")),
    "DoRA": (peft.LoraConfig(target_modules=TWO, use_dora=True), by("DoRA")),
    "bias": (peft.LoraConfig(target_modules=TWO, lora_bias=True),
             by(r"LoRA with a bias \(lora_bias\)")),
    "layer norms": (peft.LNTuningConfig(target_modules=TWO), ALL_OF_IT.format("LN_TUNING", 4)),
    "HRA": (peft.HRAConfig(target_modules=TWO), ALL_OF_IT.format("HRA", 2)),
    "embedding": (
        peft.LoraConfig(target_modules=[*TWO, "emb"]),
        says(r"1 of its 3 weights as embeddings, such as 'base_model\.model\.emb'")),
    "convolution and embedding": (
        peft.LoraConfig(target_modules=["conv", "emb", "q"]),
        says(r"1 of its 3 weights as (?:embeddings|convolutions), such as '\S+', and 1 of its 3 "
             r"weights as (?:embeddings|convolutions), such as '\S+'")),
}


@pytest.mark.parametrize("config, message", KINDS.values(), ids=KINDS)
def test_kinds_of_peft(tmp_path: Path, config: peft.PeftConfig, message: str) -> None:
    base = Block()
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path)
    with pytest.raises(lorafx.FormatError, match=message):
        lorafx.load(base, tmp_path)


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"])
def test_prompts_of_peft(tmp_path: Path, kind: str) -> None:
    """They have one tensor, which no prefix is put before."""
    safetensors.torch.save_file(
        {"prompt_embeddings": torch.zeros(4, 8)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    with pytest.raises(lorafx.FormatError, match=ALL_OF_IT.format(kind, 1)):
        lorafx.load(Block(), tmp_path)


def lycoris(*ends: str, at: str = "lora_unet_q") -> dict[str, torch.Tensor]:
    return {f"{at}.{end}": torch.zeros(2, 2) for end in ends}


PAIR = ("lora_down.weight", "lora_up.weight")
FILES = {
    "LoHa": (lycoris("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"),
             r"1 of its 1 weights by LoHa, such as 'lora_unet_q'"),
    "LoHa of convolutions": (lycoris("hada_t1", "hada_w1_a"), "1 of its 1 weights by LoHa"),
    "LoKr": (lycoris("lokr_w1", "lokr_w2_a", "lokr_w2_b"), "1 of its 1 weights by LoKr"),
    "full": (lycoris("diff", "diff_b"), r"1 of its 1 weights by a full difference \(\.diff\)"),
    "full beside pairs": (
        lycoris("diff") | lycoris(*PAIR, "alpha", at="lora_unet_v"),
        r"1 of its 2 weights by a full difference \(\.diff\), such as 'lora_unet_q'"),
    "DoRA": (lycoris(*PAIR, "dora_scale") | lycoris(*PAIR, at="lora_unet_v"),
             "1 of its 2 weights by DoRA"),
    "core": (lycoris(*PAIR, "lora_mid.weight"), r"by LoCon with a core \(lora_mid\)"),
    "IA3": (lycoris("weight", "on_input"), r"by \(IA\)3"),
    "OFT": (lycoris("oft_blocks", "alpha"), "by OFT"),
    "convolution": (
        lycoris(*PAIR) | {f"lora_unet_c.{end}": torch.zeros(2, 2, 1, 1) for end in PAIR},
        "1 of its 2 weights as convolutions, such as 'lora_unet_c'"),
}


@pytest.mark.parametrize("tensors, message", FILES.values(), ids=FILES)
def test_files_of_lycoris(
    tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    path = tmp_path / "style.safetensors"
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(lorafx.FormatError, match=f"adapts .*{message}"):
        lorafx.load(Block(), path)


def test_a_tensor_of_lorafx_may_be_called_so(tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.head = nn.Linear(8, 8), nn.Module()
            self.head.diff = nn.Parameter(torch.ones(8))

        def forward(self, x):
            return self.q(x) * self.head.diff

    base = Own()
    lorafx.save(lorafx.inject(base, trainable=["head"]), tmp_path / "a.safetensors")
    assert lorafx.adapters(lorafx.load(base, tmp_path / "a.safetensors")) == ["default"]


@pytest.mark.parametrize("tensors", [0, 3])
def test_a_folder_of_adapterhub(tmp_path: Path, tensors: int) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({
        "config": {"architecture": "lora", "r": 8}, "model_class": "BertAdapterModel",
        "model_type": "bert", "hidden_size": 8}))
    count = ""
    if tensors:
        torch.save({str(number): torch.ones(1) for number in range(tensors)},
                   tmp_path / "pytorch_adapter.bin")
        count = ", all of its 3 tensors"
    message = rf"the library adapters \(AdapterHub\){count}, and lorafx reads PEFT's"
    with pytest.raises(lorafx.FormatError, match=message):
        lorafx.load(Block(), tmp_path)
