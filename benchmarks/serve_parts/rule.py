"""Where the kernel's constant comes from: in which form the rows of a batch take less time.

Timed is what is added to a linear call's result, without gradients: stacked, gathered, and by
segments, which lorafx does not have: rows sorted by adapter, and each adapter's products of them.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from common.progress import progress
from common.tables import aligned, interval
from common.timing import interleaved, ratio, thread_seconds
from lorafx._kernels import mixed as kernel
from lorafx._kernels.mixed import GATHERING, Gates, gathers, mixed, stacked_factors

BATCHES = ((2, 16), (8, 16), (4, 64), (32, 32))  # (adapters, rows)
WIDTHS, TOKENS, RANK = (256, 512, 1024), (1, 2, 4, 8, 16, 32, 128), 8


@dataclasses.dataclass(frozen=True)
class Timing:
    """How long to measure: rounds, and the least seconds of what is timed as one."""

    rounds: int = 9
    sample: float = 0.01


def segments(x: Tensor, y: Tensor, As: Sequence[Tensor], Bs: Sequence[Tensor],
             rows: Sequence[Tensor]) -> Tensor:
    """y with each adapter's rows added to by a product of them all."""
    for A, B, own in zip(As, Bs, rows):
        h = F.linear(x.index_select(0, own), A)
        y.index_add_(0, own, F.linear(h, B))
    return y


def forced(gathered: bool, call: Callable[[], Tensor]) -> Tensor:
    """A call of the kernel in one form."""
    with mock.patch.object(kernel, "gathers", lambda x, gates: gathered):
        return call()


@torch.no_grad()
def line(adapters: int, rows: int, width: int, tokens: int, timing: Timing) -> list[str]:
    """Stacked and segments over gathered, and what lorafx chooses."""
    x, y = torch.randn(rows, tokens, width), torch.zeros(rows, tokens, width)
    As = [torch.randn(RANK, width) / width for _ in range(adapters)]
    Bs = [torch.randn(width, RANK) for _ in range(adapters)]
    A, B = stacked_factors(As, Bs)
    of_row = torch.arange(rows) % adapters
    own = [torch.nonzero(of_row == adapter).flatten() for adapter in range(adapters)]
    used = F.one_hot(of_row, adapters).repeat_interleave(RANK, dim=1)
    gates = Gates.of(F.pad(used, (1, 0)).float())
    call = partial(mixed, x, y, A, B, gates, fresh=True)
    calls: dict[str, Callable[[], Tensor]] = {
        "gathered": partial(forced, True, call), "stacked": partial(forced, False, call),
        "segments": partial(segments, x, y, As, Bs, own)}
    true = segments(x, torch.zeros_like(y), As, Bs, own)
    for one in calls.values():
        y.zero_()
        torch.testing.assert_close(one(), true, rtol=1e-4, atol=1e-5)
    repeats = max(1, round(timing.sample / max(thread_seconds(calls["gathered"], 2), 1e-6)))
    times = interleaved({name: partial(thread_seconds, one, repeats)
                         for name, one in calls.items()}, timing.rounds)
    ratios = [interval(ratio(times[name], times["gathered"]), 2)
              for name in ("stacked", "segments")]
    return [f"{adapters} on {rows} rows of {tokens}, width {width}", *ratios,
            "gathered" if gathers(x, gates) else "stacked"]


def table(timing: Timing = Timing(), batches: Sequence[tuple[int, int]] = BATCHES,
          widths: Sequence[int] = WIDTHS, tokens: Sequence[int] = TOKENS) -> str:
    """The ratios as text, a line for each batch, width and number of tokens."""
    torch.manual_seed(0)
    cells = list(itertools.product(batches, widths, tokens))
    lines = [line(*batch, width, count, timing)
             for batch, width, count in progress(cells, unit="line")]
    return "\n".join([
        aligned(["time over gathered's", "stacked", "segments", "lorafx"], lines),
        f"lorafx gathers where tokens x R > (tokens + {GATHERING}) x r."])
