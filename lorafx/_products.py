"""Products of a long matrix with a narrow one that may be wider in dtype, and masks of bits; on tensors only.

A long matrix, (N, k) with many rows, is cast some rows at a time, so that its copy stays in a cache.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def times(left: Tensor, right: Tensor, scale: float = 1.0, out: Tensor | None = None) -> Tensor:
    """scale * left right, (N, k) (k, R), in right's dtype; if that is wider, rows of left are cast some at a time."""
    out = right.new_empty(len(left), right.shape[1]) if out is None else out
    for rows in _blocks(left, right):
        _product(left[rows].to(right.dtype), right, scale, out[rows])
    return out


def over_rows(left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """scale * left^T right, (N, k) (N, R), likewise; for small R this is faster than right^T left."""
    out = right.new_empty(left.shape[1], right.shape[1])
    if left.dtype == right.dtype:
        return _product(left.t(), right, scale, out)
    out.zero_()
    for rows in _blocks(left, right):
        out.addmm_(left[rows].to(right.dtype).t(), right[rows], alpha=scale)
    return out


def add_product(target: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """target += scale * left right, (N, k) and (N, R) (R, k), rounded once; target is cast likewise."""
    if target.dtype == right.dtype:
        target.addmm_(left, right, alpha=scale)
        return
    for rows in _blocks(target, right):
        target[rows] = target[rows].to(right.dtype).addmm_(left[rows], right, alpha=scale)


def _blocks(left: Tensor, right: Tensor) -> list[slice]:
    """Rows that fill a core's cache once they are cast; all of them if they need not be."""
    if left.dtype == right.dtype:
        return [slice(None)]
    length = max((1 << (18 if left.device.type == "cpu" else 22)) // left.shape[1], 1)
    return [slice(start, start + length) for start in range(0, len(left), length)]


def _product(left: Tensor, right: Tensor, scale: float, out: Tensor) -> Tensor:
    return torch.mm(left, right, out=out) if scale == 1 else torch.addmm(out, left, right, beta=0, alpha=scale, out=out)


_BITS = 8


def packed(mask: Tensor) -> Tensor:
    """A bool tensor as bytes of eight."""
    flat = F.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % _BITS)).view(-1, _BITS)
    return (flat << torch.arange(_BITS, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpacked(packed: Tensor, x: Tensor) -> Tensor:
    """The mask, one bool for each element of x, (N, in)."""
    bits = packed[:, None] >> torch.arange(_BITS, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten()[:x.numel()].bool().view(-1, x.shape[-1])
