"""Adapter <-> file. Each format is a row of FORMATS, chosen by the path's ending."""

import contextlib
import dataclasses
import io
import json
import os
import re
import uuid
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ._adapter import FLOATS, Adapter, LoRAConfig, Pair, join, validate
from ._errors import ConfigError, FormatError, LorafxError

VERSION = "1"


def write(adapter: Adapter, path: str | os.PathLike[str], base: str) -> None:
    """Save an adapter whole or not at all: to a temporary file in the same folder, flushed, then renamed.

    `base` is the fingerprint of the model it belongs to, kept where the format has a place for it.
    """
    path = Path(path)
    encode = _row(path).encode
    if path.is_dir():
        raise FormatError(f"'{path}' is a folder: name a file in it.")
    try:
        validate(adapter)
        content = encode(adapter, base)
    except ConfigError as error:
        raise FormatError(f"Adapter {adapter.name!r} cannot be saved to '{path}': {error}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def read(path: str | os.PathLike[str]) -> tuple[Adapter, str | None]:
    """The adapter in a file, all of it checked, and the fingerprint of its base if the format keeps one."""
    path = Path(path)
    decode = _row(path).decode
    if not path.is_file():
        raise FormatError(f"There is no file '{path}'.")
    try:
        adapter, base = decode(path)
        validate(adapter)
    except ConfigError as error:
        raise FormatError(f"'{path}' cannot be loaded: {error}") from error
    return adapter, base


def _encode_native(adapter: Adapter, base: str) -> bytes:
    about = {"name": adapter.name, "config": _config_to_json(adapter.config), "base": base,
             "scales": {site: pair.scale for site, pair in adapter.pairs.items()}, "trained": list(adapter.trained)}
    tensors = {name: tensor.contiguous() for name, tensor in adapter.tensors()}
    return safetensors.torch.save(tensors, {"format": "lorafx", "version": VERSION, "adapter": json.dumps(about)})


def _decode_native(path: Path) -> tuple[Adapter, str | None]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (safetensors.SafetensorError, OSError) as error:
        raise FormatError(f"'{path}' is damaged or no safetensors file: {error}.") from error
    if header.get("format") != "lorafx":
        raise FormatError(f"'{path}' was not written by lorafx.save: its header's format is {header.get('format')!r}.")
    if header.get("version") != VERSION:
        raise FormatError(f"'{path}' has format version {header.get('version')}, not {VERSION}: update lorafx.")
    try:
        about = json.loads(header["adapter"])
        config = _config_from_json(about["config"])
        scales, names, base = dict(about["scales"]), set(about["trained"]), str(about["base"])
        pairs = _pairs({n: t for n, t in tensors.items() if n not in names}, "lora.A", "lora.B", path, scales)
        trained = {name: tensors[name] for name in sorted(names)}
        for listed in (scales.keys(), set(config.targets)):
            if listed != pairs.keys():
                site = min(listed ^ pairs.keys())
                raise FormatError(f"'{path}' has '{site}' in only one of its header and its tensors.")
        return Adapter(about["name"], config, pairs, trained), base
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        if isinstance(error, LorafxError):
            raise
        raise FormatError(f"The header of '{path}' is damaged: {type(error).__name__}: {error}.") from error


def _encode_minimind(adapter: Adapter, base: str) -> bytes:
    if adapter.trained:
        name = next(iter(adapter.trained))
        raise ConfigError(f"a MiniMind file holds no base weights, such as the trained '{name}'; save to a path that "
                          "ends in .safetensors.")
    tensors = {}
    for site, (A, B, scale) in adapter.pairs.items():
        tensors[join(site, "lora.A.weight")] = A.half()
        tensors[join(site, "lora.B.weight")] = (scale * B.to(torch.float64)).half()  # its readers know no scale
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ConfigError(f"'{name}' exceeds float16's 65504; save to a path that ends in .safetensors.")
    buffer = io.BytesIO()
    torch.save({name: tensor.cpu() for name, tensor in tensors.items()}, buffer)
    return buffer.getvalue()


def _decode_minimind(path: Path) -> tuple[Adapter, str | None]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make torch's unpickler raise anything
        reason = str(error).partition("\n")[0]
        raise FormatError(f"'{path}' is damaged or holds more than tensors: {reason}.") from error
    items = tensors.items() if isinstance(tensors, dict) else [(None, None)]
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in items):
        raise FormatError(f"'{path}' does not hold a dict of named tensors.")
    pairs = _pairs(tensors, "lora.A.weight", "lora.B.weight", path, defaultdict(lambda: 1.0))
    validate(Adapter("default", LoRAConfig(), pairs))
    rank = max(pair.A.shape[-2] for pair in pairs.values())
    return Adapter("default", LoRAConfig(rank=rank, targets=list(pairs)), pairs), None


def _pairs(tensors: Mapping[str, Tensor], a: str, b: str, path: Path, scales: Mapping[str, float]) -> dict[str, Pair]:
    """{site: Pair} from tensors named `<site>.<a>` and `<site>.<b>`; anything else is an error that names it."""
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(rf"(?:(.+)\.)?({re.escape(a)}|{re.escape(b)})", name)
        if match is None:
            raise FormatError(f"'{path}' has a tensor '{name}', which is neither '<site>.{a}' nor '<site>.{b}'.")
        halves.setdefault(match[1] or "", {})[match[2]] = tensor
    for site, half in halves.items():
        if len(half) != 2:
            raise FormatError(f"'{path}' has '{join(site, next(iter(half)))}' but not its other half.")
    if not halves:
        raise FormatError(f"'{path}' holds no adapter: it has no tensors.")
    return {site: Pair(half[a], half[b], scales[site]) for site, half in halves.items()}


def _config_to_json(config: LoRAConfig) -> dict[str, Any]:
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return {**fields, "dtype": None if config.dtype is None else str(config.dtype)}


def _config_from_json(fields: dict[str, Any]) -> LoRAConfig:
    dtypes: dict[str | None, torch.dtype | None] = {None: None, **{str(dtype): dtype for dtype in FLOATS}}
    unknown = fields.keys() - {f.name for f in dataclasses.fields(LoRAConfig)}
    if unknown:
        raise FormatError(f"The config holds '{min(unknown)}', which this lorafx does not know: update it.")
    return LoRAConfig(**{**fields, "dtype": dtypes[fields["dtype"]]})


@dataclasses.dataclass(frozen=True)
class Format:
    """One kind of file: what its path ends in, and the two ways."""

    name: str
    endings: tuple[str, ...]
    encode: Callable[[Adapter, str], bytes]
    decode: Callable[[Path], tuple[Adapter, str | None]]


FORMATS = (
    Format("lorafx", (".safetensors",), _encode_native, _decode_native),
    Format("MiniMind", (".pth", ".pt"), _encode_minimind, _decode_minimind),
)


def _row(path: Path) -> Format:
    for row in FORMATS:
        if path.suffix.lower() in row.endings:
            return row
    known = ", ".join(f"{'/'.join(row.endings)} ({row.name})" for row in FORMATS)
    raise FormatError(f"The path '{path}' names no known format by its ending: use {known}.")
