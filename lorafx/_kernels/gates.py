"""Gates, w s of each rank, or of each rank and row of a batch, by which h = x R^T is multiplied."""

from collections.abc import Sequence

import torch
from torch import Tensor


def gates_of(shares: Sequence[float], right: Tensor) -> Tensor:
    """Return (N, rank) gates of one addend, w s for each of N rows."""
    wide = torch.float64 if right.dtype == torch.float64 else torch.float32
    column = torch.tensor(shares, dtype=wide, device=right.device)
    return column.unsqueeze(-1).expand(-1, right.shape[-2])


def gated(h: Tensor, gates: Tensor) -> Tensor:
    """Return h (M, ..., rank) times gates (rank), or rows times their own (N, rank), in its dtype.

    M is N, or a multiple: then each of the N rows stands there several times in a row, as beams do.
    """
    if gates.ndim == 1:
        return (h * gates).to(h.dtype)
    rows, count = h.shape[0], gates.shape[0]
    if rows != count:
        check_rows(h, count)
        gates = gates.repeat_interleave(rows // count, 0)
    elif h.ndim == 3 and h.shape[1] == count and h.stride(0) < h.stride(1):
        raise ValueError(_ROWS.format(count, tuple(h.shape[:-1])))
    shape = (rows, *[1] * (h.ndim - 2), gates.shape[-1])
    return (h * gates.reshape(shape)).to(h.dtype)


def scaled(left: Tensor, gates: Tensor | None) -> Tensor:
    """Return L (..., m, rank) times gates (rank); an error where rows have gates of their own."""
    if gates is None:
        return left
    if gates.ndim > 1:
        raise ValueError(
            "Rows of the batch use adapters of their own (lorafx.rows), and what this model does "
            "with a weight needs one W + s B A for all: run each adapter's rows by themselves.")
    return left * gates


def check_rows(h: Tensor, count: int) -> None:
    """Raise where it cannot be told which rows of h (..., rank) are those of a batch of `count`."""
    shape = h.shape[:-1]
    if len(shape) < 2 or shape[0] % count or shape[1] == count:
        raise ValueError(_ROWS.format(count, tuple(shape)))


_ROWS = (
    "lorafx.rows names adapters for {} rows, and a linear call has an input of {} rows: name one "
    "for each row of the batch, which must be its first dimension, as often as it stands there. "
    "Where a model takes batches apart, as mixtures of experts do, run each adapter's rows by "
    "themselves.")
