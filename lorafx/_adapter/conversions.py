"""Adapters of models whose tensors transformers renames, stacks or splits when it loads them.

Its table says how: renamings, and converters that besides do operations on tensors. What these do
to W they do here to s B A: E experts' pairs, one by one, are a stack of pairs; W1 over W3 is A1
over A3 and the diagonal of blocks B1, B3.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .adapter import Adapter, Pair, StoredWeight
from .names import dotted, split_block


class Today(NamedTuple):
    """What a tensor's name is today, and by which converter and which of its patterns, if any."""

    key: str
    converter: Any = None
    pattern: str = ""


class ConversionTable(NamedTuple):
    """transformers' table for one model: all renamings apply, and then at most one converter."""

    renamings: Sequence[Any]
    converters: Sequence[Any]

    def today(self, key: str) -> Today:
        """Return a tensor's name of today, of several that it becomes the first."""
        for renaming in self.renamings:
            key, _ = renaming.rename_source_key(key)
        for converter in self.converters:
            new, pattern = converter.rename_source_key(key)
            if pattern is not None:
                return Today(new, converter, pattern)
        return Today(key)

    def rename(self, name: str) -> str:
        """Return the name of today of a module, or of a tensor."""
        return without_weight(self.today(dotted(name, "weight")).key)

    def before(self, name: str) -> str:
        """Return the name that a module had before, by the renamings alone."""
        key = dotted(name, "weight")
        for renaming in reversed(self.renamings):
            key, _ = renaming.reverse_transform().rename_source_key(key)
        return without_weight(key)


def without_weight(key: str) -> str:
    """Return what names the site of a tensor: its module, or if it is no weight, its own name."""
    return key.removesuffix(".weight")


def of_today(adapter: Adapter, table: ConversionTable, known: Collection[str]) -> Adapter:
    """Return an adapter by the names of today, if all of these are known; else as it is."""
    pairs: dict[str, Pair] = {}
    stored: dict[str, StoredWeight] = {}
    groups: dict[Today, dict[str, dict[str, Pair]]] = defaultdict(lambda: defaultdict(dict))
    for site, pair in adapter.pairs.items():
        weight, block = split_block(site)
        today = table.today(dotted(weight, "weight"))
        if today.converter is not None:
            groups[today._replace(pattern="")][today.pattern][weight] = pair
            continue
        name = without_weight(today.key) + block
        if name in pairs:
            return adapter
        pairs[name] = pair
        if site in adapter.stored:
            stored[name] = adapter.stored[site]
    for today, by_pattern in groups.items():
        made = _converted(today, by_pattern)
        if made is None or not made.keys().isdisjoint(pairs):
            return adapter
        for name, pair in made.items():
            pairs[name] = pair
            stored[name] = StoredWeight((*pair.B.shape[:-1], pair.A.shape[-1]))
    trained = {table.rename(name): tensor for name, tensor in adapter.trained.items()}
    names = {*(split_block(site)[0] for site in pairs), *trained}
    if len(trained) < len(adapter.trained) or not all(name in known for name in names):
        return adapter
    return dataclasses.replace(adapter, pairs=pairs, trained=trained, stored=stored)


def as_stored(adapter: Adapter, table: ConversionTable, tensors: Iterable[str]) -> Adapter:
    """Return an adapter by the names of a checkpoint's tensors, if these have them; else as it is.
    """
    by_key: dict[str, list[tuple[Today, str]]] = defaultdict(list)
    for name in tensors:
        today = table.today(name)
        by_key[today.key].append((today, name))
    known = {name for key in by_key for name in (key, without_weight(key))}
    now = of_today(adapter, table, known)
    pairs: dict[str, Pair] = {}
    stored: dict[str, StoredWeight] = {}
    for site, pair in now.pairs.items():
        weight, block = split_block(site)
        found = by_key.get(dotted(weight, "weight")) or by_key.get(weight) or []
        if len(found) == 1 and found[0][0].converter is None:
            name = without_weight(found[0][1]) + block
            pairs[name] = pair
            if site in now.stored:
                stored[name] = now.stored[site]
            continue
        turned = site in now.stored and now.stored[site].transposed
        parts = {} if block else _divided(found, _turned(pair) if turned else pair)
        for name, part in parts.items():
            pairs[name] = part
            stored[name] = StoredWeight((part.B.shape[0], part.A.shape[1]))
        if not parts:
            return adapter
    trained = {}
    for name, tensor in now.trained.items():
        found = by_key.get(name, [])
        trained[found[0][1] if len(found) == 1 else name] = tensor
    return dataclasses.replace(now, pairs=pairs, trained=trained, stored=stored)


def _converted(
    today: Today, by_pattern: Mapping[str, Mapping[str, Pair]]
) -> dict[str, Pair] | None:
    """What a converter makes of pairs, by their sites; None where it is not known or lacks some."""
    converter = today.converter
    if by_pattern.keys() != set(converter.source_patterns):
        return None
    parts = []
    for pattern in converter.source_patterns:
        names = sorted(by_pattern[pattern], key=_natural)
        parts.append([by_pattern[pattern][name] for name in names])
    targets = converter.target_patterns
    for operation in converter.operations:
        step = _STEPS.get(type(operation).__name__)
        made = None if step is None else step(operation, parts, len(targets))
        if made is None:
            return None
        parts = made
    before, found, after = today.key.partition(targets[0])
    if len(parts) != len(targets) or any(len(part) != 1 for part in parts) or not found:
        return None
    sites = [without_weight(before + target + after) for target in targets]
    return {site: part[0] for site, part in zip(sites, parts)}


