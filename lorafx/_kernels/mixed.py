"""Rows of a batch through adapters of their own: y + ((x A^T) * g) B^T, with g for each row.

A (R, in) has the A of all adapters one below the other, B (R, out) their B^T; g (N, R) is weight x
scale in the ranks that a row uses and 0 in all others. Two ways compute it:

    stacked     h = (x A^T) * g (N, tokens, R), then h B: products with all ranks for each row
    gathered    A[i] (N, r, in) and B[i] (N, r, out) of the ranks i (N, r) that each row uses,
                then h = (x A[i]^T) * g[i] (N, tokens, r) and h B[i], a product for each row

Gathered, no number of one adapter or row meets another's, so that what is not finite in one job
stays there: so it is computed where A or B train. Elsewhere shapes choose. A third way, products of
each adapter with its rows, is not here: of few adapters it takes as little as 0.55 of the time that
these take, of many up to 7 times as much, and it is a loop over adapters, which compilers unroll.

Rank 0 is blank, zeros in A and B. Rows that use fewer ranks than others, and those of the base, use
it in the place of what they lack. All is plain operators, which torch differentiates, and compilers
and transforms take: a Function of their gradients took as long.
"""

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .again import Proven, again
from .private import any_autocast, no_autocast, runs_as_called
from .tensors import PLAIN

# To gather the factors of a row takes the time of multiplying this many tokens with as many ranks
# (benchmarks/serve.py --rule: float32, one CPU core).
GATHERING = 20


class Gates(NamedTuple):
    """Which ranks each row of a batch uses, and by what the product x A^T is multiplied there.

    They are the same for all sites at which the adapters have the same ranks and scales.
    """

    dense: Tensor  # (N, R): weight x scale, 0 in ranks that a row does not use
    ranks: Tensor  # (N, r), int64: the ranks that each row uses, and 0 in the place of missing ones
    values: Tensor  # (N, r): dense at these ranks, 0 in the place of missing ones

    @staticmethod
    def of(dense: Tensor) -> "Gates":
        """The gates (N, R), 0 in the blank rank 0; not for a compiler, since r depends on them.

        No r is less than 2, where R is not: compilers take 0 and 1 for constants.

        >>> gates = Gates.of(torch.tensor([[0, .5, .5, 0, 0], [0, 0, 0, 0, 2]]))
        >>> gates.ranks.tolist(), gates.values.tolist()
        ([[1, 2], [4, 0]], [[0.5, 0.5], [2.0, 0.0]])
        """
        used = dense != 0
        most = max(int(used.sum(1).max()) if len(dense) else 0, min(2, dense.shape[1]))
        ranks = used.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
        ranks = ranks.where(used.gather(1, ranks), 0)
        return Gates(dense, ranks, dense.gather(1, ranks))

    def repeated(self, count: int) -> "Gates":
        """The gates of a batch in which each row stands `count` times in a row, as beams do."""
        return Gates(*[part.repeat_interleave(count, dim=0) for part in self])


