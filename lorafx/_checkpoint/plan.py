"""Which tensors of a checkpoint an adapter changes, and how: there is no model to ask, only names and shapes."""

import dataclasses
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._adapter.adapter import Adapter
from .._adapter.config import FLOATS, factor_dtype
from .._adapter.names import base_renamings, dotted, near, renamings, split_block
from .._errors import AdapterError, FormatError, MismatchError, TiedWeightError
from .._kernels.weights import Part, rows_of
from .layout import Layout, TensorInfo, WeightedAdapter, layouts_of, transposed_matrices


@dataclasses.dataclass
class Change:
    """What becomes of one tensor: `trained` takes its place, if any, and the parts are added.

    `untied` says that what is trained is for this name only, where the tensor has others.
    """

    trained: Tensor | None = None
    parts: list[Part] = dataclasses.field(default_factory=list)
    untied: bool = False

    def rows(self, start: int, length: int) -> "Change":
        """What becomes of some rows of a matrix."""
        trained = None if self.trained is None else self.trained.narrow(0, start, length)
        return Change(trained, rows_of(self.parts, start, length))


class Location(NamedTuple):
    """Where a site is: the tensor to write, and the one to read, which is another where a head is tied to it."""

    key: str
    source: str


@dataclasses.dataclass(frozen=True)
class MergePlan:
    """{tensor to write: Change}; those that the checkpoint does not hold, {name: tensor to read}; whether it unties."""

    changes: dict[str, Change]
    new: Mapping[str, str]
    unties: bool


@dataclasses.dataclass(frozen=True)
class Ties:
    """What a Hugging Face config says: whether the head is tied to the embedding, None if unsaid, and their rows.

    `one` says that this is one pair. An encoder-decoder, and a model of several with vocabularies, may tie others by
    the same word, under names that no file has.
    """

    tied: bool | None
    vocabularies: frozenset[int]
    one: bool

    @staticmethod
    def of(config: Mapping[str, Any]) -> "Ties":
        """From the content of config.json, nested configs too."""
        values = list(_nested(config))
        flags = [value["tie_word_embeddings"] for value in values if "tie_word_embeddings" in value]
        rows = [value["vocab_size"] for value in values if isinstance(value.get("vocab_size"), int)]
        one = len(rows) == 1 and not any(value.get("is_encoder_decoder") for value in values)
        return Ties(any(flags) if flags else None, frozenset(rows), one)


