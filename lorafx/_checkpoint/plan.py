"""Which tensors of a checkpoint adapters change, and how, by names and shapes: W + sum w s B A."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._adapter.config import FLOATS, factor_dtype
from .._adapter.conversions import ConversionTable, as_stored
from .._adapter.names import have_rows_in_common, ranges_of, split_block, stands_for
from .._errors import AdapterError, FormatError, MismatchError
from .._kernels.addend import Addend
from .._kernels.losses import Losses
from .._kernels.weights import rows_of
from .checkpoint import Checkpoint, TensorInfo
from .layout import Layout, WeightedAdapter, layouts_of, stored_orientations
from .locate import Location, locate
from .ties import tied_names, unties


# From the content of config.json to transformers' conversions of such a model's tensors.
TableOf = Callable[[Mapping[str, Any]], ConversionTable | None]


@dataclass(frozen=True)
class MergeRequest:
    """What is to be merged: adapters, the dtype to write, if another, and whether to untie.

    `table` gives transformers' conversions of the tensors of a model with this config.json, where
    they are known.
    """

    adapters: Sequence[WeightedAdapter]
    dtype: torch.dtype | None
    untie: bool
    table: TableOf | None = None


@dataclass
class Change:
    """What becomes of a tensor: `trained` takes its place, if any, and the addends are added.

    `pieces` take the places of some rows. `untied` says that what is trained is for this name only,
    where the tensor has others. `losses` notes what rounding the sum changes.
    """

    trained: Tensor | None = None
    addends: list[Addend] = field(default_factory=list)
    untied: bool = False
    pieces: list[tuple[range, Tensor]] = field(default_factory=list)
    losses: Losses | None = None

    def put_rows(self, ranges: Sequence[range], tensor: Tensor) -> None:
        """Let the rows of a tensor take the places of these."""
        taken = 0
        for place in ranges:
            self.pieces.append((place, tensor.narrow(0, taken, len(place))))
            taken += len(place)

    def rows(self, start: int, length: int) -> "Change":
        """Return what becomes of some rows of a matrix."""
        trained = None if self.trained is None else self.trained.narrow(0, start, length)
        pieces = []
        for place, tensor in self.pieces:
            first, stop = max(place.start, start), min(place.stop, start + length)
            if first < stop:
                here = range(first - start, stop - start)
                pieces.append((here, tensor.narrow(0, first - place.start, len(here))))
        addends = rows_of(self.addends, start, length)
        return Change(trained, addends, pieces=pieces, losses=self.losses)


@dataclass(frozen=True)
class MergePlan:
    """{tensor to write: Change}; the new ones among them, {name: tensor to read}; if it unties."""

    changes: dict[str, Change]
    new: Mapping[str, str]
    unties: bool


def plan_merge(request: MergeRequest, checkpoint: Checkpoint) -> MergePlan:
    """Return what the adapters together change, once every name and shape is checked."""
    changes: dict[str, Change] = {}
    new: dict[str, str] = {}
    # of a tensor, by site, so that they add up in the order of lorafx.merge
    addends: dict[str, dict[str, list[Addend]]] = {}
    first_to_train: dict[str, dict[str, str]] = {}  # {tensor: {block of rows: adapter}}
    unties_any, orientations = False, stored_orientations(checkpoint)
    for weighted in request.adapters:
        weighted, locations = located(weighted, checkpoint, request.table)
        adapter = weighted.adapter
        for key, source in locations.values():
            if key != source:
                new[key] = source
        own: set[str] = set()  # tensors of which this adapter trained all
        for name, tensor in adapter.trained.items():
            key, block = locations[name].written, split_block(name)[1]
            if key in own and not block:  # a tied one, saved under each of its names
                continue
            before = first_to_train.setdefault(key, {})
            _check_trained(weighted, name, before, locations[name], checkpoint)
            before[block] = weighted.label
            if block:
                for other in tied_names(key, checkpoint):
                    changes.setdefault(other, Change()).put_rows(ranges_of(block), tensor)
                continue
            own.add(key)
            if adapter.untied and tensor.ndim == 2:
                site = name.removesuffix(".weight")
                unties_any |= unties(locations[name], site, checkpoint, request.untie)
            names = [key] if adapter.untied else tied_names(key, checkpoint)
            for other in names:
                changes[other] = Change(tensor, untied=adapter.untied)
        tensors = {site: checkpoint.tensors[locations[site].read] for site in adapter.pairs}
        layouts = layouts_of(weighted, tensors, orientations, checkpoint.label)
        for site, layout in layouts.items():
            key, source = locations[site]
            check_dtype(source, checkpoint)
            unties_any |= unties(locations[site], site, checkpoint, request.untie)
            addend = _addend(weighted, site, layout, tensors[site])
            addends.setdefault(key, {}).setdefault(site, []).append(addend)
    for key, by_site in addends.items():
        change = changes.setdefault(key, Change())
        for several in by_site.values():
            change.addends.extend(several)
        change.losses = Losses(by_site, checkpoint.tensors[new.get(key, key)].shape[-2])
    return MergePlan(changes, new, unties_any)


def located(
    weighted: WeightedAdapter, checkpoint: Checkpoint, table_of: TableOf | None
) -> tuple[WeightedAdapter, dict[str, Location]]:
    """Return an adapter and where its tensors are, by other names if the table has them."""
    try:
        return weighted, locate(weighted, checkpoint)
    except MismatchError:
        if table_of is None or checkpoint.config is None:
            raise
        table = table_of(checkpoint.config)
        if table is None:
            raise
        adapter = as_stored(weighted.adapter, table, checkpoint.tensors)
        if adapter is weighted.adapter:
            raise
        weighted = weighted._replace(adapter=adapter)
    return weighted, locate(weighted, checkpoint)


def _check_trained(
    weighted: WeightedAdapter, name: str, before: Mapping[str, str], location: Location,
    checkpoint: Checkpoint,
) -> None:
    """Raise unless what an adapter trained can take the place of the checkpoint's, or of its rows.

    `before` are the blocks of rows that others take already, and whose they are.
    """
    label, adapter, weight = weighted
    block = split_block(name)[1]
    for other, first in before.items():
        if have_rows_in_common(block, other):
            raise AdapterError(f"{first} and {label} both train '{name}' whole, and one tensor "
                               "cannot be both: fold one of them.")
    if weight != 1:
        raise AdapterError(f"{label} trains '{name}' whole, which cannot be weighed by "
                           f"{weight:g}: give it the weight 1, or leave it out.")
    shape, stored = tuple(adapter.trained[name].shape), checkpoint.tensors[location.read].shape
    if not stands_for(shape, block, stored):
        raise MismatchError(f"{label} has a trained '{name}' {shape}, but {checkpoint.label} has "
                            f"it as {stored}.")
    if name not in adapter.buffers:
        check_dtype(location.read, checkpoint)


def check_dtype(name: str, checkpoint: Checkpoint) -> None:
    """Raise FormatError unless a tensor is of a dtype in which a matrix is computed with."""
    dtype = checkpoint.tensors[name].dtype
    if dtype not in FLOATS:
        kind = dtype or "a type that is only carried along, such as float8"
        raise FormatError(
            f"'{name}' of {checkpoint.label} is stored as {kind}, in which there is no W + s B A: "
            "dequantise the checkpoint first.")


def _addend(weighted: WeightedAdapter, site: str, layout: Layout, tensor: TensorInfo) -> Addend:
    """The addend of a tensor as it is stored, in the dtype that factors would have in a model."""
    dtype = factor_dtype(weighted.adapter.config, torch.empty(0, dtype=tensor.dtype))
    A, B, scale = weighted.adapter.pairs[site]
    addend = Addend(B.to(dtype), A.to(dtype), weighted.weight * scale, -2, layout.start)
    return addend.transposed if layout.transposed else addend
