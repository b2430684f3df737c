"""What storing W + D changes, beside D: |stored - (W + D)| / |D|, in Frobenius norms, by site."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .addend import Addend, norm
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
        self._sites = sites
        self._squares: dict[str, tuple[Any, Any]] = dict.fromkeys(sites, (0.0, 0.0))
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
        height, dtype = W.shape[-2], self._dtype_for(W, stored)
        changed = self._scratch.empty("changed", W.shape, dtype, W.device)
        D = self._scratch.empty("W, then D", W.shape, dtype, W.device)
        changed.copy_(stored).sub_(D.copy_(W))
        folded(D.zero_(), rows_of(self._addends, self.rows, height), self._scratch, D)
        changed.sub_(D)
        for site, addends in self._sites.items():
            here = addends[0].rows(self.rows, height)
            if here is not None:
                before = self._squares[site]
                squares = _square(here.block_of(changed)), _square(here.block_of(D))
                self._squares[site] = before[0] + squares[0], before[1] + squares[1]
        self.rows += height

    def _dtype_for(self, W: Tensor, stored: Tensor) -> torch.dtype:
        """That of differences, finer than what is stored: for 16 bits float32, or W's wider one."""
        if stored.dtype.itemsize > 2 or self._is_tiny:
            return torch.float64
        return torch.promote_types(W.dtype, torch.float32)

    @functools.cached_property
    def _is_tiny(self) -> bool:
        """True if squares of D would not be normal numbers of float32."""
        return any(norm(addends) < 1e-15 for addends in self._sites.values())

    def errors(self) -> dict[str, float]:
        """{site: |stored - (W + D)| / |D|}, 0 where D is; of all rows that have been added."""
        errors = {}
        for site, (changed, added) in self._squares.items():
            errors[site] = (float(changed) / float(added)) ** 0.5 if added else 0.0
        return errors


def _square(matrix: Tensor) -> Tensor:
    """The square of a Frobenius norm, in float64."""
    rows: Tensor = torch.linalg.vector_norm(matrix, dim=-1)
    return rows.double().square().sum()
