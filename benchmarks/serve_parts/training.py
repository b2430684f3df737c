"""What a training step costs in which each row of the batch trains an adapter of its own.

It is compared with the step of one adapter on as many tokens, by lorafx as it is called.
"""

import copy
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import lorafx
from common.contenders import LORAFX
from common.llama import VOCABULARY, frozen_llama
from common.timing import interleaved, median, ratio, thread_seconds
from serve_parts.contenders import Assignment, WithRows, lorafx_model, rows_model
from serve_parts.run import RANK

ONE = "one adapter"
TOLERANCE = 1e-5  # of gradients, relative to the largest


@dataclasses.dataclass(frozen=True)
class Training:
    """So many adapters on the rows of a batch, in turn, through a Llama."""

    width: int
    layers: int
    tokens: int
    adapters: int
    rows: int
    rounds: int

    @property
    def label(self) -> str:
        """All that distinguishes the case."""
        return (f"training, width {self.width}, {self.adapters} on {self.rows} rows of "
                f"{self.tokens}")


CASES = (Training(256, 6, 64, 8, 16, 10), Training(512, 4, 128, 8, 8, 6))
TINY = (Training(64, 1, 8, 3, 6, 3),)


def mean_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Cross entropy of each next token, the mean over the batch."""
    loss: Tensor = model(tokens, labels=tokens).loss
    return loss


def step_of(model: nn.Module, parameters: list[nn.Parameter],
            tokens: Tensor) -> Callable[[], None]:
    """Forward, backward and AdamW."""
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)

    def step() -> None:
        mean_loss(model, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def judge(mixed: WithRows, base: nn.Module, assignment: Assignment, tokens: Tensor) -> str:
    """Why the gradients are void: each must be that of the adapter's own rows alone."""
    mean_loss(mixed, tokens).backward()
    gradients = {name: factor.grad for name, factor in lorafx.named_parameters(mixed.model)}
    for adapter in assignment.adapters:
        rows = assignment.rows_of(adapter)
        alone: Any = lorafx_model(copy.deepcopy(base), assignment).train()
        lorafx.activate(alone, adapter)
        (mean_loss(alone, tokens[rows]) * len(rows) / len(tokens)).backward()
        for name, own in lorafx.named_parameters(alone):
            true, found = own.grad, gradients[name]
            assert true is not None and found is not None
            error = ((found - true).abs().max() / true.abs().max()).item()
            if error > TOLERANCE:
                return f"a gradient of {name} has a relative error of {error:.1e}"
    mixed.zero_grad()
    return ""


def measure(case: Training, rounds: int) -> dict[str, Any]:
    """All about one case, as plain data."""
    base = frozen_llama(case.width, case.layers).train()
    assignment = Assignment.draw(base, case.adapters, case.rows, RANK)
    single = Assignment.draw(base, 1, case.rows, RANK)
    tokens = torch.randint(VOCABULARY, (case.rows, case.tokens))
    mixed = rows_model(copy.deepcopy(base), assignment).train()
    one = lorafx_model(copy.deepcopy(base), single).train()
    void = judge(mixed, base, assignment, tokens)
    every = list(lorafx.parameters(mixed.model))
    calls = {ONE: step_of(one, list(lorafx.parameters(one)), tokens),
             LORAFX: step_of(mixed, every, tokens)}
    times = interleaved({name: partial(thread_seconds, call, 1)
                         for name, call in calls.items()}, rounds)
    rows = {name: {"least": min(found), "median": median(found), "times": found}
            for name, found in times.items()}
    return {"label": case.label, **dataclasses.asdict(case), "results": rows, "void": void,
            "over_one": ratio(times[LORAFX], times[ONE])}