def _nested(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from _nested(value)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: what to call it in errors, its tensors, and whether two of them have the same values.

    Without `ties` no tensor is tied to one that it does not hold.
    """

    label: str
    held: Mapping[str, TensorInfo]
    equal: Callable[[str, str], bool]
    ties: Ties | None = None

    def of_shape(self, shape: tuple[int, ...]) -> list[str]:
        """The names of all tensors of a shape."""
        return [name for name, tensor in self.held.items() if tensor.shape == shape]

    def twins(self, name: str) -> list[str]:
        """The others that hold the same as a tensor: where they are tied, one may stand there under both names."""
        return [other for other in self.of_shape(self.held[name].shape) if other != name and self.equal(name, other)]


def plan_merge(adapters: Sequence[WeightedAdapter], checkpoint: Checkpoint, untie: bool) -> MergePlan:
    """What the adapters together change in a checkpoint; every name and shape is checked."""
    held, base = checkpoint.held, checkpoint.label
    changes: dict[str, Change] = {}
    new: dict[str, str] = {}
    parts: dict[str, dict[str, list[Part]]] = {}  # of a tensor, by site, so that they add up as in lorafx.merge
    first_trained_by: dict[str, str] = {}
    unties, stored_transposed = False, transposed_matrices(held)
    for weighed in adapters:
        label, adapter, weight = weighed
        places = _find(adapter, label, checkpoint)
        new |= {key: source for key, source in places.values() if key != source}
        for name, tensor in adapter.trained.items():
            key, source = places[name]
            _check_trained(weighed, name, first_trained_by.setdefault(key, label), held[source], base)
            if adapter.untied and tensor.ndim == 2:
                unties |= _unties(places[name], name.removesuffix(".weight"), checkpoint, untie)
            for other in [key] if adapter.untied else _names_of(key, checkpoint):
                changes[other] = Change(tensor, untied=adapter.untied)
        ways = layouts_of(weighed, {site: held[places[site].source] for site in adapter.pairs}, stored_transposed, base)
        for site, way in ways.items():
            found = places[site]
            part = _part(weighed, site, way, held[found.source], f"'{found.source}' of {base}")
            unties |= _unties(found, site, checkpoint, untie)
            parts.setdefault(found.key, {}).setdefault(site, []).append(part)
    for key, by_site in parts.items():
        changes.setdefault(key, Change()).parts = [part for several in by_site.values() for part in several]
    return MergePlan(changes, new, unties)


def _names_of(key: str, checkpoint: Checkpoint) -> list[str]:
    """A tensor's name, and that of a head or embedding that the config says is tied to it and that is held too."""
    shape, ties = checkpoint.held[key].shape, checkpoint.ties
    if ties is None or not ties.tied or len(shape) != 2 or shape[0] not in ties.vocabularies:
        return [key]
    return [key, *checkpoint.twins(key)]


def _check_trained(weighed: WeightedAdapter, name: str, first: str, tensor: TensorInfo, base: str) -> None:
    """Raise unless a tensor that an adapter trained whole can take the place of the checkpoint's."""
    label, adapter, weight = weighed
    if first != label:
        raise AdapterError(f"{first} and {label} both train '{name}' whole, and one tensor cannot be both: fold one "
                           "of them.")
    if weight != 1:
        raise AdapterError(f"{label} trains '{name}' whole, which cannot be weighed by {weight:g}: give it the weight "
                           "1, or leave it out.")
    shape = tuple(adapter.trained[name].shape)
    if shape != tensor.shape:
        raise MismatchError(f"{label} has a trained '{name}' {shape}, but {base} has it as {tensor.shape}.")
    _check_dtype(tensor, f"'{name}' of {base}")


def _check_dtype(tensor: TensorInfo, name: str) -> None:
    if tensor.dtype not in FLOATS:
        raise FormatError(f"{name} is stored as {tensor.dtype or 'a type that torch lacks'}, in which there is no "
                          "W + s B A: dequantise the checkpoint first.")


def _part(weighed: WeightedAdapter, site: str, way: Layout, tensor: TensorInfo, name: str) -> Part:
    """The addend of a tensor as it is stored, in the dtype that the factors would have in a model."""
    _check_dtype(tensor, name)
    dtype = factor_dtype(weighed.adapter.config, torch.empty(0, dtype=tensor.dtype))
    A, B, scale = weighed.adapter.pairs[site]
    part = Part(B.to(dtype), A.to(dtype), weighed.weight * scale, -2, way.start)
    return part.transposed if way.transposed else part


def _find(adapter: Adapter, label: str, checkpoint: Checkpoint) -> dict[str, Location]:
    """{site or trained tensor: where it is in the checkpoint}."""
    held, base = checkpoint.held, checkpoint.label
    whole = {site: split_block(site)[0] for site in adapter.pairs} | {name: name for name in adapter.trained}
    names = list(dict.fromkeys(whole.values()))
    shapes = {whole[site]: _shape(adapter, site) for site in adapter.pairs}
    shapes |= {name: tuple(tensor.shape) for name, tensor in adapter.trained.items() if adapter.untied}
    ways = [*renamings(names, held), *(base_renamings(names, held) if checkpoint.ties is not None else ())]
    complete: dict[tuple[str, ...], dict[str, Location]] = {}
    for ties in (None, checkpoint.ties):  # heads that are not held come last
        for number, rename in enumerate(ways):
            places = _places({name: rename(name) for name in names}, shapes, adapter.trained, checkpoint, ties)
            if len(places) == len(names):
                complete[tuple(found.key for found in places.values())] = places
                if number == 0:  # the names as they are
                    break
        if complete:
            break
    if len(complete) > 1:
        first, second = list(complete)[:2]
        raise MismatchError(f"{label} fits {base} in several ways, '{names[0]}' at '{first[0]}' or at '{second[0]}': "
                            "rename the tensors of one of them.")
    if not complete:
        missing = next(name for name in names if _tensor_named(name, held) is None)
        raise MismatchError(f"{label} has '{missing}', but {base} has no such tensor, with or without a wrapper's "
                            f"prefix; near it: {near(missing, (name.removesuffix('.weight') for name in held))}. If "
                            "the model renames or joins tensors when it loads them, fold the adapter in memory, by "
                            "lorafx.merge.")
    places = list(complete.values())[-1]
    owners: dict[str, str] = {}
    for name, (key, _) in places.items():
        # beside a pair, PEFT may save the weight of the head that it is for
        both = {name, owners.setdefault(key, name)}
        if len(both) == 2 and not (adapter.untied and both & adapter.pairs.keys() and both & adapter.trained.keys()):
            raise MismatchError(f"{label} has both '{owners[key]}' and '{name}', which are one tensor of {base}, "
                                f"'{key}'.")
    return {name: places[owner] for name, owner in whole.items()}


def _places(renamed: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], trained: Container[str],
            checkpoint: Checkpoint, ties: Ties | None) -> dict[str, Location]:
    """{name: where it is}, for the names that are found as they are renamed, or are heads tied to what is held.

    Heads have one of the shapes; those in `trained` are named as their weights, others as modules.
    """
    keys = {name: _tensor_named(to, checkpoint.held) for name, to in renamed.items()}
    places = {}
    for name, key in keys.items():
        source = key
        if key is None and name in shapes and ties is not None and ties.tied is not False:
            shape = shapes[name]
            alike = [other for other in checkpoint.of_shape(shape) if other not in keys.values()]
            if len(alike) == 1 and (not ties.vocabularies or shape[0] in ties.vocabularies):
                key, source = renamed[name] if name in trained else dotted(renamed[name], "weight"), alike[0]
        if key is not None and source is not None:
            places[name] = Location(key, source)
    return places


