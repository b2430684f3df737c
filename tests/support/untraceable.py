"""Forwards in which Python decides something: the table, and the module that each becomes part of.

Each makes a linear call of its own, so that a tracer that accepted it would write a branch into it,
and comes with argument lists to call it with, chosen to change what Python decides.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

UNTRACEABLE: list[Any] = []


class Settings:
    scale = 3.0

    def __init__(self) -> None:
        self.act = torch.tanh

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        self.act = torch.relu
        return x


def rows(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, 3, dtype=dtype, generator=torch.Generator().manual_seed(len(shape)))


def untraceable(
    reason: str, *calls: Any, change: Callable[[nn.Module], Any] | None = None
) -> Callable[[Any], Any]:
    """Register a forward with the reason why it must be refused, and argument lists for calls."""
    def register(forward: Any) -> Any:
        arguments = calls or [(rows(2),), (rows(4, 2),)]
        UNTRACEABLE.append(pytest.param(forward, reason, arguments, change, id=forward.__name__))
        return forward
    return register


def build(forward: Any) -> nn.Module:
    own = {"forward": forward, "helped": lambda self, x, scale: x * scale, "__module__": __name__,
           "computed": property(lambda self: self.scale if self.training else 3.0)}
    model = type("Untraceable", (nn.Module,), own)()
    model.fc = nn.Linear(3, 3)
    model.w = nn.Parameter(torch.randn(3, 3))
    model.register_buffer("counter", torch.zeros(()))
    model.settings, model.scale, model.calls, model.aux = Settings(), 2.0, [], None
    model.accumulate, model.project = Accumulating(), Project()
    return model.double()


class Accumulating(nn.Module):
    def forward(self, x, into):
        into.append(x.sum())
        return x * 2


class Project(nn.Module):
    def project(self, x):
        return x * 3
