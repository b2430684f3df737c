"""What an adapter trains of the base itself: its parameters that `trainable` names."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .._adapter.names import closest_names, name_matches
from .._errors import ConfigError, NoSiteError


def trained_tensors(
    base: Mapping[str, Tensor], patterns: Sequence[Any]
) -> dict[str, Tensor]:
    """{first name: tensor} of all that patterns mean: parameters by their names, and all tensors of
    modules that have parameters by theirs."""
    paths: set[str] = set()
    for name, tensor in base.items():
        if isinstance(tensor, nn.Parameter):
            paths.update(name.rsplit(".", depth)[0] for depth in range(name.count(".") + 1))
    wanted: set[Tensor] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ConfigError(
                f"trainable takes names and globs of modules and parameters, not {pattern!r}.")
        matched = {path for path in paths if name_matches(pattern, path)}
        if not matched:
            raise NoSiteError(
                f"No parameter, and no module with parameters, matches trainable={pattern!r}; this "
                f"model has {closest_names(pattern, sorted(paths))}.")
        inside = tuple(f"{path}." for path in matched)
        wanted |= {tensor for name, tensor in base.items()
                   if name in matched or name.startswith(inside)}
    first_names: dict[Tensor, str] = {}
    for name, tensor in base.items():
        if tensor in wanted:
            first_names.setdefault(tensor, name)
    return {name: tensor for tensor, name in first_names.items()}
