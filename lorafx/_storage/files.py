"""Adapters' files, read without running anything that they hold."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from .._errors import FormatError
from .pickles import load_pickle
from .safetensors_files import load_safetensors, open_safetensors


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a .safetensors file, on the CPU, and its header's metadata; all of it is checked first."""
    with _readable(path):
        tensors, header = load_safetensors(path)
        return tensors, header.metadata


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata in the header of a .safetensors file; its data is not read."""
    with _readable(path):
        return open_safetensors(path).metadata


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file that torch.save wrote, by name, on the CPU; nothing else in it is let in."""
    with _readable(path):
        return load_pickle(path)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Let an adapter's file that the system does not let in be a FormatError, as a damaged one is."""
    try:
        yield
    except OSError as error:
        raise FormatError(f"'{path}' cannot be read: {error.strerror or error}.") from error
