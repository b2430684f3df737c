"""What storing W + D changes, beside D: |stored - (W + D)| / |D|, in Frobenius norms, by site."""

import functools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .addend import Addend, norm, padded
from .scratch import Scratch
from .weights import folded, rows_at_a_time, rows_of


_FAR_BELOW = 1 / 2 ** 12  # of W's entries: what is added is still above float32's steps of 2^-24


class Losses:
    """Of one matrix W (..., m, n), m being `height`, at each site: some rows or columns of it.

    D is the sum of all addends of the matrix. The norms are sums over blocks of rows.
    """

    def __init__(self, sites: Mapping[str, Sequence[Addend]], height: int) -> None:
        self.height, self.rows = height, 0  # that have been noted
        self._addends = [addend for addends in sites.values() for addend in addends]
        self._sites = sites
        self._squares: dict[str, Tensor] = dict.fromkeys(sites, torch.zeros((), dtype=torch.double))
        self._scratch = Scratch()

    @property
    def complete(self) -> bool:
        """True if all rows have been noted."""
        return self.rows == self.height

    def note(self, W: Tensor, total: Tensor | None, stored: Tensor) -> None:
        """Note the next rows of W, and what is stored for those of W + D; none after the last.

        `total` is W + D as it was before it was rounded, if it was. It is overwritten.
        """
        if self.complete:
            return
        if total is None or not self._shows_all(total, stored):
            total = self._changed(W, stored)
        else:
            total.sub_(self._scratch.empty("stored", W.shape, total.dtype, W.device).copy_(stored))
        for site, addends in self._sites.items():
            here = addends[0].rows(self.rows, W.shape[-2])
            if here is not None:
                self._squares[site] = self._squares[site] + _square(here.block_of(total))
        self.rows += W.shape[-2]
        if self.complete:
            self._scratch = Scratch()

    def note_all(self, W: Tensor, stored: Tensor) -> None:
        """Note many rows."""
        length = rows_at_a_time(W.shape, W.device.type)
        for start in range(0, W.shape[-2], length):
            place = (..., slice(start, start + length), slice(None))
            self.note(W[place], None, stored[place])

    def _shows_all(self, total: Tensor, stored: Tensor) -> bool:
        """True if a sum has enough digits for what is added in it and for what rounding it loses.

        Some of its rows tell how large W is.
        """
        if total.dtype.itemsize <= stored.dtype.itemsize or self._is_tiny:
            return False
        some = total[..., ::64, :]
        size = float(torch.linalg.vector_norm(some)) / math.sqrt(max(some.numel(), 1))
        return _FAR_BELOW * size <= self._smallest

    def _changed(self, W: Tensor, stored: Tensor) -> Tensor:
        """(stored - W) - D, in which no digits of a small D are lost beside those of W."""
        dtype = self._dtype_for(W, stored)
        changed = self._scratch.empty("changed", W.shape, dtype, W.device)
        D = self._scratch.empty("W, then D", W.shape, dtype, W.device)
        changed.copy_(stored).sub_(D.copy_(W))
        folded(D.zero_(), rows_of(self._addends, self.rows, W.shape[-2]), self._scratch, D)
        return changed.sub_(D)

    def _dtype_for(self, W: Tensor, stored: Tensor) -> torch.dtype:
        """That of differences, finer than what is stored: for 16 bits float32, or W's wider one."""
        if stored.dtype.itemsize > 2 or self._is_tiny:
            return torch.float64
        return torch.promote_types(W.dtype, torch.float32)

    @functools.cached_property
    def _norms(self) -> dict[str, float]:
        """{site: |D| there}."""
        norms = {}
        for site, addends in self._sites.items():
            norms[site] = norm(_in_block_of(addends[0], self._addends))
        return norms

    @functools.cached_property
    def _smallest(self) -> float:
        """The smallest size of what is added to an entry, by sites, where something is."""
        sizes: list[float] = []
        for site, addends in self._sites.items():
            *stack, height, _ = addends[0].left.shape
            count = torch.Size([*stack, height, addends[0].right.shape[-1]]).numel()
            if self._norms[site]:
                sizes.append(self._norms[site] / math.sqrt(count))
        return min(sizes, default=math.inf)

    @functools.cached_property
    def _is_tiny(self) -> bool:
        """True if squares of D would not be normal numbers of float32."""
        return any(0 < size < 1e-15 for size in self._norms.values())

    def errors(self) -> dict[str, float]:
        """{site: |stored - (W + D)| / |D|}, 0 where D is."""
        errors = {}
        for site, added in self._norms.items():
            errors[site] = float(self._squares[site]) ** 0.5 / added if added else 0.0
        return errors


def _in_block_of(site: Addend, addends: Sequence[Addend]) -> list[Addend]:
    """What addends of a matrix add to the block that one of them is for, all as large as that."""
    found = []
    for addend in addends:
        turned = addend if site.axis == -2 else addend.transposed
        rows = turned.rows(site.start, site.size)
        if rows is not None:
            found.append(rows._replace(left=padded(rows.left, -2, rows.start, site.size)))
    return found


def _square(matrix: Tensor) -> Tensor:
    """The square of a Frobenius norm, in float64."""
    rows: Tensor = torch.linalg.vector_norm(matrix, dim=-1)
    return rows.double().square().sum()
