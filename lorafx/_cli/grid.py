"""The sites of an adapter as a grid: a column for each layer, a row for each kind of site."""

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """Kinds and layers by name, in the order of the sites, and {site: (kind, layer)} by number."""

    kinds: list[str]
    layers: list[str]
    cells: dict[str, tuple[int, int]]


def grid_of(sites: Iterable[str]) -> Grid:
    """Return where sites stand: `layers.3.mlp.up` is the kind `mlp.up` in the layer 3.

    A layer ends with the last number of a name that is not its end; a site without one is in a
    layer `-`. Layers that differ in their numbers only go by these.
    """
    split = {site: _split(site) for site in sites}
    kinds = list(dict.fromkeys(kind for _, kind in split.values()))
    layers = list(dict.fromkeys(layer for layer, _ in split.values()))
    patterns = {re.sub(r"\d+", "*", layer) for layer in layers if layer}
    labels = layers
    if len(patterns) == 1:
        labels = [".".join(re.findall(r"(?<![^.])\d+(?![^.])", layer)) for layer in layers]
    cells = {}
    for site, (layer, kind) in split.items():
        cells[site] = kinds.index(kind), layers.index(layer)
    return Grid(kinds, [label or "-" for label in labels], cells)


def _split(site: str) -> tuple[str, str]:
    """The layer of a site and its kind."""
    parts = site.split(".")
    numbers = [place for place, part in enumerate(parts[:-1]) if part.isdecimal()]
    end = numbers[-1] + 1 if numbers else 0
    return ".".join(parts[:end]), ".".join(parts[end:]) or "(the model)"
