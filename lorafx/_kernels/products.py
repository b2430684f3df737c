"""Products of a long matrix with a narrow one that may be wider in dtype; on tensors only.

A long matrix, (N, k) with many rows, is cast some rows at a time, so that its copy stays in a
cache. The six products of a branch are of three kinds. On a CPU they are fastest laid out so:

    x A^T, dY B       (N, k) (k, R): of R < 16 columns, (k, R) by columns, and so the result too
                      where the long matrix fits a core's cache; else the result by rows
    y, dX             (N, k) += (N, R) (R, k): anyhow, since reading and writing takes the time
    G^T x, dY^T h     (N, R)^T (N, k): as (R, k), since its transpose takes up to twice the time
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Of many rows and few columns, the rule above (benchmarks/step.py --rule, its last table).
MANY_ROWS, FEW_COLUMNS, IN_CACHE = 256, 16, 1 << 19


def has_few_columns(rows: int, rank: int) -> bool:
    """True if factors and results of this rank had better be laid out by columns."""
    return rows >= MANY_ROWS and rank < FEW_COLUMNS


def in_columns(Bs: Sequence[Tensor], rows: int) -> Sequence[Tensor]:
    """The B, laid out by columns where that makes a product with rows up to ten times as fast.

    It does on a CPU, where they have few columns.
    """
    ranks = {B.shape[1] for B in Bs}
    if len(ranks) > 1 or not has_few_columns(rows, max(ranks)) or Bs[0].device.type != "cpu":
        return Bs
    joined = torch.cat([B.t() for B in Bs], dim=1)  # (rank, sum of lengths)
    return [part.t() for part in joined.split_with_sizes([B.shape[0] for B in Bs], dim=1)]


def product(
    left: Tensor, right: Tensor, scale: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """Return scale * left right, (N, k) (k, R), in right's dtype; left is cast by rows.

    It is laid out by columns where that is faster.
    """
    if left.dtype == right.dtype and out is None and scale == 1:
        if has_few_columns(left.shape[0], right.shape[1]) and _is_in_cache(left):
            return (right.t() @ left.t()).t()
        return left @ right
    out = right.new_empty(left.shape[0], right.shape[1]) if out is None else out
    if left.dtype == right.dtype:
        return _multiply(left, right, scale, out)
    for rows in _blocks(left):
        _multiply(left[rows].to(right.dtype), right, scale, out[rows])
    return out


def transposed_product(narrow: Tensor, long: Tensor) -> Tensor:
    """Return narrow^T long, (N, R) (N, k), as (R, k) in narrow's dtype; long is cast by rows."""
    if narrow.dtype != long.dtype:
        out = narrow.new_zeros(narrow.shape[1], long.shape[1])
        for rows in _blocks(long):
            out.addmm_(narrow[rows].t(), long[rows].to(narrow.dtype))
        return out
    on_cpu = narrow.device.type == "cpu"
    chunks = math.gcd(narrow.shape[0], 8) if long.shape[1] >= 1024 and on_cpu else 1
    if chunks == 1 or narrow.shape[0] < 2048:
        return narrow.t() @ long
    left = narrow.view(chunks, -1, narrow.shape[1])
    right = long.view(chunks, -1, long.shape[1])
    return torch.bmm(left.mT, right).sum(0)  # rows that fit a cache at a time


def both_products(
    long: Tensor, right: Tensor, narrow: Tensor, scale: float, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Return scale * long right, in `out`, and narrow^T long; rows of long are cast once.

    The shapes are long (N, k), right (k, R), narrow (N, R).
    """
    if long.dtype == narrow.dtype:
        return product(long, right, scale, out), transposed_product(narrow, long)
    found = narrow.new_zeros(narrow.shape[1], long.shape[1])
    for rows in _blocks(long):
        wide = long[rows].to(narrow.dtype)
        _multiply(wide, right, scale, out[rows])
        found.addmm_(narrow[rows].t(), wide)
    return out, found


def add_product(target: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """Add scale * left right, (N, R) (R, k), to the target, (N, k), rounded once, by rows."""
    if target.dtype == right.dtype:
        target.addmm_(left, right, alpha=scale)
        return
    for rows in _blocks(target):
        target[rows] = target[rows].to(right.dtype).addmm_(left[rows], right, alpha=scale)


def _blocks(left: Tensor) -> list[slice]:
    """Rows of left that fill a core's cache once they are cast."""
    length = max((1 << (19 if left.device.type == "cpu" else 22)) // left.shape[1], 1)
    return [slice(start, start + length) for start in range(0, left.shape[0], length)]


def _is_in_cache(left: Tensor) -> bool:
    """True if a core's cache holds a matrix that its CPU multiplies by rows of any number."""
    wide = left.dtype in (torch.float32, torch.float64)
    return wide and left.numel() < IN_CACHE and left.device.type == "cpu"


def _multiply(left: Tensor, right: Tensor, scale: float, out: Tensor) -> Tensor:
    if scale == 1:
        return torch.mm(left, right, out=out)
    return torch.addmm(out, left, right, beta=0, alpha=scale, out=out)
