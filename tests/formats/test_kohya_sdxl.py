"""kohya's files for SDXL, written, are what diffusers reads into the same layers."""

from pathlib import Path

import pytest
import torch

import lorafx
from tests.support.oracle import randomise

diffusers = pytest.importorskip("diffusers")
loaders = pytest.importorskip("diffusers.loaders")


def unet(sdxl: bool) -> torch.nn.Module:
    more = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 32} if sdxl else {}
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=2, cross_attention_dim=8,
        attention_head_dim=4, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **more)


@pytest.mark.parametrize("sdxl", [True, False])
def test_diffusers_reads_what_is_written(tmp_path: Path, sdxl: bool) -> None:
    base, path = unet(sdxl), tmp_path / "a.safetensors"
    model = randomise(lorafx.inject(base, rank=2, alpha=6, targets=["to_q", "to_out.0"]))
    lorafx.save(model, path, format="kohya")
    state, alphas = loaders.StableDiffusionXLLoraLoaderMixin.lora_state_dict(
        tmp_path, weight_name=path.name, unet_config=base.config)
    found = {_of_today(name): tensor for name, tensor in state.items()}
    expected = {}
    for name, tensor in lorafx.named_parameters(model):
        site, _, letter = name.replace(".lora.default.", "|").partition("|")
        expected[f"{site}.lora_{letter}.weight"] = tensor
    assert found.keys() == expected.keys() and set(alphas.values()) == {6}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    numbered = [name for name in _names(path) if "put_blocks_" in name]
    assert bool(numbered) == sdxl
    again = lorafx.load(base, path)
    for (name, ours), (_, theirs) in zip(
        lorafx.named_parameters(model), lorafx.named_parameters(again), strict=True
    ):
        assert torch.equal(ours, theirs), name


def _of_today(name: str) -> str:
    """diffusers converts to the names of its own that it had before 0.22."""
    for old, new in (("unet.", ""), (".processor.to_out_lora", ".to_out.0"), ("_lora.", "."),
                     (".processor.", "."), (".down.weight", ".lora_A.weight"),
                     (".up.weight", ".lora_B.weight")):
        name = name.replace(old, new)
    return name


def _names(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return list(file.keys())