def _tensor_named(name: str, held: Mapping[str, TensorInfo]) -> str | None:
    """The tensor of a site, or a trained one: the module's weight, or the tensor's own name."""
    return next((key for key in (dotted(name, "weight"), name) if key in held), None)


def _shape(adapter: Adapter, site: str) -> tuple[int, ...]:
    """The shape of a site's weight, as the adapter says or as (out, in)."""
    pair, stored = adapter.pairs[site], adapter.stored.get(site)
    return stored.shape if stored is not None else (*pair.B.shape[:-1], pair.A.shape[-1])


def _unties(found: Location, site: str, checkpoint: Checkpoint, untie: bool) -> bool:
    """Whether folding into a tensor unties it from another; TiedWeightError where that is not wanted, or cannot be."""
    key, source = found
    shape, ties, base = checkpoint.held[source].shape, checkpoint.ties, checkpoint.label
    if ties is None or ties.tied is False or (key == source and shape[0] not in ties.vocabularies):
        return False
    if key == source and ties.tied is None and checkpoint.of_shape(shape) != [key]:
        return False
    others = [source] if key != source else checkpoint.twins(key)
    if not others:
        known = "is" if ties.tied else "may be"
        raise TiedWeightError(
            f"The weight of '{site}' {known} tied to another that {base} does not hold, or has the shape of such a one "
            "by chance; folding an adapter into it would change that too: fold it in memory, by lorafx.merge, or, if "
            f"{base} holds both its head and its embedding, set tie_word_embeddings to false in its config.json.")
    what = (f"The weight of '{site}' is tied to '{others[0]}' in {base}, so that folding an adapter into it would "
            "change that too")
    biases = {dotted(name.rpartition(".")[0], "bias") for name in (key, *others)}
    more = [name for name in checkpoint.of_shape(shape[:1]) if name not in biases]
    if not ties.one or more:
        why = f"may tie '{more[0]}' too" if more else "may tie more in such a model"
        raise TiedWeightError(f"{what}; --untie cannot help, as tie_word_embeddings {why}: fold the adapter in memory, "
                              "by lorafx.merge.")
    if not untie:
        raise TiedWeightError(f"{what}: --untie gives it a tensor of its own and sets tie_word_embeddings to false in "
                              "the new config.json.")
    return True
