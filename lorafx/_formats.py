"""Adapter <-> file. Each format is a row of FORMATS, chosen by the path's ending."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from . import _minimind, _native
from ._adapter import Adapter, validate
from ._errors import ConfigError, FormatError
from ._files import write_whole


@dataclasses.dataclass(frozen=True)
class Format:
    """One kind of file: what its path ends in, and the two ways."""

    name: str
    endings: tuple[str, ...]
    encode: Callable[[Adapter, str], bytes]
    decode: Callable[[Path], tuple[Adapter, str | None]]


FORMATS = (
    Format("lorafx", (".safetensors",), _native.encode, _native.decode),
    Format("MiniMind", (".pth", ".pt"), _minimind.encode, _minimind.decode),
)


def write(adapter: Adapter, path: str | os.PathLike[str], base: str) -> None:
    """Save an adapter whole or not at all.

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
    write_whole(path, content)


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


def _row(path: Path) -> Format:
    for row in FORMATS:
        if path.suffix.lower() in row.endings:
            return row
    known = ", ".join(f"{'/'.join(row.endings)} ({row.name})" for row in FORMATS)
    raise FormatError(f"The path '{path}' names no known format by its ending: use {known}.")
