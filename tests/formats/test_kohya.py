"""kohya's and diffusers' files, read: names are matched where one module alone is meant."""

import copy
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import lorafx


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_out = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x):
        return x + self.to_out[0](torch.tanh(self.to_q(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_blocks = nn.Sequential(Block(), Block())

    def forward(self, x):
        return self.down_blocks(x)


NAMES = {
    "kohya": ("lora_unet_down_blocks_1_to_out_0", "lora_down.weight", "lora_up.weight"),
    "kohya's text encoder": (
        "lora_te1_down_blocks_1_to_out_0", "lora_down.weight", "lora_up.weight"
    ),
    "diffusers": ("unet.down_blocks.1.to_out.0", "lora.down.weight", "lora.up.weight"),
    "newer diffusers": ("transformer.down_blocks.1.to_out.0", "lora_A.weight", "lora_B.weight"),
    "bare": ("down_blocks.1.to_out.0", "lora_down.weight", "lora_up.weight"),
}


@pytest.mark.parametrize("stem, down, up", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_the_names_of_each(tmp_path, stem, down, up, alpha):
    net, x, A, B = Net(), torch.randn(3, 4), torch.randn(2, 4), torch.randn(4, 2)
    tensors = {f"{stem}.{down}": A.clone(), f"{stem}.{up}": B.clone()}
    if alpha is not None:
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", {"ss_network_dim": "2"})
    loaded = lorafx.load(net, tmp_path / "a.safetensors")
    net = copy.deepcopy(net)
    with torch.no_grad():
        net.down_blocks[1].to_out[0].weight += (1.0 if alpha is None else alpha / 2) * B @ A
    torch.testing.assert_close(loaded(x), net(x))


class Ambiguous(nn.Module):
    """Two modules whose names are the same without dots."""

    def __init__(self) -> None:
        super().__init__()
        self.a_b, self.a = nn.Linear(4, 4), nn.ModuleDict({"b": nn.Linear(4, 4)})

    def forward(self, x):
        return self.a_b(self.a["b"](x))


def test_over_such_a_file_lorafx_writes_its_own(tmp_path):
    path, x = tmp_path / "a.safetensors", torch.randn(3, 4)
    tensors = halves("lora_unet_down_blocks_0_to_q") | {
        "lora_unet_down_blocks_0_to_q.alpha": torch.tensor(6.0)
    }
    safetensors.torch.save_file({name: tensor + 0.5 for name, tensor in tensors.items()}, path)
    net = Net()
    loaded = lorafx.load(net, path)
    lorafx.save(loaded, path)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "lorafx" and "down_blocks.0.to_q.lora.A" in file.keys()
    assert torch.equal(lorafx.load(net, path)(x), loaded(x)) and not torch.equal(loaded(x), net(x))


def test_an_injected_model(tmp_path):
    net, x = lorafx.inject(Net(), targets="linear"), torch.randn(3, 4)
    safetensors.torch.save_file(halves("lora_unet_down_blocks_0_to_q"), tmp_path / "a.safetensors")
    lorafx.load(net, tmp_path / "a.safetensors", adapter="more")
    assert lorafx.adapters(net) == ["default", "more"] and net(x).shape == (3, 4)


@pytest.mark.parametrize(
    "header, scale",
    [
        ({"transformer.r": 2, "transformer.lora_alpha": 8}, 4.0),
        ({"unet.r": 2, "unet.lora_alpha": 8}, 1.0),
    ],
)
def test_the_scale_in_diffusers_header(tmp_path, header, scale):
    tensors = {"transformer.down_blocks.0.to_q.lora_A.weight": torch.randn(2, 4),
               "transformer.down_blocks.0.to_q.lora_B.weight": torch.randn(4, 2)}
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(tensors, path, {"lora_adapter_metadata": json.dumps(header)})
    assert lorafx.load(Net(), path).down_blocks[0].to_q.lora.default.scale == scale
    for more, message in (
        ({"transformer.use_rslora": True}, "^The header of '[^']*' asks for use_rslora"),
        ({"transformer.r": 0}, "is damaged"),
    ):
        safetensors.torch.save_file(tensors, path, {"lora_adapter_metadata": json.dumps(
            {"transformer.lora_alpha": 8, "transformer.r": 2} | more)})
        with pytest.raises(lorafx.FormatError, match=message):
            lorafx.load(Net(), path)


def halves(stem, shape=(2, 4), **more):
    return {
        f"{stem}.lora_down.weight": torch.zeros(shape),
        f"{stem}.lora_up.weight": torch.zeros(4, 2),
        **more,
    }


WRONG = {
    "ambiguous": (
        Ambiguous, halves("lora_unet_a_b"), lorafx.MismatchError, "may mean 'a.b', 'a_b'"
    ),
    "unknown": (
        Net, halves("lora_unet_down_blocks_7_to_q"), lorafx.MismatchError, "means no module of this"
    ),
    "half": (
        Net, {"lora_unet_down_blocks_0_to_q.lora_up.weight": torch.zeros(4, 2)}, lorafx.FormatError,
        "only B of"
    ),
    "extra": (
        Net, halves("lora_unet_down_blocks_0_to_q", x=torch.zeros(1)), lorafx.FormatError,
        "a tensor 'x', which"
    ),
    "a convolution": (
        Net, halves("lora_unet_down_blocks_0_to_q", (2, 4, 3, 3)), lorafx.FormatError,
        "adapts 1 of its 1 weights as convolutions"
    ),
    "several networks": (
        Net, halves("lora_te1_down_blocks_0_to_q") | halves("lora_te2_down_blocks_1_to_q"),
        lorafx.MismatchError, "holds adapters for 'text_encoder' and 'text_encoder_2': load each"
    ),
    "another prefix": (
        Net, halves("decoder.down_blocks.0.to_q"), lorafx.MismatchError, "means no module of this"
    ),
    "PEFT's": (
        Net, {"base_model.model.down_blocks.0.to_q.lora_A.weight": torch.zeros(2, 4)},
        lorafx.FormatError, "holds PEFT's tensors without its config"
    ),
    "alpha": (
        Net,
        halves(
            "lora_unet_down_blocks_0_to_q", **{"lora_unet_down_blocks_0_to_q.alpha": torch.zeros(2)}
        ),
        lorafx.FormatError, "alpha of shape"
    ),
    "twice": (
        Net, halves("lora_unet_down_blocks_0_to_q") | halves("down_blocks.0.to_q"),
        lorafx.MismatchError, "means no module of this"
    ),
    "two ways": (
        Net,
        halves("down_blocks.0.to_q", **{"down_blocks.0.to_q.lora_A.weight": torch.zeros(2, 4)}),
        lorafx.FormatError, "two tensors for the A of"
    ),
}


@pytest.mark.parametrize("build, tensors, error, message", WRONG.values(), ids=WRONG)
def test_what_is_wrong(tmp_path, build, tensors, error, message):
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(error, match=message):
        lorafx.load(build(), tmp_path / "a.safetensors")


@pytest.mark.parametrize("about, scale", [
    ({"r": 2, "lora_alpha": 8}, 4.0), ({"r": 2, "lora_alpha": 8, "use_rslora": True}, None)])
def test_the_config_of_one_model_of_diffusers(
    tmp_path: Path, about: dict[str, object], scale: float | None
) -> None:
    base, x = nn.Sequential(nn.Linear(4, 5)), torch.randn(2, 4)
    A, B = torch.randn(2, 4), torch.randn(5, 2)
    safetensors.torch.save_file(
        {"0.lora_A.weight": A, "0.lora_B.weight": B}, tmp_path / "a.safetensors",
        {"lora_adapter_metadata": json.dumps(about)}
    )
    if scale is None:
        with pytest.raises(lorafx.FormatError, match="asks for use_rslora"):
            lorafx.load(base, tmp_path / "a.safetensors")
    else:
        loaded = lorafx.load(base, tmp_path / "a.safetensors")
        assert torch.allclose(loaded(x), base(x) + scale * x @ A.T @ B.T, atol=1e-5)
