"""Files of a whole pipeline, one part at a time, and files written for diffusers and kohya."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import lorafx
from tests.support.oracle import randomise


class Attention(nn.Module):
    """As diffusers has it, as far as its names go."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.to_q, self.to_out = nn.Linear(width, width), nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.to_out[0](torch.tanh(self.to_q(x)))


class Level(nn.Module):
    """A level of a U-Net: an attention after each resnet, and what changes the size."""

    def __init__(self, resnets: int, sampler: str) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(nn.Module() for _ in range(resnets))
        for resnet in self.resnets:
            resnet.conv1 = nn.Conv1d(1, 1, 1)
        self.attentions = nn.ModuleList(Attention() for _ in range(resnets))
        if sampler:
            module = nn.Module()
            module.conv = nn.Conv1d(1, 1, 1)
            setattr(self, sampler, nn.ModuleList([module]))

    def forward(self, x: Tensor) -> Tensor:
        for attention in self.attentions:
            x = attention(x)
        return x


class UNet(nn.Module):
    """Two levels down, of two resnets each, a middle, and two levels up of three."""

    def __init__(self) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList([Level(2, "downsamplers"), Level(2, "")])
        self.mid_block = Level(2, "")
        self.up_blocks = nn.ModuleList([Level(3, "upsamplers"), Level(3, "")])

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.down_blocks, self.mid_block, *self.up_blocks):
            x = block(x)
        return x


def halves(stem: str, down: str = "lora_down.weight", up: str = "lora_up.weight") -> dict:
    return {f"{stem}.{down}": torch.randn(2, 4), f"{stem}.{up}": torch.randn(4, 2)}


# {where blocks are numbered in a row: the module of diffusers that is meant}
NUMBERED = {
    "input_blocks_1_1": "down_blocks.0.attentions.0",
    "input_blocks_2_1": "down_blocks.0.attentions.1",
    "input_blocks_4_1": "down_blocks.1.attentions.0",
    "middle_block_1": "mid_block.attentions.0",
    "output_blocks_2_1": "up_blocks.0.attentions.2",
    "output_blocks_3_1": "up_blocks.1.attentions.0",
}


@pytest.mark.parametrize("written, meant", NUMBERED.items(), ids=NUMBERED)
def test_blocks_that_are_numbered_in_a_row(tmp_path: Path, written: str, meant: str) -> None:
    path, net = tmp_path / "a.safetensors", UNet()
    del net.mid_block.attentions[1]
    safetensors.torch.save_file(halves(f"lora_unet_{written}_to_q"), path)
    assert [row.name for row in lorafx.summary(lorafx.load(net, path)).sites] == [f"{meant}.to_q"]


WRITERS: dict[str, tuple[str, str, str, str]] = {
    "kohya": ("lora_unet_to_q", "lora_te_to_q", "lora_down.weight", "lora_up.weight"),
    "diffusers": ("unet.to_q", "text_encoder.to_q", "lora.down.weight", "lora.up.weight"),
    "newer diffusers": ("unet.to_q", "text_encoder.to_q", "lora_A.weight", "lora_B.weight"),
    "ComfyUI": ("diffusion_model.to_q", "text_encoder.to_q", "lora_A.weight", "lora_B.weight"),
}


@pytest.mark.parametrize("first, second, down, up", WRITERS.values(), ids=WRITERS)
def test_each_part_has_its_own(
    tmp_path: Path, first: str, second: str, down: str, up: str
) -> None:
    path, x = tmp_path / "a.safetensors", torch.randn(3, 4)
    tensors = halves(first, down, up) | halves(second, down, up)
    safetensors.torch.save_file(tensors, path)
    for part, stem in (("unet", first), ("text_encoder", second)):
        net = Attention()
        loaded, truth = lorafx.load(net, path, part=part), copy.deepcopy(net)
        with torch.no_grad():
            truth.to_q.weight += tensors[f"{stem}.{up}"] @ tensors[f"{stem}.{down}"]
        torch.testing.assert_close(loaded(x), truth(x))
    with pytest.raises(lorafx.MismatchError, match="holds adapters for 'text_encoder' and 'unet'"):
        lorafx.load(Attention(), path)
    with pytest.raises(lorafx.MismatchError, match="nothing for 'prior': it has the parts"):
        lorafx.load(Attention(), path, part="prior")


