"""MLX-LM's folders, both ways, against its documented layout: y += scale (x a) b."""

import copy
import json
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import lorafx
from tests.support.oracle import randomise


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.up = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.q(x) + self.up(x).mean(-1, keepdim=True)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(Layer() for _ in range(3)), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def written(folder: Path, npz: bool = False, **changes: object) -> dict[str, Tensor]:
    tensors = {"layers.1.q.lora_a": torch.randn(6, 2), "layers.1.q.lora_b": torch.randn(2, 6),
               "layers.2.up.lora_a": torch.randn(6, 2), "layers.2.up.lora_b": torch.randn(2, 4)}
    config = {"fine_tune_type": "lora", "num_layers": 2,
              "lora_parameters": {"rank": 2, "scale": 20.0, "dropout": 0.0}}
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    if npz:
        numpy.savez(folder / "adapters.npz", **{k: v.numpy() for k, v in tensors.items()})
    else:
        safetensors.torch.save_file(tensors, folder / "adapters.safetensors")
    return tensors


def with_deltas(net: Net, tensors: dict[str, Tensor], scale: float) -> Net:
    net = copy.deepcopy(net)
    with torch.no_grad():
        for name in {name.rpartition(".")[0] for name in tensors}:
            delta = scale * tensors[f"{name}.lora_a"] @ tensors[f"{name}.lora_b"]
            net.get_submodule(name).weight += delta.T
    return net


@pytest.mark.parametrize("npz", [False, True])
def test_a_folder_of_mlx(tmp_path: Path, npz: bool) -> None:
    net, x, tensors = Net(), torch.randn(2, 6), written(tmp_path, npz)
    torch.testing.assert_close(lorafx.load(net, tmp_path)(x), with_deltas(net, tensors, 20.0)(x),
                               rtol=1e-5, atol=1e-4)


def test_a_folder_for_mlx(tmp_path: Path) -> None:
    """One rank and one scale for all: other ranks are filled up, other scales go into b."""
    net, x = Net().double(), torch.randn(2, 6).double()
    model = randomise(lorafx.inject(net, rank=2, alpha=6, targets=["layers.1.q", "layers.2.up"],
                                    rank_pattern={"up": 3}))
    lorafx.save(model, tmp_path / "mlx", format="mlx")
    config = json.loads((tmp_path / "mlx/adapter_config.json").read_text())
    assert config["num_layers"] == 2 and config["lora_parameters"]["keys"] == ["q", "up"]
    tensors = safetensors.torch.load_file(tmp_path / "mlx/adapters.safetensors")
    assert {tensor.shape[-1] for name, tensor in tensors.items() if name.endswith("a")} == {3}
    scale = config["lora_parameters"]["scale"]
    torch.testing.assert_close(with_deltas(net, tensors, scale)(x), model(x))
    torch.testing.assert_close(lorafx.load(net, tmp_path / "mlx")(x), model(x))


@pytest.mark.parametrize("changes, message", [
    ({"fine_tune_type": "dora"}, "is MLX's 'dora'"), ({"lora_parameters": {}}, "has no scale")])
def test_what_is_wrong(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    written(tmp_path, **changes)
    with pytest.raises(lorafx.FormatError, match=message):
        lorafx.load(Net(), tmp_path)


def test_what_mlx_has_no_place_for(tmp_path: Path) -> None:
    for options, message in (({"targets": ["head"]}, "numbered layers"),
                             ({"targets": ["q"], "trainable": "head"}, "no place for a trained")):
        with pytest.raises(lorafx.FormatError, match=message):
            lorafx.save(lorafx.inject(Net(), **options), tmp_path / "mlx", format="mlx")
    assert not (tmp_path / "mlx").exists()
