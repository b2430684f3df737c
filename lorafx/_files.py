"""Files on a disk: written whole or not at all, and read without running anything that they hold."""

import contextlib
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from ._adapter import Pair, check_shapes, join
from ._errors import FormatError


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that whatever happens on the way, the old one or the new one stands there, whole and on the disk.

    It goes to a temporary file in the same folder, is flushed, and renamed. Missing folders are made.
    """
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
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Let the names in a folder reach the disk too, where the system can do that."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a .safetensors file, on the CPU, and its header's metadata."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise FormatError(f"'{path}' is damaged or no safetensors file: {error}.") from error


def safetensors_names(path: Path) -> tuple[list[str], dict[str, str]]:
    """The names of the tensors of a .safetensors file, and its header's metadata."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return list(file.keys()), file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise FormatError(f"'{path}' is damaged or no safetensors file: {error}.") from error


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that torch.save wrote, by name, on the CPU; nothing else in it is let in."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make torch's unpickler raise anything
        reason = str(error).partition("\n")[0]
        raise FormatError(f"'{path}' is damaged or holds more than tensors: {reason}.") from error
    items = tensors.items() if isinstance(tensors, dict) else [(None, None)]
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in items):
        raise FormatError(f"'{path}' does not hold a dict of named tensors.")
    return dict(items)


def pairs_of(tensors: Mapping[str, Tensor], a: str, b: str, path: Path, scales: Mapping[str, float]) -> dict[str, Pair]:
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
        check_shapes(site, half[a], half[b])
    if not halves:
        raise FormatError(f"'{path}' holds no adapter: it has no tensors.")
    return {site: Pair(half[a], half[b], scales[site]) for site, half in halves.items()}
