"""Where lorafx's constants come from: at which shapes one way to compute a linear call and its branch is the faster.

Timed are forward and backward, with dX, dA and dB, both ways in the same rounds. Of W + s B A formed against kept in
factors: of one linear call and of three that share x, at multiples of the N where both need as many FLOPs, which is
N (in + out) = 2 in out. Of one call in lorafx's own Function against torch's derivative: at sizes N (in + out).
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from report import aligned
from step_contenders import draw, injected
from step_measure import Interval, interleaved, ratio, seconds
from torch import Tensor, nn
from tqdm import tqdm

from lorafx._kernels import linears

SHAPES = ((512, 512), (512, 1408), (1408, 512), (1024, 1024))
RANKS, MULTIPLES, SIZES = (4, 16, 64), (0.5, 1.0, 2.0, 4.0, 8.0), (16, 17, 18, 19, 20, 21)


class One(nn.Module):
    """One linear call."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.first = nn.Linear(into, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (rows, in) -> (rows, out)."""
        return self.first(x)


class Three(One):
    """The sum of three linear calls of one x."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__(into, out)
        self.second, self.third = nn.Linear(into, out, bias=False), nn.Linear(into, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (rows, in) -> (rows, out)."""
        return self.first(x) + self.second(x) + self.third(x)


# How lorafx is made to choose a way, whatever the shapes.
FORMED = {"MERGE_FROM": 0.0}
FACTORS: dict[str, float] = {"MERGE_FROM": math.inf, "SMALL_BELOW": 0}
IN_PLACE = {"MERGE_FROM": math.inf, "SMALL_BELOW": math.inf}


def forced(step: Callable[[], Any], constants: Mapping[str, float]) -> Any:
    """A step with other constants in the place of lorafx's."""
    kept = {name: getattr(linears, name) for name in constants}
    for name, value in constants.items():
        setattr(linears, name, value)
    try:
        return step()
    finally:
        for name, value in kept.items():
            setattr(linears, name, value)


@dataclasses.dataclass(frozen=True)
class Timing:
    """How long to measure: rounds, and the least seconds of what is timed as one."""

    rounds: int = 8
    sample: float = 0.03


def compare(base: nn.Module, shape: tuple[int, int], rank: int, rows: int, slow: Mapping[str, float],
            fast: Mapping[str, float], timing: Timing) -> Interval:
    """The time in one way over the time in the other, in float32, with (in, out) features: above 1, `fast` is so."""
    model, pairs = injected(base, draw(base, [name for name, _ in base.named_children()], rank))
    x, gradient = torch.randn(rows, shape[0], requires_grad=True), torch.randn(rows, shape[1])
    leaves = [x, *itertools.chain(*pairs.values())]

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(model(x), leaves, gradient)

    ways = {"slow": partial(forced, step, slow), "fast": partial(forced, step, fast)}
    for found, true in zip(*(way() for way in ways.values())):
        torch.testing.assert_close(found, true, rtol=1e-3, atol=1e-3 * true.abs().max().item())
    repeats = max(1, round(timing.sample / seconds(ways["fast"], x.device, 2)))
    times = interleaved({name: partial(seconds, way, x.device, repeats) for name, way in ways.items()}, timing.rounds)
    return ratio(times["slow"], times["fast"])


def formed(shape: tuple[int, int], rank: int, calls: int, timing: Timing) -> list[Interval]:
    """In factors over formed, at each multiple."""
    into, out = shape
    base = (One if calls == 1 else Three)(into, out)
    return [compare(base, shape, rank, round(multiple * 2 * into * out / (into + out)), FACTORS, FORMED, timing)
            for multiple in MULTIPLES]


def in_place(shape: tuple[int, int], rank: int, calls: int, timing: Timing) -> list[Interval]:
    """By lorafx's Function over torch's derivative, at each size."""
    return [compare(One(*shape), shape, rank, (1 << size) // sum(shape), FACTORS, IN_PLACE, timing) for size in SIZES]


def table(timing: Timing = Timing(), shapes: Sequence[tuple[int, int]] = SHAPES) -> str:
    """The ratios as text: a line for each shape, rank and number of calls, a column for each multiple or size."""
    torch.manual_seed(0)
    texts = []
    for ratios, calls, title, columns, chosen in (
            (formed, (1, 3), "in factors / formed, by N (in + out) / (2 in out)", [f"{m:g}" for m in MULTIPLES],
             f"lorafx forms it from {linears.MERGE_FROM:g} on."),
            (in_place, (1,), "Function / torch's derivative, by N (in + out)", [f"2^{size}" for size in SIZES],
             f"lorafx leaves it to torch below 2^{math.log2(linears.SMALL_BELOW):g}.")):
        body = []
        for (into, out), rank, count in tqdm(list(itertools.product(shapes, RANKS, calls)), unit="line"):
            body.append([f"in {into}, out {out}, rank {rank}, {count} on one x", *(
                f"{middle:.2f} [{low:.2f}, {high:.2f}]"
                for middle, low, high in ratios((into, out), rank, count, timing))])
        texts.append(f"{aligned([title, *columns], body)}\n{chosen}")
    return "\n\n".join(texts)
