"""What storing W + D changes, beside D: |stored - (W + D)| / |D|, in Frobenius norms, by site."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .addend import Addend
from .scratch import Scratch
from .weights import folded, rows_at_a_time, rows_of


class Losses:
    """Of one matrix W (..., m, n), m being `height`, at each site: some rows or columns of it.

    D is the sum of all addends of the matrix. The norms are sums over blocks of rows, of
    (stored - W) - D, in which no digits of a small D are lost beside those of W.
    """

    def __init__(self, sites: Mapping[str, Sequence[Addend]], height: int) -> None:
        self.height, self.rows = height, 0  # that have been added
        self._addends = [addend for addends in sites.values() for addend in addends]
        self._at = {site: addends[0] for site, addends in sites.items()}
        self._squares: dict[str, list[Any]] = {site: [0.0, 0.0] for site in sites}
        self._scratch = Scratch()

    @property
    def complete(self) -> bool:
        """True if all rows have been added."""
        return self.rows == self.height

    def add(self, W: Tensor, stored: Tensor) -> None:
        """Note the next rows of W, and what is stored for those of W + D; none after the last."""
        if self.complete:
            return
        length = rows_at_a_time(W.shape, W.device.type)
        for start in range(0, W.shape[-2], length):
            place = (..., slice(start, start + length), slice(None))
            self._add_block(W[place], stored[place])

    def _add_block(self, W: Tensor, stored: Tensor) -> None:
        height, dtype = W.shape[-2], _dtype_of_differences(W, stored)
        D = self._scratch.empty("D", W.shape, dtype, W.device).zero_()
        folded(D, rows_of(self._addends, self.rows, height), self._scratch, D)
        changed = self._scratch.empty("changed", W.shape, dtype, W.device)
        changed.copy_(stored).sub_(W).sub_(D)
        for site, addend in self._at.items():
            block = addend.rows(self.rows, height)
            if block is not None:
                for number, matrix in enumerate((changed, D)):
                    norm = torch.linalg.vector_norm(block.block_of(matrix), dtype=torch.float64)
                    self._squares[site][number] = self._squares[site][number] + norm.square()
        self.rows += height

    def errors(self) -> dict[str, float]:
        """{site: |stored - (W + D)| / |D|}, 0 where D is; of all rows that have been added."""
        errors = {}
        for site, (changed, added) in self._squares.items():
            errors[site] = (float(changed) / float(added)) ** 0.5 if added else 0.0
        return errors


def _dtype_of_differences(W: Tensor, stored: Tensor) -> torch.dtype:
    """One that is finer than what is stored: float32, or a wider one of W's, for 16 bits."""
    if stored.dtype.itemsize > 2:
        return torch.float64
    return torch.promote_types(W.dtype, torch.float32)
