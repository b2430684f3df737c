"""Where lorafx's constants come from: which way to compute a linear call and its branch is faster.

Timed are forward and backward, with dX, dA and dB, both ways in the same rounds. Of W + s B A
formed against kept in factors: of one linear call and of three that share x, at multiples of the N
where both need as many FLOPs, which is N (in + out) = 2 in out. Of one call in lorafx's own
Function against torch's derivative: at sizes N (in + out). Of few columns, factors and ranks by
rows against by columns: at sizes N in.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from common.contenders import draw, injected
from common.progress import progress
from common.tables import aligned, interval
from common.timing import Interval, interleaved, ratio, seconds
from lorafx._kernels import linears, products

SHAPES = ((512, 512), (512, 1408), (1408, 512), (1024, 1024))
RANKS, MULTIPLES, SIZES = (4, 8, 16, 64), (0.5, 1.0, 2.0, 4.0, 8.0), (16, 17, 18, 19, 20, 21)


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
        self.second = nn.Linear(into, out, bias=False)
        self.third = nn.Linear(into, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (rows, in) -> (rows, out)."""
        return self.first(x) + self.second(x) + self.third(x)


# The constants that make lorafx choose one way, whatever the shapes.
FORMED = {"MERGE_FROM": 0.0}
FACTORS: dict[str, float] = {"MERGE_FROM": math.inf, "SMALL_BELOW": 0}
IN_PLACE = {"MERGE_FROM": math.inf, "SMALL_BELOW": math.inf}
BY_ROWS = {**FACTORS, "FEW_COLUMNS": 0}
BY_COLUMNS = {**FACTORS, "FEW_COLUMNS": math.inf, "MANY_ROWS": 0, "IN_CACHE": math.inf}
MODULES = {"MERGE_FROM": linears, "SMALL_BELOW": linears,
           "FEW_COLUMNS": products, "MANY_ROWS": products, "IN_CACHE": products}


def forced(step: Callable[[], Any], constants: Mapping[str, float]) -> Any:
    """A step with other constants in the place of lorafx's."""
    original = {name: getattr(MODULES[name], name) for name in constants}
    for name, value in constants.items():
        setattr(MODULES[name], name, value)
    try:
        return step()
    finally:
        for name, value in original.items():
            setattr(MODULES[name], name, value)


@dataclasses.dataclass(frozen=True)
class Timing:
    """How long to measure: rounds, and the least seconds of what is timed as one."""

    rounds: int = 8
    sample: float = 0.03


def compare(base: nn.Module, shape: tuple[int, int], rank: int, rows: int,
            slow: Mapping[str, float], fast: Mapping[str, float], timing: Timing) -> Interval:
    """The time in one way over the other, in float32, for (in, out) features: above 1, fast is."""
    names = [name for name, _ in base.named_children()]
    model, pairs = injected(base, draw(base, names, rank))
    x, gradient = torch.randn(rows, shape[0], requires_grad=True), torch.randn(rows, shape[1])
    leaves = [x, *itertools.chain(*pairs.values())]

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(model(x), leaves, gradient)

    calls = {"slow": partial(forced, step, slow), "fast": partial(forced, step, fast)}
    for found, true in zip(calls["slow"](), calls["fast"]()):
        torch.testing.assert_close(found, true, rtol=1e-3, atol=1e-3 * true.abs().max().item())
    repeats = max(1, round(timing.sample / seconds(calls["fast"], x.device, 2)))
    samples = {name: partial(seconds, call, x.device, repeats) for name, call in calls.items()}
    times = interleaved(samples, timing.rounds)
    return ratio(times["slow"], times["fast"])


def formed(shape: tuple[int, int], rank: int, calls: int, timing: Timing) -> list[Interval]:
    """In factors over formed, at each multiple."""
    into, out = shape
    base = (One if calls == 1 else Three)(into, out)
    found = []
    for multiple in MULTIPLES:
        rows = round(multiple * 2 * into * out / (into + out))
        found.append(compare(base, shape, rank, rows, FACTORS, FORMED, timing))
    return found


def in_place(shape: tuple[int, int], rank: int, calls: int, timing: Timing) -> list[Interval]:
    """By lorafx's Function over torch's derivative, at each size."""
    found = []
    for size in SIZES:
        rows = (1 << size) // sum(shape)
        found.append(compare(One(*shape), shape, rank, rows, FACTORS, IN_PLACE, timing))
    return found


def by_columns(shape: tuple[int, int], rank: int, calls: int, timing: Timing) -> list[Interval]:
    """Factors and ranks by rows over by columns, at each size of x."""
    found = []
    for size in SIZES:
        rows = (1 << size) // shape[0]
        found.append(compare(One(*shape), shape, rank, rows, BY_ROWS, BY_COLUMNS, timing))
    return found


def table(timing: Timing = Timing(), shapes: Sequence[tuple[int, int]] = SHAPES) -> str:
    """The ratios as text: a line for each shape, rank and number of calls, and what lorafx does."""
    torch.manual_seed(0)
    multiples = [f"{multiple:g}" for multiple in MULTIPLES]
    sizes = [f"2^{size}" for size in SIZES]
    first = lines(formed, (1, 3), timing, shapes)
    second = lines(in_place, (1,), timing, shapes)
    third = lines(by_columns, (1,), timing, shapes)
    return "\n".join([
        aligned(["in factors / formed, by N (in + out) / (2 in out)", *multiples], first),
        f"lorafx forms it from {linears.MERGE_FROM:g} on.", "",
        aligned(["Function / torch's derivative, by N (in + out)", *sizes], second),
        f"lorafx leaves it to torch below 2^{math.log2(linears.SMALL_BELOW):g}.", "",
        aligned(["ranks by rows / by columns, by N in", *sizes], third),
        f"lorafx lays them out by columns below rank {products.FEW_COLUMNS}, from "
        f"{products.MANY_ROWS} rows on; x A^T too below 2^{math.log2(products.IN_CACHE):g}."])


def lines(ratios: Callable[..., list[Interval]], calls: Sequence[int], timing: Timing,
          shapes: Sequence[tuple[int, int]]) -> list[list[str]]:
    """A table's rows: for each shape, rank and number of calls the ratios with their intervals."""
    rows = []
    for shape, rank, count in progress(list(itertools.product(shapes, RANKS, calls)), unit="line"):
        found = ratios(shape, rank, count, timing)
        rows.append([f"in {shape[0]}, out {shape[1]}, rank {rank}, {count} on one x",
                     *(interval(one, 2) for one in found)])
    return rows
