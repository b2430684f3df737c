"""What an adapter trains of the base itself: its parameters that `trainable` names."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .._adapter.names import closest_names, name_matches
from .._errors import ConfigError, NoSiteError


def trained_tensors(
    base: Mapping[str, nn.Parameter], patterns: Sequence[Any]
) -> dict[str, nn.Parameter]:
    """{first name: Parameter} of all that patterns mean, by a name or that of a module around."""
    paths: dict[str, list[str]] = {}  # {a parameter or a module: names of its parameters}
    for name in base:
        for depth in range(name.count(".") + 1):
            paths.setdefault(name.rsplit(".", depth)[0], []).append(name)
    wanted: set[nn.Parameter] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ConfigError(
                f"trainable takes names and globs of modules and parameters, not {pattern!r}.")
        matched = [path for path in paths if name_matches(pattern, path)]
        if not matched:
            raise NoSiteError(
                f"No parameter, and no module with parameters, matches trainable={pattern!r}; this "
                f"model has {closest_names(pattern, sorted(paths))}.")
        for path in matched:
            wanted.update(base[name] for name in paths[path])
    first_names: dict[nn.Parameter, str] = {}
    for name, parameter in base.items():
        if parameter in wanted:
            first_names.setdefault(parameter, name)
    return {name: parameter for parameter, name in first_names.items()}
