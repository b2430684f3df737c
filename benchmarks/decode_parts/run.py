"""How one case of the decoding benchmark is measured: compare, then time in interleaved rounds."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import lorafx
from common.contenders import (
    BASE, LORAFX, NOISE, PEFT, Adapters, draw, frozen_base, injected, make_contender, peft_model)
from common.llama import VOCABULARY, adapted_layers, frozen_llama
from common.timing import interleaved, median, share, thread_seconds

MERGED = "lorafx, merged"
BEFORE, RANK = 32, 8
TOLERANCE = 1e-4  # of logits, relative to the largest


@dataclasses.dataclass(frozen=True)
class Case:
    """Tokens at once through a Llama; `before` others are in its cache. Without layers, one
    linear layer."""

    name: str
    width: int
    layers: int
    tokens: int
    before: int
    rounds: int
    repeats: int  # forwards that are timed as one

    @property
    def label(self) -> str:
        """All that distinguishes the case."""
        return f"{self.name}, width {self.width}"


CASES = (
    Case("layer", 256, 0, 1, 0, 100, 100),
    Case("decoding", 256, 6, 1, BEFORE, 100, 5),
    Case("prefill", 256, 6, 512, 0, 30, 1),
    Case("decoding", 1024, 6, 1, BEFORE, 60, 2),
    Case("prefill", 1024, 6, 512, 0, 10, 1),
)
TINY = (Case("layer", 64, 0, 1, 0, 3, 1), Case("decoding", 64, 1, 1, 4, 3, 1),
        Case("prefill", 64, 1, 8, 0, 3, 1))


def models(base: nn.Module, adapters: Adapters) -> dict[str, nn.Module]:
    """{contender: its model}, all with the same values of A and B."""
    methods = {BASE: frozen_base, NOISE: frozen_base, PEFT: peft_model, LORAFX: injected}
    found = {name: make_contender(name, method, base, adapters).model.eval()
             for name, method in methods.items()}
    found[MERGED] = lorafx.merge(found[LORAFX]).eval()
    return found


def forward_of(case: Case, model: nn.Module) -> Callable[[], Tensor]:
    """A forward of a case, without gradients, that leaves the cache as it was."""
    if not case.layers:
        x = torch.randn(1, 1, case.width, generator=torch.Generator().manual_seed(0))
        x = x.to(next(model.parameters()).dtype)
        return torch.no_grad()(partial(model, x))
    tokens = torch.arange(case.before + case.tokens)[None] % VOCABULARY
    earlier, now = tokens.split([case.before, case.tokens], dim=1)
    cache: Any = DynamicCache() if case.before else None
    if case.before:
        with torch.no_grad():
            model(earlier, past_key_values=cache, use_cache=True)

    @torch.no_grad()
    def forward() -> Tensor:
        logits: Tensor = model(now, past_key_values=cache, use_cache=True).logits
        if cache is not None:
            cache.crop(-case.tokens)
        return logits

    return forward


def true_result(case: Case, adapters: Adapters) -> Tensor:
    """What the base with W + s B A gives in float64."""
    wide = frozen_llama(case.width, case.layers).double()
    for name, (A, B) in adapters.values.items():
        weight: Any = wide.get_submodule(name).weight
        weight.add_(adapters.scale * (B.double() @ A.double()))
    return forward_of(case, wide)()


def judge(found: Tensor, true: Tensor) -> str:
    """Why a contender's row is void; empty if it computes what it should."""
    error = ((found.double() - true).abs().max() / true.abs().max()).item()
    return "" if error <= TOLERANCE else f"its result has a relative error of {error:.1e}"


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """All about one case, as plain data."""
    base = frozen_llama(case.width, case.layers)
    adapters = draw(base, adapted_layers(base), RANK)
    calls = {name: forward_of(case, model) for name, model in models(base, adapters).items()}
    true = true_result(case, adapters)
    void = {name: judge(call(), true) for name, call in calls.items() if name not in (BASE, NOISE)}
    times = interleaved({name: partial(thread_seconds, call, case.repeats)
                         for name, call in calls.items()}, rounds)
    rows, least = {}, {name: min(found) for name, found in times.items()}
    for name, found in times.items():
        added = numpy.median(numpy.array(found) - numpy.array(times[BASE]))
        rows[name] = {"least": least[name], "median": median(found), "added": float(added),
                      "times": found, "void": void.get(name, "")}
    ours, theirs = (least[name] - least[BASE] for name in (LORAFX, PEFT))
    return {"label": case.label, **dataclasses.asdict(case), "rows": rows,
            "share": share(times[LORAFX], times[PEFT], times[BASE]),
            "share_of_least": ours / theirs}
