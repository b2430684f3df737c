"""How large the weights of an adapter's sites are, read from a checkpoint some rows at a time."""

import math
from pathlib import Path

from .._adapter.adapter import Adapter
from .._adapter.names import split_block
from .._kernels.weights import rows_at_a_time
from .checkpoint import Readable
from .kinds import kind_of
from .layout import Layout, WeightedAdapter, layouts_of, stored_orientations
from .plan import TableOf, check_dtype, located

_BLOCKS = 16  # of those that a merge sums at a time, so many are read at a time


def weight_norms(
    base: Path, adapter: Adapter, label: str, table: TableOf | None = None
) -> tuple[Adapter, dict[str, float]]:
    """Return {site: |W|}, Frobenius norms in float64, and the adapter as the checkpoint names it.

    Of a block of rows it is that of these rows, and of a stack of experts that of the stack.

    Raises:
        FormatError, MismatchError: as a merge would.
    """
    opened = kind_of(base).open(base)
    checkpoint = opened.checkpoint
    weighted, locations = located(WeightedAdapter(label, adapter, 1.0), checkpoint, table)
    adapter = weighted.adapter
    tensors = {site: checkpoint.tensors[locations[site].read] for site in adapter.pairs}
    layouts = layouts_of(weighted, tensors, stored_orientations(checkpoint), checkpoint.label)
    norms = {}
    for site, layout in layouts.items():
        name = locations[site].read
        check_dtype(name, checkpoint)
        size = adapter.pairs[site].B.shape[-2] if split_block(site)[1] else None
        norms[site] = _norm(opened, name, layout, size)
    return adapter, norms


def _norm(opened: Readable, name: str, layout: Layout, size: int | None) -> float:
    """|W|, or that of `size` rows of W, which are columns where it is stored as (in, out)."""
    *heights, width = opened.checkpoint.tensors[name].shape
    shape = math.prod(heights), width
    first, stop = 0, shape[0]
    if size is not None and not layout.transposed:
        first, stop = layout.start, layout.start + size
    length, squares = _BLOCKS * rows_at_a_time(shape), 0.0
    for start in range(first, stop, length):
        rows = opened.rows(name, shape, start, min(length, stop - start))
        if size is not None and layout.transposed:
            rows = rows[:, layout.start:layout.start + size]
        squares += float(rows.double().square().sum())
    return math.sqrt(squares)
