"""Training runs on random numbers of three sources, and all that they depend on."""

import random
from typing import Any

import numpy
import torch
from torch import nn

CONFIG = {"rank": 2, "targets": "up", "dropout": 0.3, "trainable": "head", "adapter": "french"}


def steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any, count: int
) -> list[float]:
    """Train on random numbers of three sources: the losses."""
    losses = []
    for _ in range(count):
        x = torch.randn(4, 5) + random.gauss(0, 1) + float(numpy.random.standard_normal())
        optimizer.zero_grad()
        loss = model(x).square().mean()  # with dropout
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def scheduled(optimizer: torch.optim.Optimizer, step: int = 0) -> Any:
    """A rate that falls, from a step on."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.9**step, last_epoch=step - 1 if step else -1
    )


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    """All that a training run depends on."""
    state = optimizer.state_dict()
    numbers = numpy.random.get_state()
    return [
        *(p.detach().clone() for p in model.state_dict().values()), torch.get_rng_state(),
        random.getstate(), torch.from_numpy(numbers[1].copy()), numbers[2:], state["param_groups"],
        *(
            (n, k, v.clone() if isinstance(v, torch.Tensor) else v)
            for n, s in state["state"].items() for k, v in s.items()
        )
    ]


def same(one: Any, other: Any) -> bool:
    """Equality down to the bits of tensors."""
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)
