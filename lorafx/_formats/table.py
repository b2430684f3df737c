"""Adapter <-> file. Each format is a row of FORMATS; a path belongs to the first whose form it has."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from torch import nn

from .._adapter.adapter import Adapter, check_finite, validate
from .._errors import ConfigError, FormatError
from .._storage.durable import write_folder, write_whole
from .._storage.files import read_safetensors
from . import kohya, minimind, native, peft_config, peft_read, peft_write


@dataclasses.dataclass(frozen=True)
class Format:
    """One kind of file: which paths are such, and the two ways.

    `write` takes the adapter, the path, the model that it is from, and the model's fingerprint. `read` takes the path,
    the adapter's name if one is asked for, and the model if there is one; it gives the adapter and the fingerprint of
    the model that it was made for, if the file keeps it.
    """

    name: str
    form: str
    fits: Callable[[Path], bool]
    write: Callable[[Adapter, Path, nn.Module | None, str | None], None]
    read: Callable[[Path, str | None, nn.Module | None], tuple[Adapter, str | None]]
    keeps_training: bool = False


def write_adapter(adapter: Adapter, path: str | os.PathLike[str], model: nn.Module | None, base: str | None) -> None:
    """Save an adapter whole or not at all; `base` is the fingerprint of the model that it is from."""
    path = Path(path)
    row = format_of(path)
    if adapter.training is not None and not row.keeps_training:
        raise FormatError(f"'{path}' is a {row.name} file, which keeps no optimizer and step: leave out optimizer=... "
                          "and step=..., or save to a path that ends in .safetensors.")
    try:
        validate(adapter)
        check_finite(adapter)
        row.write(adapter, path, model, base)
    except ConfigError as error:
        raise FormatError(f"Adapter {adapter.name!r} cannot be saved to '{path}': {error}") from error


def read_adapter(
    path: str | os.PathLike[str], name: str | None = None, model: nn.Module | None = None,
    allow_nonfinite: bool = False,
) -> tuple[Adapter, str | None]:
    """The adapter in a file, all of it checked, and the fingerprint of its base if the format keeps one.

    `name` chooses among several adapters of one folder; `model` helps where a format does not tell all by itself.
    """
    path = Path(path)
    row = format_of(path)
    if not path.exists():
        raise FormatError(f"There is no file '{path}'.")
    try:
        adapter, base = row.read(path, name, model)
        validate(adapter)
        if not allow_nonfinite:
            check_finite(adapter, ", which lorafx.load lets in with allow_nonfinite=True")
    except ConfigError as error:
        raise FormatError(f"'{path}' cannot be loaded: {error}") from error
    return adapter, base


def _write_native(adapter: Adapter, path: Path, model: nn.Module | None, base: str | None) -> None:
    _write_file(path, native.encode(adapter, base))


def _write_file(path: Path, content: bytes) -> None:
    if path.is_dir():
        raise FormatError(f"'{path}' is a folder: name a file in it.")
    if _is_odd(path):
        raise FormatError(f"'{path}' is in the way, and is no file that can be replaced.")
    write_whole(path, content)


def _is_odd(path: Path) -> bool:
    """Whether there is something else than a file, such as a folder or a device."""
    return path.exists() and not path.is_file()


def _read_safetensors(path: Path, name: str | None, model: nn.Module | None) -> tuple[Adapter, str | None]:
    tensors, header = read_safetensors(path)
    if kohya.is_kohya(tensors, header):
        return kohya.decode(path, tensors, header, model), None
    return native.decode(path, tensors, header)


def _write_minimind(adapter: Adapter, path: Path, model: nn.Module | None, base: str | None) -> None:
    _write_file(path, minimind.encode(adapter, base))


def _read_minimind(path: Path, name: str | None, model: nn.Module | None) -> tuple[Adapter, str | None]:
    return minimind.decode(path)


def _write_peft(adapter: Adapter, path: Path, model: nn.Module | None, base: str | None) -> None:
    """Into the folder itself if the adapter is called default, else into a folder of its name, as PEFT does.

    The tensors are written first, and hold all of the config until that has followed.
    """
    if model is None:
        raise ConfigError("PEFT's format depends on the model: load the adapter into it, and save it from there.")
    if path.is_file() or path.name in _PEFT_FILES:
        raise ConfigError("PEFT's format is a folder, and that is a file.")
    folder = path if adapter.name == "default" else path / adapter.name
    taken = [folder / name for name in (peft_config.CONFIG, peft_read.TENSORS) if _is_odd(folder / name)]
    if taken or folder.exists() and not folder.is_dir():
        raise ConfigError(f"'{taken[0] if taken else folder}' is in the way.")

    def contents() -> dict[str, bytes]:
        there = folder / peft_config.CONFIG
        before = there.read_bytes() if there.exists() else None
        config, tensors = peft_write.encode(adapter, model, before)
        return {peft_read.TENSORS: tensors, there.name: config}

    write_folder(folder, contents)


def _read_peft(path: Path, name: str | None, model: nn.Module | None) -> tuple[Adapter, str | None]:
    folder, file = (path, None) if path.is_dir() else (path.parent, path.name)
    named = sorted(child.name for child in folder.iterdir()
                   if child.name[0] != "." and (child / peft_config.CONFIG).is_file()) if file is None else []
    own = (folder / peft_config.CONFIG).is_file()
    if own and (not named or name in (None, "default")):
        return peft_read.decode(folder, model, None if file == peft_config.CONFIG else file), None
    chosen = name if name in named else named[0] if len(named) == 1 and not own else None
    if chosen is None:
        has = ", ".join(map(repr, [*["default"] * own, *named]))
        own_folder = f", or by its own folder, such as '{folder / named[0]}'" if named else ""
        own_folder += f", or '{folder / peft_config.CONFIG}' under any name" if named and own else ""
        has = f"has {has}: name one with adapter=...{own_folder}" if has else f"has no {peft_config.CONFIG}"
        raise FormatError(f"'{folder}' {has}.")
    return dataclasses.replace(peft_read.decode(folder / chosen, model), name=chosen), None


_PEFT_FILES = (peft_config.CONFIG, peft_read.TENSORS, peft_read.OLD)


def _is_peft(path: Path) -> bool:
    return path.suffix == "" or path.name in _PEFT_FILES


FORMATS = (
    Format("PEFT", "a folder", _is_peft, _write_peft, _read_peft),
    Format("lorafx", "*.safetensors", lambda path: path.suffix.lower() == ".safetensors",
           _write_native, _read_safetensors, keeps_training=True),
    Format("MiniMind", "*.pth or *.pt", lambda path: path.suffix.lower() in (".pth", ".pt"),
           _write_minimind, _read_minimind),
    Format("PEFT", "an existing folder of any name", Path.is_dir, _write_peft, _read_peft),
)


def format_of(path: Path) -> Format:
    """The format of a path; FormatError where none is such."""
    if "\0" in str(path):
        raise FormatError(f"No path has a NUL character, as {str(path)!r} has.")
    for row in FORMATS:
        if row.fits(path):
            return row
    known = ", ".join(f"{row.form} ({row.name})" for row in FORMATS)
    raise FormatError(f"The path '{path}' names no known format by its ending: use {known}; a folder of "
                      "another name must be there already.")
