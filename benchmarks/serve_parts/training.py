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
from serve_parts.contenders import Assignment, MixedLinear, lorafx_model, mixed_model
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


CASES = (Training(256, 6, 64, 8, 16, 12), Training(512, 4, 128, 8, 8, 8))
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


def trained(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """{layer: its A and B} of the kernel's model."""
    return {name: [*layer.As, *layer.Bs] for name, layer in model.named_modules()
            if isinstance(layer, MixedLinear)}


def judge(mixed: nn.Module, base: nn.Module, assignment: Assignment, tokens: Tensor) -> str:
    """Why the kernel's gradients are void: each must be that of the adapter's own rows alone."""
    mean_loss(mixed, tokens).backward()
    for index, name in enumerate(assignment.adapters):
        rows = assignment.rows_of(name)
        alone: Any = lorafx_model(copy.deepcopy(base), assignment).train()
        lorafx.activate(alone, name)
        (mean_loss(alone, tokens[rows]) * len(rows) / len(tokens)).backward()
        own = dict(lorafx.named_parameters(alone))
        for layer, factors in trained(mixed).items():
            count = len(factors) // 2
            for factor, kind in ((factors[index], "A"), (factors[count + index], "B")):
                true, found = own[f"{layer}.lora.{name}.{kind}"].grad, factor.grad
                error = ((found - true).abs().max() / true.abs().max()).item()
                if error > TOLERANCE:
                    return f"a gradient of {name} at {layer} has a relative error of {error:.1e}"
    mixed.zero_grad()
    return ""


def measure(case: Training, rounds: int) -> dict[str, Any]:
    """All about one case, as plain data."""
    base = frozen_llama(case.width, case.layers).train()
    assignment = Assignment.draw(base, case.adapters, case.rows, RANK)
    single = Assignment.draw(base, 1, case.rows, RANK)
    tokens = torch.randint(VOCABULARY, (case.rows, case.tokens))
    mixed = mixed_model(copy.deepcopy(base), assignment).train()
    for layer in trained(mixed).values():
        for factor in layer:
            factor.requires_grad_()
    one = lorafx_model(copy.deepcopy(base), single).train()
    void = judge(mixed, base, assignment, tokens)
    every = [factor for factors in trained(mixed).values() for factor in factors]
    calls = {ONE: step_of(one, list(lorafx.parameters(one)), tokens),
             LORAFX: step_of(mixed, every, tokens)}
    times = interleaved({name: partial(thread_seconds, call, 1)
                         for name, call in calls.items()}, rounds)
    rows = {name: {"least": min(found), "median": median(found), "times": found}
            for name, found in times.items()}
    return {"label": case.label, **dataclasses.asdict(case), "rows": rows, "void": void,
            "over_one": ratio(times[LORAFX], times[ONE])}
