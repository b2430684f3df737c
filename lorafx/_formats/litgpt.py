"""What stands beside litgpt's `lit_model.pth.lora`: alpha, and which rows of q, k and v are whose.

`hyperparameters.yaml` says the former and which of q, k and v are adapted, `model_config.yaml` how
many heads there are. Only their lines `name: value` are read.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

from .._errors import FormatError
from .._storage.files import read_text


class Rows(NamedTuple):
    """Of a weight with `out` rows, those of each adapted matrix that it joins."""

    out: int
    of_each: list[list[int]]


_LINE = re.compile(r"(\w+): *([^\s#]+) *(?:#.*)?")
_HYPERPARAMETERS, _MODEL = "hyperparameters.yaml", "model_config.yaml"
# {last parts of a layer's name: whether each group's q, k and v stand together}
_JOINED = {"attn.qkv": False, "attn.attn": True}


_MOST_ROWS = 1 << 24  # of a weight that anybody has, held against before lists are made


def joins(site: str) -> bool:
    """Return True if litgpt would name a layer so that joins q, k and v."""
    return ".".join(site.split(".")[-2:]) in _JOINED


def settings_of(path: Path) -> dict[str, Any]:
    """Return the settings beside a file: {name: number, flag or text}."""
    settings: dict[str, Any] = {}
    for name in (_HYPERPARAMETERS, _MODEL):
        if (path.parent / name).is_file():
            for line in read_text(path.parent / name).splitlines():
                match = _LINE.fullmatch(line)
                if match is not None:
                    settings[match[1]] = _value(match[2])
    return settings


def _value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    try:
        return float(text) if "." in text or "e" in text else int(text)
    except ValueError:
        return text


def rows_of(path: Path, site: str) -> Rows | None:
    """Return the rows of the adapted ones of q, k and v, if that is said beside the file."""
    settings = settings_of(path)
    adapted = [settings.get(f"lora_{name}") for name in ("query", "key", "value")]
    if not joins(site) or None in adapted or "n_head" not in settings:
        return None
    heads, groups = settings["n_head"], settings.get("n_query_groups", settings["n_head"])
    size = settings.get("head_size", 0)
    if not all(type(number) is int and 0 < number < _MOST_ROWS for number in (heads, groups, size)):
        raise FormatError(f"'{path.parent / _MODEL}' has no sound n_head, n_query_groups and "
                          "head_size.")
    out = (heads + 2 * groups) * size
    if heads % groups or out > _MOST_ROWS:
        raise FormatError(f"'{path.parent / _MODEL}' has {heads} heads of {size} in {groups} "
                          "groups.")
    together = _JOINED[".".join(site.split(".")[-2:])]
    rows = zip(_rows(heads, groups, size, together), adapted)
    return Rows(out, [places for places, is_adapted in rows if is_adapted])


def _rows(heads: int, groups: int, size: int, together: bool) -> list[list[int]]:
    """The rows of q, of k and of v."""
    if not together:
        starts = [0, heads * size, (heads + groups) * size, (heads + 2 * groups) * size]
        return [[*range(start, end)] for start, end in zip(starts, starts[1:])]
    found: list[list[int]] = [[], [], []]
    q = heads // groups * size
    for group in range(groups):
        start = group * (q + 2 * size)
        found[0] += range(start, start + q)
        found[1] += range(start + q, start + q + size)
        found[2] += range(start + q + size, start + q + 2 * size)
    return found
