"""Gates, w s of each rank, or of each rank and row of a batch, by which h = x R^T is multiplied."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .mixed import Gates


def gates_of(shares: Sequence[float], right: Tensor) -> Tensor:
    """Return (N, rank) gates of one addend, w s for each of N rows."""
    wide = torch.promote_types(right.dtype, torch.float32)
    column = torch.tensor(shares, dtype=wide, device=right.device)
    return column.unsqueeze(-1).expand(-1, right.shape[-2])


def gated(h: Tensor, gates: Tensor | Gates) -> Tensor:
    """Return h (M, ..., rank) times gates (rank), or rows times their own (N, rank), in its dtype.
    """
    if isinstance(gates, Tensor) and gates.ndim == 1:
        return (h * gates).to(h.dtype)
    dense = rows_of_batch(gates, h)
    dense = dense if isinstance(dense, Tensor) else dense.dense
    shape = (h.shape[0], *[1] * (h.ndim - 2), dense.shape[-1])
    return (h * dense.reshape(shape)).to(h.dtype)


def rows_of_batch(gates: Any, x: Tensor) -> Any:
    """Return the gates of x (M, ..., k), which are those of N rows (N, rank).

    M is N, or a multiple: then each of the N rows stands there several times in a row, as beams do.
    ValueError where it cannot be told which row is which.
    """
    count = len(gates if isinstance(gates, Tensor) else gates.dense)
    rows, shape = x.shape[0], tuple(x.shape[:-1])
    if rows == count:
        swapped = len(shape) == 2 and shape[1] == count and x.stride(0) < x.stride(1)
        if swapped or not shape:
            raise ValueError(_ROWS.format(count, shape))
        return gates
    if len(shape) < 2 or rows % count or shape[1] == count:
        raise ValueError(_ROWS.format(count, shape))
    times = rows // count
    return gates.repeat_interleave(times, 0) if isinstance(gates, Tensor) else gates.repeated(times)


def scaled(left: Tensor, gates: Tensor | Gates | None) -> Tensor:
    """Return L (..., m, rank) times gates (rank); an error where rows have gates of their own."""
    if gates is None:
        return left
    if isinstance(gates, Gates) or gates.ndim > 1:
        raise ValueError(
            "Rows of the batch use adapters of their own (lorafx.rows), and what this model does "
            "with a weight needs one W + s B A for all: run each adapter's rows by themselves.")
    return left * gates


_ROWS = (
    "lorafx.rows names adapters for {} rows, and a linear call has an input of shape {}: name one "
    "for each row of the batch, which must be the first dimension, as often as it stands there. "
    "Where a model takes batches apart, as mixtures of experts do, run each adapter's rows by "
    "themselves.")
