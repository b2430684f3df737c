"""lorafx's own format, `.safetensors`: all of an adapter, its config and what model it was made for."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from ._adapter import FLOATS, Adapter, LoRAConfig, Stored
from ._errors import FormatError, LorafxError
from ._files import pairs_of, read_safetensors

VERSION = "1"


def encode(adapter: Adapter, base: str) -> bytes:
    """The content of a file."""
    about = {"name": adapter.name, "config": _config_to_json(adapter.config), "base": base,
             "scales": {site: pair.scale for site, pair in adapter.pairs.items()}, "trained": list(adapter.trained),
             "stored": adapter.stored}
    tensors = {name: tensor.contiguous() for name, tensor in adapter.tensors()}
    return safetensors.torch.save(tensors, {"format": "lorafx", "version": VERSION, "adapter": json.dumps(about)})


def decode(path: Path) -> tuple[Adapter, str | None]:
    """The adapter in a file, and the fingerprint of its base if the file has one."""
    tensors, header = read_safetensors(path)
    if header.get("format") != "lorafx":
        raise FormatError(f"'{path}' was not written by lorafx.save: its header's format is {header.get('format')!r}.")
    if header.get("version") != VERSION:
        raise FormatError(f"'{path}' has format version {header.get('version')}, not {VERSION}: update lorafx.")
    try:
        about = json.loads(header["adapter"])
        config = _config_from_json(about["config"])
        scales, names, base = dict(about["scales"]), set(about["trained"]), str(about["base"])
        pairs = pairs_of({n: t for n, t in tensors.items() if n not in names}, "lora.A", "lora.B", path, scales)
        trained = {name: tensors[name] for name in sorted(names)}
        for listed in (scales.keys(), set(config.targets)):
            if listed != pairs.keys():
                site = min(listed ^ pairs.keys())
                raise FormatError(f"'{path}' has '{site}' in only one of its header and its tensors.")
        stored = {site: Stored(tuple(map(int, shape)), bool(transposed), int(start))
                  for site, (shape, transposed, start) in dict(about.get("stored", {})).items()}
        return Adapter(about["name"], config, pairs, trained, stored), base
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        if isinstance(error, LorafxError):
            raise
        raise FormatError(f"The header of '{path}' is damaged: {type(error).__name__}: {error}.") from error


def _config_to_json(config: LoRAConfig) -> dict[str, Any]:
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return {**fields, "dtype": None if config.dtype is None else str(config.dtype)}


def _config_from_json(fields: dict[str, Any]) -> LoRAConfig:
    dtypes: dict[str | None, torch.dtype | None] = {None: None, **{str(dtype): dtype for dtype in FLOATS}}
    unknown = fields.keys() - {f.name for f in dataclasses.fields(LoRAConfig)}
    if unknown:
        raise FormatError(f"The config holds '{min(unknown)}', which this lorafx does not know: update it.")
    return LoRAConfig(**{**fields, "dtype": dtypes[fields["dtype"]]})
