"""The state of a training run <-> tensors under a reserved prefix, and JSON for the rest."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._adapter.adapter import Training, all_finite, check_plain
from .._adapter.config import shown
from .._errors import ConfigError
from .._storage.header import DTYPES


PREFIX = "lorafx:"  # no tensor of an adapter has such a name


def pack(training: Training) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(what JSON holds, {name: tensor}) of a training state; ConfigError where something in it is neither."""
    tensors = {f"{PREFIX}random:{place}": state for place, state in training.random.items()}
    plain: dict[str, dict[str, Any]] = {}
    for name, entries in training.state.items():
        plain[name] = {}
        for key, value in entries.items():
            if not isinstance(key, str) or not key.isidentifier():
                raise ConfigError(f"the optimizer keeps {shown(key)} of '{name}', which is no name.")
            if isinstance(value, Tensor):
                tensors[f"{PREFIX}state:{key}:{name}"] = value.detach()
                plain[name][key] = {}  # a tensor
            else:
                plain[name][key] = checked(f"the optimizer's '{key}' of '{name}'", value)
    groups = [{"options": {key: checked(f"the optimizer's '{key}'", value) for key, value in options.items()},
               "names": names} for options, names in training.groups]
    _check_tensors(tensors)
    return {"step": training.step, "kind": training.kind, "groups": groups, "state": plain,
            "random": list(training.random)}, tensors


def unpack(about: Any, tensors: Mapping[str, Tensor], names: set[str]) -> Training:
    """The training state that `pack` took apart; ValueError, TypeError or KeyError unless all of it is sound.

    `names` are the names of the adapter's tensors.
    """
    if about.keys() != {"step", "kind", "groups", "state", "random"} or type(about["kind"]) is not str:
        raise ValueError("the training state does not have the parts of one")
    if type(about["step"]) is not int or not 0 <= about["step"] < 2**63:
        raise ValueError(f"{shown(about['step'])} is no number of steps")
    left = dict(tensors)
    random = {place: left.pop(f"{PREFIX}random:{place}") for place in about["random"]}
    groups = [(_options(group["options"]), texts(group["names"])) for group in about["groups"]]
    listed = [name for _, group in groups for name in group]
    state = {name: {key: left.pop(f"{PREFIX}state:{key}:{name}") if value == {} else
                    checked(f"the optimizer's {key!r}", value) for key, value in entries.items()}
             for name, entries in about["state"].items()}
    if len(set(listed)) != len(listed) or not set(listed) <= names or not state.keys() <= set(listed):
        raise ValueError("the optimizer's names are not those of the adapter's tensors, each once")
    if left:
        raise ValueError(f"the tensor {min(left)!r} is not in the training state")
    if any(entry.dtype != torch.uint8 or entry.ndim != 1 for entry in random.values()):
        raise ValueError("the state of a random generator is not made of bytes")
    _check_tensors(tensors)
    return Training(about["step"], about["kind"], groups, state, random)


def checked(what: str, value: Any) -> Any:
    """The value, if JSON gives it back as it is but for tuples; else a ConfigError."""
    parts = value if isinstance(value, (list, tuple)) else [value]
    for part in parts:
        kind = type(part)
        if not (kind in (bool, str, type(None)) or kind is float and math.isfinite(part)
                or kind is int and abs(part) < 2**63):
            raise ConfigError(f"{what} is {shown(part)}, and a file keeps tensors, finite numbers and texts.")
    return value


def fits(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a tensor can be an optimizer's state for a parameter: one number, or as long as it where it is not 1."""
    return tensor.numel() == 1 or len(shape) == tensor.ndim and all(n in (1, m) for n, m in zip(tensor.shape, shape))


def _check_tensors(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        check_plain(name, tensor)
        if tensor.dtype not in DTYPES.values():
            raise ConfigError(f"'{name}' has dtype {tensor.dtype}.")
        if tensor.is_floating_point() and not all_finite(tensor):
            raise ConfigError(f"'{name}' has NaN or infinite values.")


def _options(value: Any) -> dict[str, Any]:
    if type(value) is not dict:
        raise ValueError("the options of a parameter group are not an object")
    return {key: checked(f"the optimizer's {key!r}", option) for key, option in value.items()}


def texts(value: Any) -> list[str]:
    """A list of strings, or a ValueError."""
    if type(value) is not list or not all(type(text) is str for text in value):
        raise ValueError("a list of names is not one")
    return value
