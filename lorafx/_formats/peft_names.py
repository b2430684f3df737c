"""Names of tensors in PEFT's folders, though wrappers and old versions put more into them."""

import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .._errors import FormatError


PREFIX = "base_model.model."  # of every tensor's name

# Parts that wrappers put into names: of FSDP, torch.compile and activation checkpoints anywhere, of
# DDP before all of a name.
_PARTS = r"(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)"
_WRAPPED = re.compile(rf"(?<![^.]){_PARTS}\.")
_WRAPPED_IN_PATTERN = re.compile(rf"(?<!\w){_PARTS}\\?\.(?![*+?{{])")  # whose dot is one dot
_WRAPPED_WHOLE = re.compile(rf"module\.(?={re.escape(PREFIX)})")

# Halves of a pair after which the adapter's name was left, as it is in PEFT's live models.
_WITH_ADAPTER = re.compile(r"(.+\.lora_[AB])\.([^.]+)\.weight")


def named_as_saved(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return tensors by the names that PEFT saves, without the prefix of all."""
    found: dict[str, Tensor] = {}
    adapters = set()
    for original, tensor in tensors.items():
        name = _WRAPPED_WHOLE.sub("", _WRAPPED.sub("", original), 1)
        if not name.startswith(PREFIX):
            raise FormatError(f"'{path}' has a tensor '{original}', which does not begin with "
                              f"'{PREFIX}' as PEFT's do.")
        half = _WITH_ADAPTER.fullmatch(name)
        if half is not None:
            name = f"{half[1]}.weight"
            adapters.add(half[2])
        _put(found, name.removeprefix(PREFIX), tensor, path)
    if len(adapters) > 1:
        names = ", ".join(map(repr, sorted(adapters)))
        raise FormatError(f"'{path}' holds several adapters, {names}: save each by itself, by "
                          "PEFT's save_pretrained.")
    return found


def config_as_saved(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config whose names and patterns of modules lack what wrappers put into them."""
    return {entry: _unwrapped(value) for entry, value in config.items()}


def _unwrapped(value: Any) -> Any:
    if isinstance(value, str):
        return _WRAPPED_IN_PATTERN.sub("", value)
    if isinstance(value, list):
        return [_unwrapped(part) for part in value]
    if isinstance(value, dict):
        return {_unwrapped(name): part for name, part in value.items()}
    return value


def without_repeated_prefix(
    tensors: Mapping[str, Tensor], modules: Container[str], path: Path
) -> dict[str, Tensor]:
    """Return tensors without the prefix where all have it once more, as of models wrapped twice.

    The model's own modules may be called so.
    """
    found = dict(tensors)
    while found and PREFIX.rstrip(".") not in modules:
        if not all(name.startswith(PREFIX) for name in found):
            break
        shorter: dict[str, Tensor] = {}
        for name, tensor in found.items():
            _put(shorter, name.removeprefix(PREFIX), tensor, path)
        found = shorter
    return found


def _put(found: dict[str, Tensor], name: str, tensor: Tensor, path: Path) -> None:
    if name in found:
        raise FormatError(f"'{path}' has two tensors for '{PREFIX}{name}', but for what wrappers "
                          "put into their names.")
    found[name] = tensor
