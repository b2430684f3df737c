"""Which tensors of a checkpoint adapters change, and how, by names and shapes: W + sum w s B A."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .._adapter.config import FLOATS, factor_dtype
from .._errors import AdapterError, FormatError, MismatchError
from .._kernels.addend import Addend
from .._kernels.weights import rows_of
from .checkpoint import Checkpoint, TensorInfo
from .layout import Layout, WeightedAdapter, layouts_of, stored_orientations
from .locate import Location, locate
from .ties import tied_names, unties


@dataclass(frozen=True)
class MergeRequest:
    """What is to be merged: adapters, the dtype to write, if another, and whether to untie."""

    adapters: Sequence[WeightedAdapter]
    dtype: torch.dtype | None
    untie: bool


@dataclass
class Change:
    """What becomes of a tensor: `trained` takes its place, if any, and the addends are added.

    `untied` says that what is trained is for this name only, where the tensor has others.
    """

    trained: Tensor | None = None
    addends: list[Addend] = field(default_factory=list)
    untied: bool = False

    def rows(self, start: int, length: int) -> "Change":
        """Return what becomes of some rows of a matrix."""
        trained = None if self.trained is None else self.trained.narrow(0, start, length)
        return Change(trained, rows_of(self.addends, start, length))


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
    first_to_train: dict[str, str] = {}
    unties_any, orientations = False, stored_orientations(checkpoint)
    for weighted in request.adapters:
        adapter, locations = weighted.adapter, locate(weighted, checkpoint)
        for key, source in locations.values():
            if key != source:
                new[key] = source
        for name, tensor in adapter.trained.items():
            key = locations[name].written
            first = first_to_train.setdefault(key, weighted.label)
            _check_trained(weighted, name, first, locations[name], checkpoint)
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
            _check_dtype(source, checkpoint)
            unties_any |= unties(locations[site], site, checkpoint, request.untie)
            addend = _addend(weighted, site, layout, tensors[site])
            addends.setdefault(key, {}).setdefault(site, []).append(addend)
    for key, by_site in addends.items():
        change = changes.setdefault(key, Change())
        for several in by_site.values():
            change.addends.extend(several)
    return MergePlan(changes, new, unties_any)


def _check_trained(
    weighted: WeightedAdapter, name: str, first: str, location: Location, checkpoint: Checkpoint
) -> None:
    """Raise unless a tensor that an adapter trained whole can take the place of the checkpoint's.

    `first` is the first adapter that trains it.
    """
    label, adapter, weight = weighted
    if first != label:
        raise AdapterError(f"{first} and {label} both train '{name}' whole, and one tensor cannot "
                           "be both: fold one of them.")
    if weight != 1:
        raise AdapterError(f"{label} trains '{name}' whole, which cannot be weighed by "
                           f"{weight:g}: give it the weight 1, or leave it out.")
    shape, stored = tuple(adapter.trained[name].shape), checkpoint.tensors[location.read].shape
    if shape != stored:
        raise MismatchError(f"{label} has a trained '{name}' {shape}, but {checkpoint.label} has "
                            f"it as {stored}.")
    if name not in adapter.buffers:
        _check_dtype(location.read, checkpoint)


def _check_dtype(name: str, checkpoint: Checkpoint) -> None:
    dtype = checkpoint.tensors[name].dtype
    if dtype not in FLOATS:
        raise FormatError(
            f"'{name}' of {checkpoint.label} is stored as {dtype or 'a type that torch lacks'}, in "
            "which there is no W + s B A: dequantise the checkpoint first.")


def _addend(weighted: WeightedAdapter, site: str, layout: Layout, tensor: TensorInfo) -> Addend:
    """The addend of a tensor as it is stored, in the dtype that factors would have in a model."""
    dtype = factor_dtype(weighted.adapter.config, torch.empty(0, dtype=tensor.dtype))
    A, B, scale = weighted.adapter.pairs[site]
    addend = Addend(B.to(dtype), A.to(dtype), weighted.weight * scale, -2, layout.start)
    return addend.transposed if layout.transposed else addend
