"""W + sum s L R, on tensors only: the addend of a weight, the sum as a whole, by rows, and folded in place."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .scratch import Scratch


class Part(NamedTuple):
    """s L R, an addend of a matrix (..., m, n) or of the block of it that begins at `start` along `axis`, -2 or -1."""

    left: Tensor  # (..., m, rank)
    right: Tensor  # (..., rank, n)
    scale: float
    axis: int = -2
    start: int = 0
    rounding: bool = False  # whether the sum may be rounded to a narrow dtype
    dropout: float = 0.0  # of what the matrix is multiplied with

    @property
    def transposed(self) -> "Part":
        """The addend of the transposed matrix."""
        return self._replace(left=self.right.mT, right=self.left.mT, axis=-3 - self.axis)

    @property
    def detached(self) -> "Part":
        """The addend without a gradient."""
        return self._replace(left=self.left.detach(), right=self.right.detach())

    @property
    def size(self) -> int:
        """How long the block is along its axis."""
        return int(self.left.shape[-2] if self.axis == -2 else self.right.shape[-1])


def whole(matrix: Tensor, parts: Sequence[Part]) -> Tensor:
    """matrix + sum s L R, computed in float32 or wider and rounded once."""
    wide = wide_dtype(matrix, parts)
    total = matrix.to(wide)
    for part in parts:
        added = delta(part.right, part.left, part.scale, wide)
        total = total + padded(added, part.axis, part.start, matrix.shape[part.axis])
    return total.to(matrix.dtype)


def wide_dtype(matrix: Tensor, parts: Sequence[Part]) -> torch.dtype:
    """The dtype in which the sum is computed: float32, or a wider one of theirs."""
    return functools.reduce(torch.promote_types, (part.left.dtype for part in parts),
                            torch.promote_types(matrix.dtype, torch.float32))


def padded(block: Tensor, axis: int, start: int, length: int) -> Tensor:
    """A block among zeros, so that the axis has this length."""
    after = length - start - block.shape[axis]
    return block if block.shape[axis] == length else F.pad(block, (0, 0) * (-1 - axis) + (start, after))


def rows_of(parts: Sequence[Part], start: int, length: int) -> list[Part]:
    """The addends of the rows [start, start + length) of a matrix."""
    found = []
    for part in parts:
        if part.axis == -1:
            found.append(part._replace(left=part.left.narrow(-2, start, length)))
            continue
        first, last = max(start, part.start), min(start + length, part.start + part.size)
        if first < last:
            left = part.left.narrow(-2, first - part.start, last - first)
            found.append(part._replace(left=left, start=first - start))
    return found


_BLOCK = 1 << 21  # elements of W that are summed at a time, while they are in a cache


def rows_at_a_time(shape: Sequence[int]) -> int:
    """How many rows of each matrix of a stack (..., m, n) are summed at a time."""
    return max(_BLOCK // max(math.prod(shape) // max(shape[-2], 1), 1), 1)


def folded(matrix: Tensor, parts: Sequence[Part], scratch: Scratch, total: Tensor | None = None) -> Tensor:
    """W + sum s L R, (..., m, n), summed in float32 or wider and rounded once, as a new tensor or in `total`.

    That happens some rows at a time, in the result itself or, if that is narrow, in a wide buffer.
    """
    if type(matrix) is not Tensor:  # rows of a sharded one are no views of it
        return whole(matrix, parts)
    total = torch.empty_like(matrix) if total is None else total
    wide = wide_dtype(matrix, parts)
    parts = [part._replace(left=part.left.to(wide), right=part.right.to(wide)) for part in parts]
    *stack, height, width = matrix.shape
    length = rows_at_a_time(matrix.shape)
    buffer = None if wide == total.dtype else scratch.empty("wide", (*stack, min(length, height), width), wide,
                                                            matrix.device)
    for start in range(0, height, length):
        source, target = (tensor[..., start:start + length, :] for tensor in (matrix, total))
        rows = (target if buffer is None else buffer[..., :source.shape[-2], :]).copy_(source)
        for part in rows_of(parts, start, source.shape[-2]):
            block = rows.narrow(part.axis, part.start, part.size)
            add = block.addmm_ if block.ndim == 2 else block.baddbmm_
            add(part.left, part.right, alpha=part.scale)
        if buffer is not None:
            target.copy_(rows)
    return total


def dropped(x: Tensor, probability: float) -> Tensor:
    """x with elements zeroed at random and the others divided by 1 - probability."""
    return F.dropout(x, probability) if probability else x


def delta(A: Tensor, B: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scale * B A, of shape (..., out, in), computed in `dtype`: A (..., rank, in), B (..., out, rank)."""
    return scale * (B.to(dtype) @ A.to(dtype))
