"""Where lorafx's constant comes from: from how many rows of x on W + s B A is faster formed than kept in factors.

Both ways need as many FLOPs when N (in + out) = 2 in out. Timed are forward and backward, with dX, dA and dB, of one
linear call and of three that share x, at multiples of that N, both ways in the same rounds: above 1, forming is faster.
"""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from report import aligned
from step_contenders import draw, injected
from step_measure import Interval, interleaved, ratio, seconds
from torch import Tensor, nn
from tqdm import tqdm

from lorafx import _kernels

SHAPES = ((512, 512), (512, 1408), (1408, 512), (1024, 1024))
RANKS, CALLS, MULTIPLES = (4, 16, 64), (1, 3), (0.5, 1.0, 2.0, 4.0, 8.0)


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


def forced(step: Callable[[], Any], threshold: float) -> Any:
    """A step with another constant in the place of lorafx's."""
    kept = _kernels.MERGE_FROM
    _kernels.MERGE_FROM = threshold
    try:
        return step()
    finally:
        _kernels.MERGE_FROM = kept


def compare(into: int, out: int, rank: int, calls: int, multiple: float, rounds: int, sample: float) -> Interval:
    """The time in factors over the time with W + s B A formed, in float32; a sample takes so many seconds at least."""
    torch.manual_seed(0)
    base = (One if calls == 1 else Three)(into, out)
    names = [name for name, _ in base.named_children()]
    model, pairs = injected(base, draw(base, names, rank))
    rows = round(multiple * 2 * into * out / (into + out))
    x, gradient = torch.randn(rows, into, requires_grad=True), torch.randn(rows, out)
    leaves = [x, *itertools.chain(*pairs.values())]

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(model(x), leaves, gradient)

    ways = {"factors": partial(forced, step, math.inf), "formed": partial(forced, step, 0.0)}
    for found, true in zip(*(way() for way in ways.values())):
        torch.testing.assert_close(found, true, rtol=1e-3, atol=1e-3 * true.abs().max().item())
    repeats = max(1, round(sample / seconds(ways["formed"], x.device, 2)))
    times = interleaved({name: partial(seconds, way, x.device, repeats) for name, way in ways.items()}, rounds)
    return ratio(times["factors"], times["formed"])


def table(rounds: int = 8, shapes: tuple[tuple[int, int], ...] = SHAPES, sample: float = 0.03) -> str:
    """The ratios as text: a line for each shape, rank and number of calls, a column for each multiple."""
    body = []
    for (into, out), rank, calls in tqdm(list(itertools.product(shapes, RANKS, CALLS)), unit="line"):
        found = [compare(into, out, rank, calls, multiple, rounds, sample) for multiple in MULTIPLES]
        body.append([f"in {into}, out {out}, rank {rank}, {calls} on one x",
                     *(f"{middle:.2f} [{low:.2f}, {high:.2f}]" for middle, low, high in found)])
    header = ["in factors / formed, by N (in + out) / (2 in out)", *(f"{multiple:g}" for multiple in MULTIPLES)]
    return f"{aligned(header, body)}\nlorafx forms it from {_kernels.MERGE_FROM:g} on."
