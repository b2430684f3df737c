"""Where in a checkpoint the tensors of an adapter are, though wrappers may have renamed both."""

from collections.abc import Container, Mapping, Sequence
from typing import NamedTuple

import torch

from .._adapter.adapter import Adapter
from .._adapter.names import Rename, closest_names, dotted, fitting_renamings, split_block
from .._errors import MismatchError
from .checkpoint import Checkpoint, Ties
from .layout import WeightedAdapter


class Location(NamedTuple):
    """Where a site is: the tensor to write, and the one to read, which a head may be tied to."""

    written: str
    read: str


def locate(weighted: WeightedAdapter, checkpoint: Checkpoint) -> dict[str, Location]:
    """Return {site or trained tensor: where it is}; MismatchError unless one renaming fits all."""
    adapter = weighted.adapter
    weights = {site: split_block(site)[0] for site in adapter.pairs}  # blocks of rows share one
    weights |= {name: split_block(name)[0] for name in adapter.trained}
    of_rows = {split_block(name)[0] for name in adapter.trained if split_block(name)[1]}
    names = list(dict.fromkeys(weights.values()))
    twins = _tied_twins(adapter)
    complete = _complete_locations(adapter, names, checkpoint, twins)
    if len(complete) > 1:
        first, second = (locations[names[0]].written for locations in complete[:2])
        raise MismatchError(
            f"{weighted.label} fits {checkpoint.label} in several ways, '{names[0]}' at '{first}' "
            f"or at '{second}': rename the tensors of one of them.")
    if not complete:
        raise _missing(weighted, names, checkpoint)
    locations = complete[0]
    owners: dict[str, str] = {}
    for name, (key, _) in locations.items():
        # beside a pair, PEFT may save the weight of the head that it is for
        both = {name, owners.setdefault(key, name)}
        expected = adapter.untied and both & adapter.pairs.keys() and both & adapter.trained.keys()
        one = not both.isdisjoint(of_rows) or both <= twins.keys()
        if len(both) == 2 and not expected and not one:
            raise MismatchError(
                f"{weighted.label} has both '{owners[key]}' and '{name}', which are one tensor of "
                f"{checkpoint.label}, '{key}'.")
    return {name: locations[weight] for name, weight in weights.items()}


def _complete_locations(
    adapter: Adapter, names: Sequence[str], checkpoint: Checkpoint, twins: Mapping[str, list[str]]
) -> list[dict[str, Location]]:
    """Each way to find all names: none but the first if they fit as they are."""
    shapes = {}
    for site in adapter.pairs:
        shapes[split_block(site)[0]] = _weight_shape(adapter, site)
    if adapter.untied:
        for name, tensor in adapter.trained.items():
            if not split_block(name)[1]:
                shapes[name] = tuple(tensor.shape)
    of_transformers = checkpoint.ties is not None  # its config is there
    for ties in (None, checkpoint.ties):  # heads that are not in the checkpoint come last
        found: dict[tuple[str, ...], dict[str, Location]] = {}

        def written(rename: Rename) -> tuple[str, ...] | None:
            """The tensors that the names become, if all are found."""
            renamed = {name: rename(name) for name in names}
            locations = _locations(renamed, shapes, adapter.trained, checkpoint, ties)
            for name in twins.keys() - locations.keys():
                for other in twins[name]:
                    if other in locations:
                        locations[name] = locations[other]
            if len(locations) < len(names):
                return None
            key = tuple(location.written for location in locations.values())
            found[key] = locations
            return key

        if fitting_renamings(names, checkpoint.tensors, written, base_models=of_transformers):
            return list(found.values())
    return []


def _tied_twins(adapter: Adapter) -> dict[str, list[str]]:
    """{trained tensor: others that are equal}, of a tied one that is saved under each name."""
    twins: dict[str, list[str]] = {}
    for name, tensor in adapter.trained.items():
        equal = []
        for other, found in adapter.trained.items():
            if other != name and not adapter.untied and torch.equal(tensor, found):
                equal.append(other)
        if equal:
            twins[name] = equal
    return twins


def _missing(
    weighted: WeightedAdapter, names: Sequence[str], checkpoint: Checkpoint
) -> MismatchError:
    missing = next(name for name in names if _tensor_of(name, checkpoint.tensors) is None)
    known = (name.removesuffix(".weight") for name in checkpoint.tensors)
    return MismatchError(
        f"{weighted.label} has '{missing}', but {checkpoint.label} has no such tensor, with or "
        f"without a wrapper's prefix; near it: {closest_names(missing, known)}. If the model "
        "renames or joins tensors when it loads them, fold the adapter in memory, by lorafx.merge.")


def _locations(
    renamed: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], trained: Container[str],
    checkpoint: Checkpoint, ties: Ties | None,
) -> dict[str, Location]:
    """Where names are, if they are found as they are renamed or are heads tied to what is there.

    Heads have one of the shapes; those in `trained` are named as their weights, others as modules.
    """
    keys = {name: _tensor_of(new, checkpoint.tensors) for name, new in renamed.items()}
    locations = {}
    for name, key in keys.items():
        if key is not None:
            locations[name] = Location(key, key)
        elif name in shapes and ties is not None and ties.tied is not False:
            shape = shapes[name]
            alike = [other for other in checkpoint.of_shape(shape) if other not in keys.values()]
            if len(alike) == 1 and (not ties.vocabularies or shape[0] in ties.vocabularies):
                head = renamed[name] if name in trained else dotted(renamed[name], "weight")
                locations[name] = Location(head, alike[0])
    return locations


def _tensor_of(name: str, tensors: Container[str]) -> str | None:
    """The tensor of a site, or a trained one: the module's weight, or the tensor's own name."""
    for key in (dotted(name, "weight"), name):
        if key in tensors:
            return key
    return None


def _weight_shape(adapter: Adapter, site: str) -> tuple[int, ...]:
    """The shape of a site's weight, as the adapter says or as (out, in)."""
    pair, stored = adapter.pairs[site], adapter.stored.get(site)
    if stored is not None:
        return stored.shape
    return (*pair.B.shape[:-1], pair.A.shape[-1])