@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_diffusers_before_it_named_layers(tmp_path: Path, ending: str) -> None:
    path, x = tmp_path / f"pytorch_lora_weights{ending}", torch.randn(3, 4)
    tensors = halves("unet.attn.processor.to_q_lora", "down.weight", "up.weight")
    tensors |= halves("unet.attn.processor.to_out_lora", "down.weight", "up.weight")
    if ending == ".bin":
        torch.save(tensors, path)
    else:
        safetensors.torch.save_file(tensors, path, {"format": "pt"})
    net = nn.Sequential()
    net.attn = Attention()
    loaded, truth = lorafx.load(net, path), copy.deepcopy(net)
    with torch.no_grad():
        for name, layer in (("to_q", truth.attn.to_q), ("to_out", truth.attn.to_out[0])):
            stem = f"unet.attn.processor.{name}_lora"
            layer.weight += tensors[f"{stem}.up.weight"] @ tensors[f"{stem}.down.weight"]
    torch.testing.assert_close(loaded(x), truth(x))
    if ending == ".bin":
        with pytest.raises(lorafx.FormatError, match="is read only: choose another ending"):
            lorafx.save(loaded, path)


def test_a_text_encoder_of_old(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(halves("text_encoder.to_q.lora_linear_layer", "down.weight",
                                       "up.weight"), path)
    assert [row.name for row in lorafx.summary(lorafx.load(Attention(), path)).sites] == ["to_q"]


@pytest.mark.parametrize("part", [None, "unet", "text_encoder_2"])
@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_what_is_written_is_read(tmp_path: Path, format: str, part: str | None) -> None:
    path, net, x = tmp_path / "a.safetensors", Attention().double(), torch.randn(3, 4).double()
    model = randomise(lorafx.inject(net, rank=2, alpha=6, targets="linear"))
    lorafx.save(model, path, format=format, part=part)
    torch.testing.assert_close(lorafx.load(net, path, part=part if part else None)(x), model(x))
    with safetensors.safe_open(path, "pt") as file:
        names = sorted(file.keys())
    prefix = {("diffusers", None): "to_q", ("kohya", None): "lora_unet_to_q",
              ("diffusers", "unet"): "unet.to_q", ("kohya", "unet"): "lora_unet_to_q",
              ("diffusers", "text_encoder_2"): "text_encoder_2.to_q",
              ("kohya", "text_encoder_2"): "lora_te2_to_q"}[format, part]
    assert [name for name in names if "to_q" in name][0].startswith(prefix + ".")


def test_diffusers_alphas_of_several_ranks(tmp_path: Path) -> None:
    """They stand in the header as PEFT's patterns."""
    path, net = tmp_path / "a.safetensors", Attention()
    model = lorafx.inject(net, rank=2, alpha=6, targets="linear", rank_pattern={"to_q": 3})
    lorafx.save(model, path, format="diffusers")
    with safetensors.safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    assert config["r"] in (2, 3) and config["lora_alpha"] == 6
    assert list(config["rank_pattern"].values()) == [5 - config["r"]]


Refusal = Callable[[Path], None]


def _saves(target: str, **options: object) -> Refusal:
    def run(folder: Path) -> None:
        model = lorafx.inject(Attention(), rank=2, targets="linear")
        lorafx.save(model, folder / target, **options)
    return run


REFUSED: dict[str, tuple[Refusal, str]] = {
    "no such format": (_saves("a.safetensors", format="peft"), "no format 'peft' to ask for"),
    "another ending": (_saves("a.pth", format="kohya"), "cannot be a kohya file"),
    "a part of a file that has none": (_saves("a.safetensors", part="unet"), "leave out part"),
    "no such part": (_saves("a.safetensors", format="kohya", part="vae"), "have no part 'vae'"),
}


@pytest.mark.parametrize("run, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_asked_for(tmp_path: Path, run: Refusal, message: str) -> None:
    with pytest.raises(lorafx.FormatError, match=message):
        run(tmp_path)
    assert not list(tmp_path.iterdir())
