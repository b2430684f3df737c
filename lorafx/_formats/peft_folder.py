"""PEFT's folders: which files an adapter is in, read so that config and tensors are of one save.

A folder has `adapter_config.json` beside `adapter_model.safetensors` (or an older `.bin`); folders
of the same kind below it have adapters that are not called default.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .._errors import ConfigError, FormatError
from .._storage.files import read_metadata, read_pickle, read_safetensors
from .other_kinds import refuse_adapterhub, refuse_other_kinds
from .peft_config import ADAPTER_CONFIG, bytes_digest, config_digest, parse_config
from .peft_names import config_as_saved, named_as_saved


TENSORS, OLD = "adapter_model.safetensors", "adapter_model.bin"
FILES = (ADAPTER_CONFIG, TENSORS, OLD)

# In the header of TENSORS: the digest of the config that was written with it, and if another config
# was there before, its digest, and the new one as a whole.
DIGEST, BEFORE, WHOLE = "lorafx_config", "lorafx_config_before", "lorafx_config_whole"


class PeftFiles(NamedTuple):
    """An adapter's config, the path of its tensors, and these by name, without their prefix."""

    config: dict[str, Any]
    path: Path
    tensors: dict[str, Tensor]


def is_folder(path: Path) -> bool:
    """True if a path has no ending, as a folder's, or is one of the files in it."""
    return path.suffix == "" or path.name in FILES


def folder_of(path: Path, adapter: str) -> Path:
    """Return where PEFT saves: in the folder itself if the adapter is default, else below it."""
    if path.is_file() or path.name in FILES:
        raise ConfigError("PEFT's format is a folder, and that is a file.")
    return path if adapter == "default" else path / adapter


def find_adapter(path: Path, adapter: str | None) -> tuple[Path, str | None, str]:
    """Return an adapter's folder, the file in it if the path names one, and the adapter's name.

    `adapter` chooses where a folder has several; FormatError unless that leaves one.
    """
    folder, file = (path, None) if path.is_dir() else (path.parent, path.name)
    below = []
    if file is None:
        for child in folder.iterdir():
            if not child.name.startswith(".") and (child / ADAPTER_CONFIG).is_file():
                below.append(child.name)
    below.sort()
    own = (folder / ADAPTER_CONFIG).is_file()
    if own and (not below or adapter in (None, "default")):
        return folder, None if file == ADAPTER_CONFIG else file, "default"
    if adapter in below:
        chosen = adapter
    elif len(below) == 1 and not own:
        chosen = below[0]
    else:
        raise FormatError(f"'{folder}' {_choices(folder, own, below)}.")
    return folder / chosen, None, chosen


def _choices(folder: Path, own: bool, below: list[str]) -> str:
    """The adapters that a folder has, and how to name one of them."""
    names = ["default"] * own + below
    if not names:
        return f"has no {ADAPTER_CONFIG}"
    choices = f"has {', '.join(map(repr, names))}: name one with adapter=..."
    if below:
        choices += f", or by its own folder, such as '{folder / below[0]}'"
        if own:
            choices += f", or '{folder / ADAPTER_CONFIG}' under any name"
    return choices


def read_files(folder: Path, file: str | None) -> PeftFiles:
    """Return what a folder holds of one save; `file` names that of the tensors, else the newer."""
    while True:
        content, version = _content(folder / ADAPTER_CONFIG)
        refuse_adapterhub(content, folder)
        path, tensors, header = _tensors(folder, file)
        refuse_other_kinds(tensors, path)
        config = _config(content, folder / ADAPTER_CONFIG, header, path, len(tensors))
        if config is not None:
            return PeftFiles(config_as_saved(config), path, named_as_saved(tensors, path))
        # else another process has saved meanwhile
        if _content(folder / ADAPTER_CONFIG)[1] == version:
            raise FormatError(f"'{path}' was not written together with the {ADAPTER_CONFIG} beside "
                              "it: one of them was changed or is of another adapter; save it "
                              "again.")


def _tensors(folder: Path, file: str | None) -> tuple[Path, dict[str, Tensor], dict[str, str]]:
    """The file of a folder's tensors, these by name, and the metadata in its header."""
    for name in (TENSORS, OLD):
        path = folder / name
        if file in (None, name) and path.is_file():
            break
    else:
        raise FormatError(f"'{folder}' has neither {TENSORS} nor {OLD}.")
    newer = folder / TENSORS
    if file == OLD and newer.is_file() and DIGEST in read_metadata(newer):
        raise FormatError(f"'{path}' is of an older adapter than {TENSORS} and {ADAPTER_CONFIG} "
                          f"beside it: load '{newer}'.")
    tensors, header = read_safetensors(path) if path.name == TENSORS else (read_pickle(path), {})
    return path, tensors, header


def _config(
    content: bytes, path: Path, header: Mapping[str, str], tensors: Path, count: int
) -> dict[str, Any] | None:
    """The config that belongs to so many tensors with this header; None if it is not known.

    That in the header is meant where saving ended before the config beside it was replaced.
    """
    if header.get(BEFORE) == bytes_digest(content):
        content, path = header.get(WHOLE, "").encode(), tensors
    config = parse_config(content, path, count)
    digest = config_digest(config)
    return config if header.get(DIGEST, digest) == digest else None


def _content(path: Path) -> tuple[bytes, tuple[int, ...]]:
    """What a file holds, and what differs once it has been replaced."""
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            version = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
            return file.read(), version
    except OSError as error:
        raise FormatError(
            f"'{path}' is missing or cannot be read: {error.strerror or error}.") from error
