"""lorafx's own format, `.safetensors`: all of an adapter, its config and its model's fingerprint.

Tensors are named as by `Adapter.tensors`; the header's metadata holds the rest as JSON.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._adapter.adapter import Adapter, Pair, StoredWeight, Training
from .._adapter.config import FLOATS, LoRAConfig, short_repr
from .._errors import ConfigError, FormatError, LorafxError
from .._storage.json_files import parse_json
from .._storage.safetensors_files import safetensors_bytes
from .adapter_file import AdapterFile, Decoded, Destination
from .pairs import pairs_of
from .training import PREFIX, list_of_names, pack_training, unpack_training


VERSION = "1"
# {in a file: field of an Adapter}, kept where they are true
_FLAGS = {"alone": "untied", "turned": "says_transposed"}
# what reading a damaged header raises
_DAMAGE = (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError)
_KNOWN = {
    "name", "config", "base", "scales", "trained", "buffers", "stored", "training",
    "alone_rows", *_FLAGS}


def encode(adapter: Adapter, destination: Destination) -> dict[str, bytes]:
    """Return {file name: content}, the same bytes for the same adapter."""
    about: dict[str, Any] = {
        "name": adapter.name, "config": _config_to_json(adapter.config), "base": destination.base,
        "scales": {site: pair.scale for site, pair in adapter.pairs.items()},
        "trained": list(adapter.trained), "stored": adapter.stored}
    if adapter.buffers:
        about["buffers"] = sorted(adapter.buffers)
    if adapter.alone:
        about["alone_rows"] = sorted(adapter.alone)
    for key, field in _FLAGS.items():
        if getattr(adapter, field):
            about[key] = True
    tensors = dict(adapter.tensors())
    for name in tensors:
        if name.startswith(PREFIX):
            raise ConfigError(f"the name '{name}' begins with '{PREFIX}', as only what lorafx "
                              "keeps of training does.")
    if adapter.training is not None:
        about["training"], state = pack_training(adapter.training)
        tensors |= state
    metadata = {"format": "lorafx", "version": VERSION, "adapter": json.dumps(about)}
    return {destination.path.name: safetensors_bytes(tensors, metadata)}


def decode(file: AdapterFile) -> Decoded:
    """Return the adapter in a file and the fingerprint of its base, or raise FormatError."""
    path, header = file.path, file.metadata
    if header.get("format") != "lorafx":
        kind = short_repr(header.get("format"))
        raise FormatError(
            f"'{path}' was not written by lorafx.save: its header's format is {kind}.")
    if header.get("version") != VERSION:
        version = short_repr(header.get("version"))
        raise FormatError(f"'{path}' has format version {version}, not {VERSION}: update lorafx.")
    try:
        about = parse_json(header["adapter"])
        unknown = about.keys() - _KNOWN
        if unknown:
            raise FormatError(f"The header of '{path}' holds {short_repr(min(unknown))}, which "
                              "this lorafx does not know: update it.")
        return Decoded(_adapter(about, dict(file.tensors), path), _base(about["base"]))
    except LorafxError:
        raise
    except _DAMAGE as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise FormatError(f"The header of '{path}' is damaged: {reason}.") from error


def _adapter(about: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> Adapter:
    """The adapter that a header describes; all sorts of errors where the header is damaged."""
    config = _config_from_json(about["config"])
    scales = dict(about["scales"].items())
    names = list_of_names(about["trained"])
    training = _take_training(about["training"], tensors) if "training" in about else None
    whole = set(names)
    factors = {name: tensor for name, tensor in tensors.items() if name not in whole}
    pairs = _ordered(pairs_of(factors, "lora.A", "lora.B", path, scales), scales, config, path)
    trained = {name: tensors[name] for name in names}
    stored = {site: _stored(*fields) for site, fields in about.get("stored", {}).items()}
    buffers = frozenset(list_of_names(about.get("buffers", [])))
    if not buffers <= whole:
        raise ValueError("a buffer is not among what is trained")
    flags: dict[str, Any] = {
        field: _flag(about[key]) for key, field in _FLAGS.items() if key in about}
    alone = frozenset(list_of_names(about.get("alone_rows", [])))
    if not alone <= whole:
        raise ValueError("rows by themselves are not among what is trained")
    return Adapter(about["name"], config, pairs, trained, stored, training, buffers=buffers,
                   alone=alone, **flags)


def _take_training(about: Any, tensors: dict[str, Tensor]) -> Training:
    """The training state, whose tensors are taken out of those of the file."""
    state = {}
    for name in list(tensors):
        if name.startswith(PREFIX):
            state[name] = tensors.pop(name)
    return unpack_training(about, state, set(tensors))


def _ordered(
    pairs: Mapping[str, Pair], scales: Mapping[str, float], config: LoRAConfig, path: Path
) -> dict[str, Pair]:
    """The pairs in the order of the header, which is the model's, once both have the same sites."""
    for listed in (scales.keys(), set(config.targets)):
        if listed != pairs.keys():
            site = min(listed ^ pairs.keys())
            raise FormatError(f"'{path}' has {short_repr(site)} in only one of its header and its "
                              "tensors.")
    return {site: pairs[site] for site in scales}


def _config_to_json(config: LoRAConfig) -> dict[str, Any]:
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    fields["dtype"] = None if config.dtype is None else str(config.dtype)
    return fields


def _config_from_json(fields: dict[str, Any]) -> LoRAConfig:
    unknown = fields.keys() - {field.name for field in dataclasses.fields(LoRAConfig)}
    if unknown:
        raise FormatError(f"The config holds {short_repr(min(unknown))}, which this lorafx does "
                          "not know: update it.")
    for field in ("targets", "exclude", "trainable"):
        list_of_names(fields.get(field, []))
    dtypes: dict[str | None, torch.dtype | None] = {None: None}
    for dtype in FLOATS:
        dtypes[str(dtype)] = dtype
    return LoRAConfig(**{**fields, "dtype": dtypes[fields["dtype"]]})


def _stored(shape: Any, transposed: Any, start: Any) -> StoredWeight:
    if type(transposed) is not bool:
        raise ValueError("how a weight is stored is not a shape, a flag and a row")
    for number in (*shape, start):
        if type(number) is not int or number < 0:
            raise ValueError("how a weight is stored is not a shape, a flag and a row")
    return StoredWeight(tuple(shape), transposed, start)


def _flag(value: Any) -> bool:
    if value is not True:
        raise ValueError(f"{short_repr(value)} is not a flag that is set")
    return value


def _base(value: Any) -> str | None:
    if value is None:  # it was converted from a format that does not say
        return None
    if type(value) is not str or not re.fullmatch("[0-9a-f]{16}", value):
        raise ValueError(f"{short_repr(value)} is not the fingerprint of a model")
    return value