def _divided(found: Sequence[tuple[Today, str]], pair: Pair) -> dict[str, Pair]:
    """A stack's pairs by their experts' tensors; {} where these are not what it was made of."""
    by_pattern: dict[str, list[str]] = defaultdict(list)
    for today, name in found:
        by_pattern[today.pattern].append(name)
    converter = found[0][0].converter if found else None
    if converter is None or by_pattern.keys() != set(converter.source_patterns):
        return {}
    parts = [pair]
    for operation in reversed(converter.operations):
        kind = type(operation).__name__
        if kind == "Concatenate" and len(parts) == 1:
            halves = _pieces(pair, operation.dim, len(converter.source_patterns))
            if halves is None:
                return {}
            parts = halves
        elif kind != "MergeModulelist":
            return {}
    divided = {}
    for pattern, part in zip(converter.source_patterns, parts, strict=True):
        names = sorted(by_pattern[pattern], key=_natural)
        if part.A.ndim != 3 or len(names) != len(part.A):
            return {}
        for name, A, B in zip(names, part.A, part.B):
            divided[without_weight(name)] = Pair(A.contiguous(), B.contiguous(), part.scale)
    return divided


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts names by the numbers in them, as transformers does."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


_Parts = list[list[Pair]]  # of each of a converter's patterns


def _stack(operation: Any, parts: _Parts, count: int) -> _Parts | None:
    """Pairs of E experts as a pair of stacks, of the largest rank."""
    if operation.dim != 0:
        return None
    stacks = []
    for pairs in parts:
        rank = max(pair.A.shape[0] for pair in pairs)
        widths = {(pair.A.ndim, pair.A.shape[-1], pair.B.shape[0]) for pair in pairs}
        if len(widths) != 1 or pairs[0].A.ndim != 2:
            return None
        scaled, scale = _of_one_scale(pairs)
        A = [functional.pad(pair.A, (0, 0, 0, rank - len(pair.A))) for pair in scaled]
        B = [functional.pad(pair.B, (0, rank - len(pair.A))) for pair in scaled]
        stacks.append([Pair(torch.stack(A), torch.stack(B), scale)])
    return stacks


def _join(operation: Any, parts: _Parts, count: int) -> _Parts | None:
    """Pairs one after the other as one, whose rank is the sum of theirs."""
    pairs = [pair for part in parts for pair in part]
    axis = _axis(operation.dim, pairs[0])
    turned = axis == -1
    if axis is None or any(len(part) != 1 for part in parts):
        return None
    pairs, scale = _of_one_scale([_turned(pair) for pair in pairs] if turned else pairs)
    if len({(pair.A.shape[:-2], pair.A.shape[-1]) for pair in pairs}) != 1:
        return None
    joined = Pair(torch.cat([pair.A for pair in pairs], -2), _diagonal(pairs), scale)
    return [[_turned(joined) if turned else joined]]


def _diagonal(pairs: Sequence[Pair]) -> Tensor:
    """B of several pairs as blocks on a diagonal: (..., sum of rows, sum of ranks)."""
    rows, ranks = (sum(pair.B.shape[axis] for pair in pairs) for axis in (-2, -1))
    B = pairs[0].B.new_zeros(*pairs[0].B.shape[:-2], rows, ranks)
    row = column = 0
    for pair in pairs:
        height, width = pair.B.shape[-2:]
        B[..., row:row + height, column:column + width] = pair.B
        row, column = row + height, column + width
    return B


def _cut(operation: Any, parts: _Parts, count: int) -> _Parts | None:
    """A pair in equal pieces."""
    if [len(part) for part in parts] != [1]:
        return None
    pieces = _pieces(parts[0][0], operation.dim, count)
    return None if pieces is None else [[piece] for piece in pieces]


def _pieces(pair: Pair, dim: int, count: int) -> list[Pair] | None:
    """A pair in this many equal pieces of its rows or columns."""
    axis = _axis(dim, pair)
    if axis == -1:
        pieces = _pieces(_turned(pair), dim - 1, count)
        return None if pieces is None else [_turned(piece) for piece in pieces]
    if axis is None or pair.B.shape[-2] % count:
        return None
    return [pair._replace(B=B.contiguous()) for B in pair.B.chunk(count, -2)]


def _axis(dim: int, pair: Pair) -> int | None:
    """-2 for rows of the weight (out), -1 for columns (in), None for any other."""
    axis = dim if dim < 0 else dim - pair.A.ndim
    return axis if axis in (-2, -1) else None


def _transpose(operation: Any, parts: _Parts, count: int) -> _Parts | None:
    axes = {_axis(dim, pair) for part in parts for pair in part
            for dim in (operation.dim0, operation.dim1)}
    if axes != {-2, -1} or operation.check_dims:
        return None
    return [[_turned(pair) for pair in part] for part in parts]


def _turned(pair: Pair) -> Pair:
    return Pair(pair.B.mT, pair.A.mT, pair.scale)  # (B A)^T = A^T B^T


def _of_one_scale(pairs: Sequence[Pair]) -> tuple[list[Pair], float]:
    """Pairs with their scale, of several 1, and B multiplied by each."""
    if len({pair.scale for pair in pairs}) == 1:
        return list(pairs), pairs[0].scale
    return [Pair(pair.A, pair.B * pair.scale, 1.0) for pair in pairs], 1.0


# {class of an operation of transformers: what it does to pairs}; of any other nothing is known
_STEPS: Mapping[str, Callable[[Any, _Parts, int], _Parts | None]] = {
    "MergeModulelist": _stack, "Concatenate": _join, "Chunk": _cut, "Transpose": _transpose}
