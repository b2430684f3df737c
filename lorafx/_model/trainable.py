"""What an adapter trains of the base itself: its tensors, or rows of them, that `trainable` names.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .._adapter.names import block_of, closest_names, name_matches, ranges_of, site_name
from .._errors import ConfigError, NoSiteError


def trained_tensors(
    base: Mapping[str, Tensor], patterns: Sequence[Any]
) -> dict[str, Tensor]:
    """{first name: tensor} of all that patterns mean.

    That is parameters by their names, and all tensors of modules that have parameters by theirs; or
    rows of a parameter, `embed_tokens[100:103]`, for which the name ends in these.
    """
    paths: set[str] = set()
    for name, tensor in base.items():
        if isinstance(tensor, nn.Parameter):
            paths.update(name.rsplit(".", depth)[0] for depth in range(name.count(".") + 1))
    wanted: set[Tensor] = set()
    rows: dict[Tensor, list[range]] = {}
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ConfigError(
                f"trainable takes names and globs of modules and parameters, not {pattern!r}.")
        matched = {path for path in paths if name_matches(pattern, path)}
        ranges = {} if matched else _rows_meant(base, pattern)
        for tensor, meant in ranges.items():
            rows.setdefault(tensor, []).extend(meant)
        if not matched and not ranges:
            raise NoSiteError(
                f"No parameter, and no module with parameters, matches trainable={pattern!r}; this "
                f"model has {closest_names(pattern, sorted(paths))}.")
        inside = tuple(f"{path}." for path in matched)
        wanted |= {tensor for name, tensor in base.items()
                   if name in matched or name.startswith(inside)}
    first_names: dict[Tensor, str] = {}
    for name, tensor in base.items():
        if tensor in wanted and tensor in rows:
            raise ConfigError(f"trainable means all of '{name}' and some of its rows: choose one.")
        if tensor in wanted:
            first_names.setdefault(tensor, name)
        elif tensor in rows:
            first_names.setdefault(tensor, name + block_of(rows[tensor]))
    return {name: tensor for tensor, name in first_names.items()}


def _rows_meant(base: Mapping[str, Tensor], pattern: str) -> dict[Tensor, tuple[range, ...]]:
    """{parameter: its rows} that a pattern such as `embed_tokens[5,100:103]` means."""
    match = re.fullmatch(r"(.*)(\[[\d:, ]+\])", pattern)
    if match is None:
        return {}
    ranges = ranges_of(match[2].replace(" ", ""))
    if not ranges:
        raise ConfigError(f"trainable={pattern!r} means no rows; [5,100:103] are 5 and 100 to 102.")
    found: dict[Tensor, tuple[range, ...]] = {}
    for name, tensor in base.items():
        owner, _, attribute = name.rpartition(".")
        names = name, site_name(owner, attribute)
        meant = isinstance(tensor, nn.Parameter) and tensor.ndim
        if meant and any(name_matches(match[1], one) for one in names):
            last = max(rows.stop for rows in ranges) - 1
            if last >= len(tensor):
                raise ConfigError(f"trainable={pattern!r} asks for row {last} of '{name}', which "
                                  f"has {len(tensor)}.")
            found[tensor] = ranges
    return found
