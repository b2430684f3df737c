"""How a checkpoint stores the weight of each site of an adapter: as (out, in) or (in, out), and from which row on."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch

from .._adapter.adapter import Adapter
from .._adapter.names import dotted, split_block
from .._errors import MismatchError


class TensorInfo(NamedTuple):
    """What is known of a tensor of the checkpoint: its shape, and its dtype, None where torch has none like it."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None


class WeightedAdapter(NamedTuple):
    """An adapter, what to call it in errors, and its weight in the sum."""

    label: str
    adapter: Adapter
    weight: float


class Layout(NamedTuple):
    """Whether a weight is stored as (in, out), and the first row that is the site."""

    transposed: bool
    start: int


def transposed_matrices(held: Mapping[str, TensorInfo]) -> set[bool]:
    """Whether matrices of a checkpoint are stored as (in, out), as far as the lengths of their biases show it."""
    found = set()
    for name, tensor in held.items():
        owner, _, attribute = name.rpartition(".")
        bias = held.get(dotted(owner, "bias"))
        if attribute == "weight" and bias is not None and len(tensor.shape) == 2 and len(bias.shape) == 1:
            height, width = tensor.shape
            if height != width and bias.shape[0] in (height, width):
                found.add(bias.shape[0] == width)
    return found


def layouts_of(weighed: WeightedAdapter, tensors: Mapping[str, TensorInfo], stored_transposed: set[bool], base: str) -> dict[str, Layout]:
    """How the weight of each site is stored: as the adapter says, or as the shapes do.

    A square matrix of which neither tells is (out, in) where nothing else in the file or the checkpoint is stored the
    other way, and (in, out) where the file says so of all and nothing contradicts it: anything else is an error.
    """
    possible = {site: _possible(weighed, site, tensor.shape) for site, tensor in tensors.items()}
    seen: dict[int, set[bool]] = {2: set(stored_transposed), 3: set()}  # by the number of dimensions
    for site, ways in possible.items():
        A, B, _ = weighed.adapter.pairs[site]
        if not ways:
            stored = weighed.adapter.stored.get(site)
            known = "" if stored is None else f" for a weight {stored.shape}{' of (in, out)' * stored.transposed}"
            raise MismatchError(f"{weighed.label} has A {tuple(A.shape)} and B {tuple(B.shape)} at '{site}'{known}, "
                                f"which do not fit the tensor {tensors[site].shape} of {base}.")
        if len(ways) == 1:
            seen[A.ndim].add(ways[0].transposed)
    return {site: ways[0] if len(ways) == 1 else ways[_is_turned(weighed, site, seen, base)]
            for site, ways in possible.items()}


def _is_turned(weighed: WeightedAdapter, site: str, seen: Mapping[int, set[bool]], base: str) -> bool:
    """Whether a square weight is stored as (in, out), by what its file says and how others are stored."""
    dimensions, says = weighed.adapter.pairs[site].A.ndim, weighed.adapter.says_transposed
    others = seen[dimensions]
    if dimensions == 2 and True not in others and not says:
        return False
    if dimensions == 2 and False not in others and says or dimensions == 3 and others == {True}:
        return True
    if dimensions == 3 and others == {False}:
        return False
    raise MismatchError(f"{weighed.label} does not say whether the square weight of '{site}' is stored as (out, in) "
                        f"or, as others in it or in {base} may be, as (in, out): load it into the model, and save it "
                        "from there by lorafx.save to a .safetensors file, which says so.")


def _possible(weighed: WeightedAdapter, site: str, shape: tuple[int, ...]) -> list[Layout]:
    """The ways in which the weight of a site can be stored with this shape, (out, in) first."""
    (A, B, _), block = weighed.adapter.pairs[site], split_block(site)[1]
    stored = weighed.adapter.stored.get(site)
    start, rows = 0, re.fullmatch(r"\[(\d+):(\d+)\]", block)
    if stored is not None:
        if tuple(stored.shape) != shape:
            return []
        start = stored.start
    elif rows is not None:
        start = int(rows[1])
    elif block:
        raise MismatchError(f"{weighed.label} does not say which rows of its weight '{site}' is: save the adapter "
                            "again with lorafx.save to a .safetensors file, which says so.")
    found = []
    for transposed in (False, True) if stored is None else (stored.transposed,):
        if len(shape) == A.ndim and shape[:-2] == A.shape[:-2]:
            height, width = (shape[-1], shape[-2]) if transposed else shape[-2:]
            fits = start + B.shape[-2] <= height if block else B.shape[-2] == height
            if rows is not None and int(rows[2]) - int(rows[1]) != B.shape[-2]:
                fits = False
            if A.shape[-1] == width and fits and start >= 0:
                found.append(Layout(transposed, start))
    return found
