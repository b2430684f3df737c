"""A model of two layers, its adapters, and changes to the files that they are saved in."""

import json
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

import lorafx
from tests.support.oracle import randomise


class Model(nn.Module):
    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.up = nn.Linear(width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.up(x)))


def injected(**config: object) -> nn.Module:
    return randomise(lorafx.inject(Model(), rank=2, targets="linear", **config))


def edit(path: Path, change: object) -> None:
    """Rewrite a native file with its tensors and header passed through a function."""
    with safetensors.safe_open(path, "pt") as file:
        tensors, header = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    change(tensors, header)
    safetensors.torch.save_file(tensors, path, header)


def edit_about(**values: object) -> object:
    def change(tensors: dict, header: dict) -> None:
        about = json.loads(header["adapter"])
        about.update(values)
        header["adapter"] = json.dumps(about)
    return change
