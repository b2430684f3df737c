"""A linear call of which no gradient is asked: x W^T + b, and two products in place an addend.

For one token, these take less time than the questions that `linears` asks about forms. They are
what it gives, but for the order in which products are added up. In a model each call finds the
processor's caches filled with other things, so that a frame of Python, or an object that is looked
at, takes many times what it takes in a loop: hence few of both.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


Term = tuple[Tensor, Tensor, float]  # A (rank, in), B (out, rank) and s, of the addend s B A

# Of fewer ranks than this, h^T = A x^T takes half the time of h = x A^T on a CPU, and so does the
# product of B with that, laid out by columns.
FEW_RANKS = 16


def direct(x: Tensor, weight: Tensor, bias: Tensor | None, terms: Sequence[Term]) -> Tensor:
    """Return x W^T + b + sum s (x A^T) B^T, (..., out), for x (..., in), all of one dtype.

    Beside an x of two bytes an element, A and B may be float32: what they add to y is rounded once.
    """
    # in the shape of x, whose rows by themselves may be added up in another order
    y = F.linear(x, weight, bias)
    width = x.shape[-1]
    if x.numel() == width and x.dtype.itemsize > 2:  # in two bytes, mv rounds partial sums
        row, whole = x.reshape(-1), y.view(-1)  # (in), (out)
        for A, B, scale in terms:
            whole.addmv_(B, torch.mv(A, row), alpha=scale)
        return y
    rows, block = x.reshape(-1, width), y.view(-1, y.shape[-1])  # (N, in), (N, out)
    for A, B, scale in terms:
        if A.dtype is not x.dtype:
            wide = block.to(A.dtype).addmm_(_half(rows.to(A.dtype), A), B.t(), alpha=scale)
            block.copy_(wide)
        else:
            block.addmm_(_half(rows, A), B.t(), alpha=scale)
    return y


def wider(A: Tensor, x: Tensor) -> bool:
    """True if A's dtype is one of those that may be wider than x's."""
    return A.dtype is torch.float32 and x.dtype.itemsize == 2


def _half(rows: Tensor, A: Tensor) -> Tensor:
    """h = x A^T, (N, rank)."""
    return torch.mm(A, rows.t()).t() if A.shape[0] < FEW_RANKS else F.linear(rows, A)
