"""Compiled and as they are: the base, one adapter, and rows of a batch with adapters of their own.
"""

import dataclasses
from functools import partial
from typing import Any

import torch
from torch import nn

from common.contenders import BASE, LORAFX
from common.timing import interleaved, median, ratio, thread_seconds
from serve_parts.contenders import Assignment, WithRows, lorafx_model
from serve_parts.run import RANK, Case, forward_of, judge

ONE, EAGER, COMPILED = "one adapter", "as it is", "compiled"
WAYS = (BASE, ONE, LORAFX)


@dataclasses.dataclass(frozen=True)
class Compiled(Case):
    """A case that a backend of torch.compile compiles."""

    backend: str = "inductor"

    @property
    def label(self) -> str:
        """All that distinguishes the case."""
        return f"{super().label}, {self.layers} layers"


CASES = (Compiled("decoding", 256, 2, 1, 32, 8, 16, 20, 1),
         Compiled("prefill", 256, 2, 64, 0, 8, 16, 10, 1))
TINY = (Compiled("layer", 64, 0, 1, 0, 2, 4, 3, 1, backend="eager"),)


def models(case: Case, assignment: Assignment) -> dict[str, nn.Module]:
    """{way: its model}, of bases with the same weights."""
    found = {BASE: case.base}
    for way in (ONE, LORAFX):
        found[way] = lorafx_model(case.base, assignment).eval()
    return found


def measure(case: Compiled, rounds: int) -> dict[str, Any]:
    """All about one case, as plain data."""
    torch.compiler.reset()
    assignment = Assignment.draw(case.base, case.adapters, case.rows, RANK)
    calls, void = {}, {}
    for way, model in models(case, assignment).items():
        again: Any = torch.compile(model, backend=case.backend, isolate_recompiles=True)
        both: list[Any] = [model, again]
        if way == LORAFX:
            both = [WithRows(one, assignment.rows) for one in both]
        plain, compiled = [forward_of(case, one, range(case.rows)) for one in both]
        wanted = plain()
        for _ in range(3):  # the cache has other strides after its first use
            found = compiled()
        void[way] = judge(case, found, wanted.double())
        calls |= {f"{way}, {EAGER}": plain, f"{way}, {COMPILED}": compiled}
    times = interleaved({name: partial(thread_seconds, call, case.repeats)
                         for name, call in calls.items()}, rounds)
    rows = {name: {"least": min(found), "median": median(found), "times": found}
            for name, found in times.items()}
    return {"label": case.label, **dataclasses.asdict(case), "results": rows, "void": void,
            "faster": {way: ratio(times[f"{way}, {EAGER}"], times[f"{way}, {COMPILED}"])
                       for way in WAYS}}
