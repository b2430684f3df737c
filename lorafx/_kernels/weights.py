"""W + sum s L R, on tensors only: the sum as a whole, by rows, and folded in place."""

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from .addend import Addend, padded
from .scratch import Scratch


def whole(matrix: Tensor, addends: Sequence[Addend]) -> Tensor:
    """Return matrix + sum s L R, computed in float32 or wider and rounded once."""
    wide = _wide_dtype(matrix, addends)
    total = matrix.to(wide)
    for addend in addends:
        length = matrix.shape[addend.axis]
        total = total + padded(addend.dense(wide), addend.axis, addend.start, length)
    return total.to(matrix.dtype)


def _wide_dtype(matrix: Tensor, addends: Sequence[Addend]) -> torch.dtype:
    """The dtype in which the sum is computed: float32, or a wider one of theirs."""
    wide = torch.promote_types(matrix.dtype, torch.float32)
    for addend in addends:
        wide = torch.promote_types(wide, addend.left.dtype)
    return wide


def rows_of(addends: Sequence[Addend], start: int, length: int) -> list[Addend]:
    """Return the addends of the rows [start, start + length) of a matrix."""
    found = []
    for addend in addends:
        rows = addend.rows(start, length)
        if rows is not None:
            found.append(rows)
    return found


# Elements of W that are summed at a time, while they are in a cache: on a CPU, whose cores' caches
# are small, a quarter of the time at the most is gained by it (benchmarks/merge.py), and elsewhere.
_BLOCK, _BLOCK_ELSEWHERE = 1 << 18, 1 << 21


def rows_at_a_time(shape: Sequence[int], device: str = "cpu") -> int:
    """Return how many rows of each matrix of a stack (..., m, n) are summed at a time."""
    block = _BLOCK if device == "cpu" else _BLOCK_ELSEWHERE
    return max(block // max(math.prod(shape) // max(shape[-2], 1), 1), 1)


# Is given some rows of W, of the wide sum, or None if that is the result itself, and of the result.
Note: TypeAlias = Callable[[Tensor, Tensor | None, Tensor], None]


def folded(
    matrix: Tensor, addends: Sequence[Addend], scratch: Scratch, total: Tensor | None = None,
    note: Note | None = None,
) -> Tensor:
    """Return W + sum s L R, (..., m, n), rounded once to W's dtype, or to that of `total`, in it.

    It is summed in float32 or wider, some rows at a time, in the result itself or, if that is
    narrow, in a wide buffer.
    """
    if type(matrix) is not Tensor:  # rows of a sharded one are no views of it
        return whole(matrix, addends)
    total = torch.empty_like(matrix) if total is None else total
    wide = _wide_dtype(matrix, addends)
    addends = [a._replace(left=a.left.to(wide), right=a.right.to(wide)) for a in addends]
    *stack, height, width = matrix.shape
    length = rows_at_a_time(matrix.shape, matrix.device.type)
    buffer = None
    if wide != total.dtype:
        buffer = scratch.empty("wide", (*stack, min(length, height), width), wide, matrix.device)
    for start in range(0, height, length):
        source = matrix[..., start:start + length, :]
        target = total[..., start:start + length, :]
        rows = target if buffer is None else buffer[..., :source.shape[-2], :]
        rows.copy_(source)
        for addend in rows_of(addends, start, source.shape[-2]):
            addend.add_into(rows)
        if buffer is not None:
            target.copy_(rows)
        if note is not None:
            note(source, None if buffer is None else rows, target)
    return total


def rows_at(matrix: Tensor, ranges: Sequence[range]) -> Tensor:
    """Return these rows of a tensor, a copy."""
    return torch.cat([matrix[rows.start:rows.stop] for rows in ranges])


def with_rows(matrix: Tensor, ranges: Sequence[range], rows: Tensor) -> Tensor:
    """Return a copy of a tensor with others in the place of these rows, which are in order.

    It is differentiable in both, and reads neither of them twice.
    """
    pieces: list[Tensor] = []
    end = taken = 0
    for place in ranges:
        pieces += [matrix[end:place.start], rows[taken:taken + len(place)]]
        end, taken = place.stop, taken + len(place)
    return torch.cat([*pieces, matrix[end:]])
