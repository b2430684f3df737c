"""How a checkpoint stores a site's weight: as (out, in) or (in, out), and from which row on."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from .._adapter.adapter import Adapter
from .._adapter.names import dotted, split_block
from .._errors import MismatchError
from .checkpoint import Checkpoint, TensorInfo


class WeightedAdapter(NamedTuple):
    """An adapter, what to call it in errors, and its weight in the sum."""

    label: str
    adapter: Adapter
    weight: float


class Layout(NamedTuple):
    """A weight is stored as (in, out) if it is transposed; the site begins at row `start` of it."""

    transposed: bool
    start: int


def stored_orientations(checkpoint: Checkpoint) -> set[bool]:
    """Return how matrices are stored, as far as biases show it: True for (in, out)."""
    orientations = set()
    for name, tensor in checkpoint.tensors.items():
        owner, _, attribute = name.rpartition(".")
        bias = checkpoint.tensors.get(dotted(owner, "bias"))
        if attribute != "weight" or bias is None or len(tensor.shape) != 2 or len(bias.shape) != 1:
            continue
        height, width = tensor.shape
        if height != width and bias.shape[0] in (height, width):
            orientations.add(bias.shape[0] == width)
    return orientations


def layouts_of(
    weighted: WeightedAdapter, tensors: Mapping[str, TensorInfo], orientations: set[bool], base: str
) -> dict[str, Layout]:
    """Return how the weight of each site is stored: as the adapter says, or as the shapes do.

    A square matrix of which neither tells is (out, in) if nothing else in the file or the
    checkpoint is (in, out), and (in, out) if the file says so of all and nothing is (out, in):
    anything else is an error.

    Args:
        tensors: the tensor of each site.
        orientations: those that matrices of the checkpoint have.
        base: what to call the checkpoint in errors.
    """
    possible: dict[str, list[Layout]] = {}
    seen: dict[int, set[bool]] = {2: set(orientations), 3: set()}  # by the number of dimensions
    for site, tensor in tensors.items():
        A, B, _ = weighted.adapter.pairs[site]
        layouts = _possible_layouts(weighted, site, tensor.shape)
        if not layouts:
            stored = weighted.adapter.stored.get(site)
            weight = ""
            if stored is not None:
                order = " of (in, out)" if stored.transposed else ""
                weight = f" for a weight {stored.shape}{order}"
            raise MismatchError(
                f"{weighted.label} has A {tuple(A.shape)} and B {tuple(B.shape)} at '{site}'"
                f"{weight}, which do not fit the tensor {tensor.shape} of {base}.")
        if len(layouts) == 1:
            seen[A.ndim].add(layouts[0].transposed)
        possible[site] = layouts
    chosen = {}
    for site, layouts in possible.items():
        second = len(layouts) > 1 and _is_transposed(weighted, site, seen, base)
        chosen[site] = layouts[second]
    return chosen


def _is_transposed(
    weighted: WeightedAdapter, site: str, seen: Mapping[int, set[bool]], base: str
) -> bool:
    """True if a square weight is stored as (in, out), by what its file says and how others are."""
    dimensions = weighted.adapter.pairs[site].A.ndim
    all_transposed, others = weighted.adapter.says_transposed, seen[dimensions]
    if dimensions == 2:
        if True not in others and not all_transposed:
            return False
        if False not in others and all_transposed:
            return True
    elif len(others) == 1:
        return True in others
    raise MismatchError(
        f"{weighted.label} does not say whether the square weight of '{site}' is stored as "
        f"(out, in) or, as others in it or in {base} may be, as (in, out): load it into the model, "
        "and save it from there by lorafx.save to a .safetensors file, which says so.")


def _possible_layouts(
    weighted: WeightedAdapter, site: str, shape: tuple[int, ...]
) -> list[Layout]:
    """The layouts in which a weight of this shape fits a site, (out, in) first."""
    (A, B, _), block = weighted.adapter.pairs[site], split_block(site)[1]
    stored = weighted.adapter.stored.get(site)
    start, rows = 0, re.fullmatch(r"\[(\d+):(\d+)\]", block)
    if stored is not None:
        if tuple(stored.shape) != shape:
            return []
        start = stored.start
    elif rows is not None:
        start = int(rows[1])
    elif block:
        raise MismatchError(
            f"{weighted.label} does not say which rows of its weight '{site}' is: save the adapter "
            "again with lorafx.save to a .safetensors file, which says so.")
    if len(shape) != A.ndim or shape[:-2] != A.shape[:-2] or start < 0:
        return []
    if rows is not None and int(rows[2]) - int(rows[1]) != B.shape[-2]:
        return []
    layouts = []
    orientations = (False, True) if stored is None else (stored.transposed,)
    for transposed in orientations:
        height, width = (shape[-1], shape[-2]) if transposed else shape[-2:]
        fits = start + B.shape[-2] <= height if block else B.shape[-2] == height
        if A.shape[-1] == width and fits:
            layouts.append(Layout(transposed, start))
    return layouts
