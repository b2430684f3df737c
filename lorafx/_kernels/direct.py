"""What branches add to a linear call of which no gradient is asked: two products each, in place.

They are what `linears` gives, but for the order in which products are added up.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


Term = tuple[Tensor, Tensor, float]  # A (rank, in), B (out, rank) and s, of the addend s B A

# Of fewer ranks than this, h^T = A x^T takes half the time of h = x A^T on a CPU, and so does the
# product of B with that, laid out by columns.
FEW_RANKS = 16


def add_to_rows(y: Tensor, x: Tensor, terms: Sequence[Term]) -> Tensor:
    """Return y + sum s (x A^T) B^T, (..., out), written into y, for x (..., in) of y's dtype.

    Beside an x of two bytes an element, A and B may be float32: what they add to y is rounded once.
    """
    rows, block = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])  # (N, in), (N, out)
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
