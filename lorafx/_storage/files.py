"""Adapters' files, read without running anything that they hold."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from .._adapter.adapter import check_plain
from .._errors import FormatError
from .header import check_tensor_name, read_header, read_tensor
from .pickles import read_tensors


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a .safetensors file, on the CPU, and its header's metadata; all of it is checked first."""
    with _reading(path, "no safetensors file") as file:
        entries, metadata = read_header(file)
        return {name: read_tensor(file, entry) for name, entry in entries.items()}, metadata


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata in the header of a .safetensors file; its data is not read."""
    with _reading(path, "no safetensors file") as file:
        return read_header(file)[1]


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that torch.save wrote, by name, on the CPU; nothing else in it is let in."""
    with _reading(path, "holds more than tensors") as file:
        tensors = read_tensors(file)
        for name, tensor in tensors.items() if isinstance(tensors, dict) else ():
            check_tensor_name(str(name))
            if isinstance(tensor, Tensor):
                check_plain(name, tensor)
    items = tensors.items() if isinstance(tensors, dict) else [(None, None)]
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in items):
        raise FormatError(f"'{path}' does not hold a dict of named tensors.")
    return dict(items)


@contextlib.contextmanager
def _reading(path: Path, otherwise: str) -> Iterator[BinaryIO]:
    try:
        with open(path, "rb") as file:
            yield file
    except MemoryError:
        raise
    except OSError as error:
        raise FormatError(f"'{path}' cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # damaged bytes make the parsers of JSON, zip and pickle raise anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        reason = "".join(character if character.isprintable() else "?" for character in reason)
        raise FormatError(f"'{path}' is damaged or {otherwise}: {reason}.") from error