def stacked_factors(As: Sequence[Tensor], Bs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return A (R, in) and B (R, out) of adapters' A (rank, in) and B (out, rank).

    R is one more than their ranks together: before them is the blank rank.
    """
    A = torch.cat([As[0].new_zeros(1, As[0].shape[1]), *As])
    B = torch.cat([Bs[0].new_zeros(1, Bs[0].shape[0]), *[B.t() for B in Bs]])
    return A, B


def mixed(
    x: Tensor, y: Tensor, A: Tensor, B: Tensor, gates: Gates,
    fresh: bool = False, proven: Proven | None = None,
) -> Tensor:
    """Return y + ((x A^T) * g) B^T, (N, ..., out), in y's dtype, for y (N, ..., out) of another's.

    x is (N, ..., in), A (R, in) and B (R, out), of which rank 0 is zeros, and the gates are those
    of N rows: who calls views a batch that was flattened as (N, tokens, in), and repeats gates for
    rows that were repeated, since shapes do not tell it. A and B may be wider than x and y, and are
    cast to y's dtype. A y that is `fresh`, nobody else's, may be written into, unless autograd
    takes it for a view, which costs more than a new one. ValueError for another number of rows.

    >>> A, B = stacked_factors([torch.ones(1, 2), torch.ones(1, 2)], [torch.ones(1, 1)] * 2)
    >>> gates = Gates.of(torch.tensor([[0., 1, 0], [0, 0, 10], [0, 0, 0]]))
    >>> mixed(torch.ones(3, 2), torch.zeros(3, 1), A, B, gates).tolist()
    [[2.0], [20.0], [0.0]]
    """
    if len(gates.dense) != x.shape[0] or x.ndim < 2:
        raise ValueError(
            f"The rows of a batch of {len(gates.dense)} were given their adapters, but a linear "
            f"call's input is {tuple(x.shape)}: its first dimension must be the rows. Where rows "
            "were repeated or flattened, the gates must be repeated, or the input viewed, alike.")
    as_called = not torch.compiler.is_compiling() and runs_as_called()
    as_called = as_called and type(x) in PLAIN and type(y) in PLAIN
    into = as_called and fresh and not (torch.is_grad_enabled() and y._is_view())
    with no_autocast() if as_called and any_autocast() else contextlib.nullcontext():
        shape, x = y.shape, _three(x.to(y.dtype))  # (N, tokens, in)
        y = _three(y)
        trains = torch.is_grad_enabled() and (A.requires_grad or B.requires_grad)
        if trains or gathers(x, gates):
            proven = proven if trains and as_called else None
            y = _gathered(x, y, A, B, gates, into, proven)
        else:
            y = _stacked(x, y, A, B, gates.dense, into)
    return y.reshape(shape)


def gathers(x: Tensor, gates: Gates) -> bool:
    """True if, by shapes, it is faster to gather each row's factors; x is (N, tokens, in).

    Numbers of ranks change from batch to batch, which compilers must not ask about: there it is so
    for more than one token.
    """
    tokens = x.shape[1]
    if torch.compiler.is_compiling():
        return tokens > 1
    return tokens * gates.dense.shape[1] > (tokens + GATHERING) * gates.ranks.shape[1]


def _three(rows: Tensor) -> Tensor:
    """(N, ..., k) as (N, tokens, k)."""
    return rows.unsqueeze(1) if rows.ndim == 2 else rows.flatten(1, -2)


def _gathered(
    x: Tensor, y: Tensor, A: Tensor, B: Tensor, gates: Gates, into: bool, proven: Proven | None
) -> Tensor:
    count, most = gates.ranks.shape
    ranks = gates.ranks.reshape(-1)
    right = A.index_select(0, ranks).to(x.dtype).view(count, most, A.shape[1])  # (N, r, in)
    left = B.index_select(0, ranks).to(x.dtype).view(count, most, B.shape[1])  # (N, r, out)
    instead = again(x, proven)
    h = torch.bmm(x, right.mT)  # (N, tokens, r)
    if instead is not None:
        instead.stand_in(h.grad_fn, "self")
    h = h * gates.values.to(h.dtype)[:, None]
    if into:
        return y.baddbmm_(h, left)
    if y.dtype != h.dtype:  # a compiler's autocast
        return torch.add(y, torch.bmm(h, left))
    return torch.baddbmm(y, h, left)


def _stacked(x: Tensor, y: Tensor, A: Tensor, B: Tensor, dense: Tensor, into: bool) -> Tensor:
    h = F.linear(x, A.to(x.dtype))  # (N, tokens, R)
    h = h * dense.to(h.dtype)[:, None]
    if into:
        return y.flatten(0, 1).addmm_(h.flatten(0, 1), B.to(h.dtype)).view(y.shape)
    return torch.add(y, torch.matmul(h, B.to(h.dtype)))
