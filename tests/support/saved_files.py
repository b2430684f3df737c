"""Small models and adapters made of fixed numbers, and the files that `lorafx.save` makes of them.

`tests/formats/saved` holds the files of the writer of November 2026, made by
`python -m tests.support.saved_files FOLDER`; a test loads them, and holds the writer of today
against them.
"""

import random
import sys
from pathlib import Path

import numpy
import torch
from torch import nn

import lorafx


class Plain(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 7)
        self.down = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


class Transposed(nn.Module):
    """y = x W + b, as in transformers' Conv1D."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.empty(out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Unusual(nn.Module):
    """Rows of one matrix that are three, a square weight stored as (in, out), and experts."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(5, 15)
        self.conv = Transposed(5, 5)
        self.experts = nn.Parameter(torch.empty(2, 3, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        x = self.conv(q * k + v)
        return torch.bmm(x.expand(2, -1, -1), self.experts.mT)


def fill(parameters: dict[str, nn.Parameter], shift: int = 0) -> None:
    """Give every parameter values of its own, multiples of 1/16 that float16 holds exactly."""
    with torch.no_grad():
        for position, parameter in enumerate(parameters.values(), shift):
            parameter.copy_(numbers(parameter.shape, position))


def numbers(shape: torch.Size, shift: int) -> torch.Tensor:
    """Multiples of 1/16 between -1/2 and 1/2 in a mixed order, another for each shift."""
    places = torch.arange(shape.numel(), dtype=torch.float64)
    return (((places * 37 + shift * 5) % 17) - 8).reshape(shape) / 16


def filled(model: nn.Module) -> nn.Module:
    """The model in float64, in eval, with fixed numbers for its parameters."""
    model = model.double().eval()
    fill(dict(model.named_parameters()))
    return model


def native() -> nn.Module:
    """An adapter with most settings, a dtype of its own and a layer trained whole."""
    model = lorafx.inject(
        filled(Plain()), 4, targets="up", alpha=8, rslora=True, dropout=0.25,
        rank_pattern={"up": 3}, alpha_pattern={"up": 6}, trainable="down", dtype=torch.float32,
        adapter="french")
    fill(dict(lorafx.named_parameters(model)), 3)
    return model


def unusual() -> nn.Module:
    """An adapter of blocks of rows, of a square weight stored as (in, out), and of experts."""
    targets = ["qkv[q]", "qkv[7:12]", "conv", "experts"]
    model = lorafx.inject(filled(Unusual()), 2, targets=targets, alpha=3)
    fill(dict(lorafx.named_parameters(model)), 7)
    return model


def training() -> tuple[nn.Module, torch.optim.Optimizer, int]:
    """An adapter after seven steps of AdamW in two groups, and seeded random generators."""
    model = lorafx.inject(filled(Plain()).float(), 2, targets="up", trainable="down")
    named = dict(lorafx.named_parameters(model))
    fill(named, 1)
    factors = [parameter for name, parameter in named.items() if ".lora." in name]
    others = [parameter for name, parameter in named.items() if ".lora." not in name]
    groups = [{"params": factors, "lr": 0.125}, {"params": others, "betas": (0.75, 0.875)}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.5)
    for shift, parameter in enumerate(named.values(), 20):
        optimizer.state[parameter] = {
            "step": torch.tensor(7.0), "exp_avg": numbers(parameter.shape, shift).float(),
            "exp_avg_sq": numbers(parameter.shape, shift + 20).float().square()}
    torch.manual_seed(11)
    random.seed(12)
    numpy.random.seed(13)
    torch.rand(3)
    random.gauss(0, 1)
    return model, optimizer, 7


def minimind() -> nn.Module:
    """An adapter of scale 3, which a MiniMind file folds into B."""
    model = lorafx.inject(filled(Plain()), 2, targets="linear", alpha=6)
    fill(dict(lorafx.named_parameters(model)), 5)
    return model


def two_adapters() -> nn.Module:
    """Two adapters for one PEFT folder: one with two ranks, one with a layer trained whole."""
    model = lorafx.inject(
        filled(Plain()), 2, targets="linear", alpha=4, rank_pattern={"up": 3}, dtype=torch.float32)
    lorafx.add(model, "french", 1, targets="up", trainable="down", alpha=2, dtype=torch.float32)
    for shift, adapter in enumerate(lorafx.adapters(model), 9):
        fill(dict(lorafx.named_parameters(model, adapter)), shift)
    return model


def write(folder: Path) -> None:
    """Save all of them."""
    lorafx.save(native(), folder / "native.safetensors")
    lorafx.save(unusual(), folder / "unusual.safetensors")
    model, optimizer, step = training()
    lorafx.save(model, folder / "training.safetensors", optimizer=optimizer, step=step)
    lorafx.save(minimind(), folder / "minimind.pth")
    model = two_adapters()
    for adapter in lorafx.adapters(model):
        lorafx.save(model, folder / "peft", adapter)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
