"""How a batch whose rows use adapters of their own is measured: compare, then time in rounds."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

import lorafx
from common.contenders import BASE, LORAFX, PEFT
from common.llama import VOCABULARY, frozen_llama
from common.timing import interleaved, median, ratio, share, thread_seconds
from serve_parts.contenders import LOOP, Assignment, contenders

RANK = 8
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}  # of results, relative to the largest


@dataclasses.dataclass(frozen=True)
class Case:
    """So many adapters on the rows of a batch, in turn; tokens at once, `before` others cached.

    Without layers it is one linear layer.
    """

    name: str
    width: int
    layers: int
    tokens: int
    before: int
    adapters: int
    rows: int
    rounds: int
    repeats: int  # forwards that are timed as one
    dtype: str = "float32"  # of the base; A and B are float32

    @property
    def label(self) -> str:
        """All that distinguishes the case."""
        narrow = "" if self.dtype == "float32" else f", {self.dtype}"
        return (f"{self.name}, width {self.width}{narrow}, {self.adapters} on {self.rows} rows of "
                f"{self.tokens}")

    @property
    def base(self) -> nn.Module:
        """The frozen base, always the same."""
        return frozen_llama(self.width, self.layers).to(getattr(torch, self.dtype))


def grid() -> tuple[Case, ...]:
    """What is measured by default."""
    cases = [Case("decoding", 256, 6, 1, 32, 8, 16, 12, 1, "bfloat16")]
    for adapters, rows, rounds in ((1, 16, 16), (8, 16, 16), (32, 32, 8)):
        cases.append(Case("decoding", 256, 6, 1, 32, adapters, rows, rounds, 1))
        cases.append(Case("prefill", 256, 6, 64, 0, adapters, rows, rounds // 2, 1))
    for adapters, rows in ((8, 16), (32, 32)):
        cases.append(Case("layer", 256, 0, 1, 0, adapters, rows, 40, 20))
        cases.append(Case("layer", 256, 0, 64, 0, adapters, rows, 16, 1))
    return tuple(cases)


CASES = grid()
TINY = (Case("layer", 64, 0, 1, 0, 2, 4, 3, 1),
        Case("decoding", 64, 1, 1, 4, 3, 4, 3, 1, "bfloat16"),
        Case("prefill", 64, 1, 8, 0, 2, 4, 3, 1))


def forward_of(case: Case, model: nn.Module, rows: Sequence[int],
               **options: Any) -> Callable[[], Tensor]:
    """A forward of some rows of a case, without gradients, that leaves the cache as it was."""
    generator = torch.Generator().manual_seed(0)
    if not case.layers:
        x = torch.randn(case.rows, case.tokens, case.width, generator=generator)[list(rows)]
        return torch.no_grad()(partial(model, x.to(next(model.parameters()).dtype), **options))
    length = case.before + case.tokens
    tokens = torch.randint(VOCABULARY, (case.rows, length), generator=generator)[list(rows)]
    earlier, now = tokens.split([case.before, case.tokens], dim=1)
    cache: Any = DynamicCache() if case.before else None

    @torch.no_grad()
    def forward() -> Tensor:
        if cache is not None and not cache.get_seq_length():
            model(earlier, past_key_values=cache, use_cache=True, **options)
        logits: Tensor = model(now, past_key_values=cache, use_cache=True, **options).logits
        if cache is not None:
            cache.crop(-case.tokens)
        return logits

    return forward


def looped(case: Case, model: nn.Module, assignment: Assignment) -> Callable[[], Tensor]:
    """A forward for each adapter that is used, of its rows, and the results in their places."""
    forwards = {}
    for name in dict.fromkeys(assignment.rows):
        rows = assignment.rows_of(name)
        forwards[name] = torch.tensor(rows), forward_of(case, model, rows)

    def forward() -> Tensor:
        whole: Any = None
        for name, (rows, forward) in forwards.items():
            lorafx.activate(model, name)
            part = forward()
            if whole is None:
                whole = part.new_empty(case.rows, *part.shape[1:])
            whole[rows] = part
        found: Tensor = whole
        return found

    return forward


def true_result(case: Case, assignment: Assignment) -> Tensor:
    """What the base with W + s B A gives in float64, for each row."""
    whole: Any = None
    for name in dict.fromkeys(assignment.rows):
        wide, adapters = case.base.double(), assignment.adapters[name]
        for layer, (A, B) in adapters.values.items():
            weight: Any = wide.get_submodule(layer).weight
            weight.add_(adapters.scale * (B.double() @ A.double()))
        rows = assignment.rows_of(name)
        part = forward_of(case, wide, rows)()
        if whole is None:
            whole = part.new_empty(case.rows, *part.shape[1:])
        whole[rows] = part
    found: Tensor = whole
    return found


def judge(case: Case, found: Tensor, true: Tensor) -> str:
    """Why a contender's row is void; empty if it computes what it should."""
    error = ((found.double() - true).abs().max() / true.abs().max()).item()
    sound = error <= TOLERANCES[case.dtype]
    return "" if sound else f"its result has a relative error of {error:.1e}"


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """All about one case, as plain data."""
    base = case.base
    assignment = Assignment.draw(base, case.adapters, case.rows, RANK)
    models, every = contenders(base, assignment), range(case.rows)
    calls = {
        BASE: forward_of(case, models[BASE], every),
        PEFT: forward_of(case, models[PEFT], every, adapter_names=list(assignment.rows)),
        LOOP: looped(case, models[LOOP], assignment),
        LORAFX: forward_of(case, models[LORAFX], every)}
    true = true_result(case, assignment)
    void = {name: judge(case, call(), true) for name, call in calls.items() if name != BASE}
    times = interleaved({name: partial(thread_seconds, call, case.repeats)
                         for name, call in calls.items()}, rounds)
    rows = {}
    for name, found in times.items():
        rows[name] = {"least": min(found), "median": median(found), "times": found,
                      "void": void.get(name, "")}
    return {"label": case.label, **dataclasses.asdict(case), "results": rows,
            "faster": {name: ratio(times[name], times[LORAFX]) for name in (PEFT, LOOP)},
            "over_base": ratio(times[LORAFX], times[BASE]),
            "of_peft": share(times[LORAFX], times[PEFT], times[BASE])}
