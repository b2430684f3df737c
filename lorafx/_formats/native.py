"""lorafx's own format, `.safetensors`: all of an adapter, its config and what model it was made for."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from .._adapter.adapter import Adapter, Stored
from .._adapter.config import FLOATS, LoRAConfig, shown
from .._errors import ConfigError, FormatError, LorafxError
from .._storage.header import parse_json
from .pairs import pairs_of
from .training import PREFIX, pack, texts, unpack


VERSION = "1"
# {in a file: field of an Adapter}, kept where they are true
_FLAGS = {"alone": "untied", "turned": "says_transposed"}


def encode(adapter: Adapter, base: str | None) -> bytes:
    """The content of a file."""
    about = {"name": adapter.name, "config": _config_to_json(adapter.config), "base": base,
             "scales": {site: pair.scale for site, pair in adapter.pairs.items()}, "trained": list(adapter.trained),
             "stored": adapter.stored, **{key: True for key, field in _FLAGS.items() if getattr(adapter, field)}}
    tensors = {name: _by_itself(tensor) for name, tensor in adapter.tensors()}
    for name in tensors:
        if name.startswith(PREFIX):
            raise ConfigError(f"the name '{name}' begins with '{PREFIX}', as only what lorafx keeps of training does.")
    if adapter.training is not None:
        about["training"], state = pack(adapter.training)
        tensors |= {name: _by_itself(tensor) for name, tensor in state.items()}
    return safetensors.torch.save(tensors, {"format": "lorafx", "version": VERSION, "adapter": json.dumps(about)})


def decode(path: Path, tensors: dict[str, Tensor], header: Mapping[str, str]) -> tuple[Adapter, str | None]:
    """The adapter in a file of these, and the fingerprint of its base if the file has one."""
    if header.get("format") != "lorafx":
        kind = shown(header.get("format"))
        raise FormatError(f"'{path}' was not written by lorafx.save: its header's format is {kind}.")
    if header.get("version") != VERSION:
        version = shown(header.get("version"))
        raise FormatError(f"'{path}' has format version {version}, not {VERSION}: update lorafx.")
    try:
        about = parse_json(header["adapter"])
        unknown = about.keys() - {"name", "config", "base", "scales", "trained", "stored", "training", *_FLAGS}
        if unknown:
            raise FormatError(f"The header of '{path}' holds {shown(min(unknown))}, which this lorafx does not know: "
                              "update it.")
        config = _config_from_json(about["config"])
        scales, names, base = dict(about["scales"].items()), set(texts(about["trained"])), _base(about["base"])
        training = None
        if "training" in about:
            state = {name: tensors.pop(name) for name in list(tensors) if name.startswith(PREFIX)}
            training = unpack(about["training"], state, set(tensors))
        pairs = pairs_of({n: t for n, t in tensors.items() if n not in names}, "lora.A", "lora.B", path, scales)
        trained = {name: tensors[name] for name in about["trained"]}  # in the order of the model, as are the scales
        for listed in (scales.keys(), set(config.targets)):
            if listed != pairs.keys():
                site = min(listed ^ pairs.keys())
                raise FormatError(f"'{path}' has {shown(site)} in only one of its header and its tensors.")
        pairs = {site: pairs[site] for site in scales}
        stored = {site: _stored(*fields) for site, fields in about.get("stored", {}).items()}
        flags = {field: _flag(about[key]) for key, field in _FLAGS.items() if key in about}
        return Adapter(about["name"], config, pairs, trained, stored, training, **flags), base
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, LorafxError):
            raise
        raise FormatError(f"The header of '{path}' is damaged: {type(error).__name__}: {str(error)[:200]}.") from error


def _by_itself(tensor: Tensor) -> Tensor:
    """A contiguous tensor that shares its memory with no other, as safetensors wants it."""
    tensor = tensor.contiguous()
    return tensor if tensor.nbytes == tensor.untyped_storage().nbytes() else tensor.clone()


def _config_to_json(config: LoRAConfig) -> dict[str, Any]:
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return {**fields, "dtype": None if config.dtype is None else str(config.dtype)}


def _config_from_json(fields: dict[str, Any]) -> LoRAConfig:
    dtypes: dict[str | None, torch.dtype | None] = {None: None, **{str(dtype): dtype for dtype in FLOATS}}
    unknown = fields.keys() - {f.name for f in dataclasses.fields(LoRAConfig)}
    if unknown:
        raise FormatError(f"The config holds {shown(min(unknown))}, which this lorafx does not know: update it.")
    for field in ("targets", "exclude", "trainable"):
        texts(fields.get(field, []))
    return LoRAConfig(**{**fields, "dtype": dtypes[fields["dtype"]]})


def _stored(shape: Any, transposed: Any, start: Any) -> Stored:
    if not all(type(number) is int and number >= 0 for number in (*shape, start)) or type(transposed) is not bool:
        raise ValueError("how a weight is stored is not a shape, a flag and a row")
    return Stored(tuple(shape), transposed, start)


def _flag(value: Any) -> bool:
    if value is not True:
        raise ValueError(f"{shown(value)} is no flag that is set")
    return value


def _base(value: Any) -> str | None:
    if value is None:  # it was converted from a format that does not say
        return None
    if type(value) is not str or not re.fullmatch("[0-9a-f]{16}", value):
        raise ValueError(f"{shown(value)} is no fingerprint of a model")
    return value
