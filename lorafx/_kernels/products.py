"""Products of a long matrix with a narrow one that may be wider in dtype, and masks of bits; on tensors only.

A long matrix, (N, k) with many rows, is cast some rows at a time, so that its copy stays in a cache.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def times(left: Tensor, right: Tensor, scale: float = 1.0, out: Tensor | None = None) -> Tensor:
    """scale * left right, (N, k) (k, R), in right's dtype; if that is wider, rows of left are cast some at a time."""
    if left.dtype == right.dtype and out is None and scale == 1:
        return left @ right
    out = right.new_empty(left.shape[0], right.shape[1]) if out is None else out
    if left.dtype == right.dtype:
        return _product(left, right, scale, out)
    for rows in _blocks(left):
        _product(left[rows].to(right.dtype), right, scale, out[rows])
    return out


def through(long: Tensor, right: Tensor, narrow: Tensor, scale: float, out: Tensor) -> Tensor:
    """narrow^T long, (N, R) (N, k), and in `out` scale * long right, (N, k) (k, R); rows of long are cast once."""
    if long.dtype == narrow.dtype:
        times(long, right, scale, out)
        return over_rows(narrow, long)
    found = narrow.new_zeros(narrow.shape[1], long.shape[1])
    for rows in _blocks(long):
        wide = long[rows].to(narrow.dtype)
        _product(wide, right, scale, out[rows])
        found.addmm_(narrow[rows].t(), wide)
    return found


def over_rows(narrow: Tensor, long: Tensor) -> Tensor:
    """narrow^T long, (N, R) (N, k), (R, k), in narrow's dtype; if that is wider, rows of long are cast likewise."""
    if narrow.dtype != long.dtype:
        out = narrow.new_zeros(narrow.shape[1], long.shape[1])
        for rows in _blocks(long):
            out.addmm_(narrow[rows].t(), long[rows].to(narrow.dtype))
        return out
    chunks = math.gcd(narrow.shape[0], 8) if long.shape[1] >= 1024 and narrow.device.type == "cpu" else 1
    if chunks == 1 or narrow.shape[0] < 512:
        return narrow.t() @ long
    left, right = (matrix.view(chunks, -1, matrix.shape[1]) for matrix in (narrow, long))
    return torch.bmm(left.mT, right).sum(0)  # rows that fit a cache at a time


def add_product(target: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """target += scale * left right, (N, k) and (N, R) (R, k), rounded once; target is cast likewise."""
    if target.dtype == right.dtype:
        target.addmm_(left, right, alpha=scale)
        return
    for rows in _blocks(target):
        target[rows] = target[rows].to(right.dtype).addmm_(left[rows], right, alpha=scale)


def _blocks(left: Tensor) -> list[slice]:
    """Rows of left that fill a core's cache once they are cast."""
    length = max((1 << (19 if left.device.type == "cpu" else 22)) // left.shape[1], 1)
    return [slice(start, start + length) for start in range(0, left.shape[0], length)]


def _product(left: Tensor, right: Tensor, scale: float, out: Tensor) -> Tensor:
    return torch.mm(left, right, out=out) if scale == 1 else torch.addmm(out, left, right, beta=0, alpha=scale, out=out)


_BITS = 8


def packed(mask: Tensor) -> Tensor:
    """A bool tensor as bytes of eight."""
    flat = F.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % _BITS)).view(-1, _BITS)
    return (flat << torch.arange(_BITS, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpacked(packed_bits: Tensor, x: Tensor) -> Tensor:
    """The mask, one bool for each element of x, (N, in)."""
    bits = packed_bits[:, None] >> torch.arange(_BITS, dtype=torch.uint8, device=packed_bits.device) & 1
    return bits.flatten()[:x.numel()].bool().view(-1, x.shape[-1])
