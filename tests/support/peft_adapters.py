"""A model with every kind of weight that PEFT adapts, and adapters that PEFT saved."""

import copy
from pathlib import Path

import peft
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

WIDTH = 6


class Mixing(nn.Module):
    """Two parameters of its own: y = tanh(x U^T) V."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(WIDTH + 2, WIDTH) / 3)
        self.down = nn.Parameter(torch.randn(WIDTH + 2, WIDTH) / 3)

    def forward(self, x):
        return torch.tanh(F.linear(x, self.up)) @ self.down


class Experts(nn.Module):
    """Stacks of weights, stored (experts, out, in) or, transposed, (experts, in, out)."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.first = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / 3)
        self.second = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / 3)

    def forward(self, x):
        flat = x.flatten(0, -2).expand(3, -1, -1)
        for weight in (self.first, self.second):
            flat = torch.tanh(torch.bmm(flat, weight if self.is_transposed else weight.mT))
        return flat.sum(0).view(x.shape)


KINDS = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH), "bare": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "conv": lambda: Conv1D(WIDTH, WIDTH),
    "wide": lambda: nn.Sequential(Conv1D(WIDTH + 3, WIDTH), nn.GELU(), nn.Linear(WIDTH + 3, WIDTH)),
    "mixing": Mixing, "experts": lambda: Experts(False), "turned": lambda: Experts(True),
    "norm": lambda: nn.LayerNorm(WIDTH),
}


class Net(nn.Module):
    """Layers one after the other, each by its name."""

    def __init__(self, kinds: list[str]) -> None:
        super().__init__()
        self.body = nn.ModuleDict(
            {f"{kind}{place}": KINDS[kind]() for place, kind in enumerate(kinds)}
        )
        self.linear0 = nn.Linear(WIDTH, WIDTH)  # its name also ends that of a layer
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x):
        for layer in self.body.values():
            x = x + layer(x)
        return self.head(self.linear0(x))


def stir(model: nn.Module, words: tuple[str, ...]) -> None:
    """Other values for every parameter of a PEFT model whose name has one of these words."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(word in name for word in words):
                parameter.copy_(torch.randn_like(parameter) / 2)


def saved_by_peft(net: nn.Module, folder: Path, **config) -> nn.Module:
    """A PEFT model, with other values, that was saved to a folder."""
    model = peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(**config))
    stir(model, ("lora_",))
    model.save_pretrained(folder)
    return model
