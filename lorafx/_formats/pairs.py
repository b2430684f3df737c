"""Pairs A, B from named tensors."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from .._adapter.adapter import Pair, check_shapes
from .._adapter.names import dotted
from .._errors import FormatError


def pairs_of(
    tensors: Mapping[str, Tensor], a: str, b: str, path: Path, scales: Mapping[str, float]
) -> dict[str, Pair]:
    """Return {site: Pair} from tensors named `<site>.<a>` and `<site>.<b>`, and no others."""
    form = re.compile(rf"(?:(.+)\.)?({re.escape(a)}|{re.escape(b)})")
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = form.fullmatch(name)
        if match is None:
            raise FormatError(f"'{path}' has a tensor '{name}', which is neither '<site>.{a}' nor "
                              f"'<site>.{b}'.")
        halves.setdefault(match[1] or "", {})[match[2]] = tensor
    if not halves:
        raise FormatError(f"'{path}' holds no adapter: it has no tensors.")
    pairs = {}
    for site, half in halves.items():
        if len(half) != 2:
            raise FormatError(f"'{path}' has '{dotted(site, next(iter(half)))}' but not its other "
                              "half.")
        check_shapes(site, half[a], half[b])
        pairs[site] = Pair(half[a], half[b], scales[site])
    return pairs
