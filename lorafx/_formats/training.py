"""The state of a training run <-> tensors under a reserved prefix, and JSON for the rest."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._adapter.adapter import Training, all_finite, check_plain
from .._adapter.config import short_repr
from .._errors import ConfigError
from .._storage.safetensors_files import NUMBERS


PREFIX = "lorafx:"  # no tensor of an adapter has such a name
_PARTS = {"step", "kind", "groups", "state", "random"}
_A_TENSOR: dict[str, Any] = {}  # what stands in JSON for an entry that is a tensor


def pack_training(training: Training) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return (what JSON holds, {name: tensor}) of a training state, or raise ConfigError."""
    tensors = {_random_name(place): state for place, state in training.random.items()}
    plain: dict[str, dict[str, Any]] = {}
    for name, entries in training.state.items():
        plain[name] = {}
        for key, value in entries.items():
            if not isinstance(key, str) or not key.isidentifier():
                raise ConfigError(f"the optimizer keeps {short_repr(key)} of '{name}', which is "
                                  "not a name.")
            if isinstance(value, Tensor):
                tensors[_state_name(key, name)] = value.detach()
                plain[name][key] = _A_TENSOR
            else:
                plain[name][key] = _json_value(f"the optimizer's '{key}' of '{name}'", value)
    groups = [{"options": _options(options), "names": names} for options, names in training.groups]
    _check_tensors(tensors)
    about = {"step": training.step, "kind": training.kind, "groups": groups, "state": plain,
             "random": list(training.random)}
    return about, tensors


def unpack_training(about: Any, tensors: Mapping[str, Tensor], names: set[str]) -> Training:
    """Return the training state that `pack_training` took apart.

    `names` are those of the adapter's tensors.

    ValueError, TypeError, AttributeError or KeyError unless all of it is sound.
    """
    if about.keys() != _PARTS or type(about["kind"]) is not str:
        raise ValueError("the training state does not have the parts of one")
    if type(about["step"]) is not int or not 0 <= about["step"] < 2**63:
        raise ValueError(f"{short_repr(about['step'])} is not a number of steps")
    left = dict(tensors)
    random = {place: left.pop(_random_name(place)) for place in about["random"]}
    groups = []
    listed: list[str] = []
    for group in about["groups"]:
        if type(group["options"]) is not dict:
            raise ValueError("the options of a parameter group are not an object")
        groups.append((_options(group["options"]), list_of_names(group["names"])))
        listed += group["names"]
    state = {name: _entries(name, entries, left) for name, entries in about["state"].items()}
    if len(set(listed)) != len(listed) or not state.keys() <= set(listed) <= names:
        raise ValueError("the optimizer's names are not those of the adapter's tensors, each once")
    if left:
        raise ValueError(f"the tensor {min(left)!r} is not in the training state")
    for tensor in random.values():
        if tensor.dtype != torch.uint8 or tensor.ndim != 1:
            raise ValueError("the state of a random generator is not made of bytes")
    _check_tensors(tensors)
    return Training(about["step"], about["kind"], groups, state, random)


def _random_name(place: str) -> str:
    return f"{PREFIX}random:{place}"


def _state_name(key: str, name: str) -> str:
    return f"{PREFIX}state:{key}:{name}"


def _entries(name: str, entries: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What an optimizer keeps for a parameter; its tensors are taken out of those of the file."""
    found = {}
    for key, value in entries.items():
        if value == _A_TENSOR:
            found[key] = tensors.pop(_state_name(key, name))
        else:
            found[key] = _json_value(f"the optimizer's {key!r}", value)
    return found


def _options(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _json_value(f"the optimizer's {key!r}", option) for key, option in options.items()}


def _json_value(what: str, value: Any) -> Any:
    """The value, if JSON gives it back as it is but for tuples; else a ConfigError."""
    parts = value if isinstance(value, (list, tuple)) else [value]
    for part in parts:
        plain = part is None or type(part) in (bool, str)
        if type(part) is float:
            plain = math.isfinite(part)
        elif type(part) is int:
            plain = abs(part) < 2**63
        if not plain:
            raise ConfigError(f"{what} is {short_repr(part)}, and a file keeps tensors, finite "
                              "numbers and texts.")
    return value


def _check_tensors(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        check_plain(name, tensor)
        if tensor.dtype not in NUMBERS.values():
            raise ConfigError(f"'{name}' has dtype {tensor.dtype}.")
        if tensor.is_floating_point() and not all_finite(tensor):
            raise ConfigError(f"'{name}' has NaN or infinite values.")


def list_of_names(value: Any) -> list[str]:
    """Return the value, a list of strings; else a ValueError."""
    if type(value) is not list or not all(type(name) is str for name in value):
        raise ValueError("a list of names is not one")
    return value
