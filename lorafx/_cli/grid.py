"""The sites of an adapter as a grid: a column for each layer, a row for each kind of site."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .._adapter.letters import elided

_WIDEST = 24  # places of a layer's name


@dataclass(frozen=True)
class Grid:
    """Kinds and layers by name, in the order of the sites, and {site: (kind, layer)} by number."""

    kinds: list[str]
    layers: list[str]
    cells: dict[str, tuple[int, int]]


def grid_of(sites: Iterable[str]) -> Grid:
    """Return where sites stand: `layers.3.mlp.up` is the kind `mlp.up` in the layer 3.

    A layer ends with the last number of a name that is not its end, or, where no name has such a
    one, with any: `net.2` is then the kind `net.*` in the layer 2. A site without a number is in
    the layer `none`. Layers that differ in their numbers only go by these.
    """
    paths = {site: site.split(".") for site in sites}
    flat = not any(_last_number(path[:-1]) for path in paths.values())
    split = {site: _split(path, flat) for site, path in paths.items()}
    kinds = list(dict.fromkeys(kind for _, kind in split.values()))
    layers = list(dict.fromkeys(layer for layer, _ in split.values()))
    patterns = {re.sub(r"\d+", "*", layer) for layer in layers if layer}
    labels = layers
    if len(patterns) == 1:
        labels = [".".join(re.findall(r"(?<![^.])\d+(?![^.])", layer)) for layer in layers]
    cells = {}
    for site, (layer, kind) in split.items():
        cells[site] = kinds.index(kind), layers.index(layer)
    return Grid(kinds, [elided(label, _WIDEST) or "none" for label in labels], cells)


def _split(path: Sequence[str], flat: bool) -> tuple[str, str]:
    """The layer of a site and its kind."""
    end = _last_number(path if flat else path[:-1])
    if end == len(path):
        return ".".join(path), ".".join([*path[:-1], "*"])
    return ".".join(path[:end]), ".".join(path[end:]) or "(the model)"


def _last_number(path: Sequence[str]) -> int:
    """How many parts of a path there are up to its last number, 0 if it has none."""
    return max((place for place, part in enumerate(path, 1) if part.isdecimal()), default=0)
