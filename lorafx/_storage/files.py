"""Adapters' files, read without running anything that they hold."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from .._errors import FormatError
from .pickles import load_pickle
from .safetensors_files import load_safetensors, open_safetensors


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a .safetensors file, on the CPU, and its metadata; all is checked."""
    with _readable(path):
        tensors, header = load_safetensors(path)
        return tensors, header.metadata


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata in the header of a .safetensors file; its data is not read."""
    with _readable(path):
        return open_safetensors(path).metadata


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Return the named tensors of a file that torch.save wrote, on the CPU; it has nothing else."""
    with _readable(path):
        return load_pickle(path)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Let an adapter's file that the system refuses be a FormatError, as a damaged one is."""
    try:
        yield
    except OSError as error:
        raise FormatError(f"'{path}' cannot be read: {error.strerror or error}.") from error
