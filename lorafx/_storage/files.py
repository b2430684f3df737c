"""Adapters' files, read without running anything that they hold."""

import contextlib
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._errors import FormatError
from .json_files import read_json
from .pickles import load_part, load_pickle
from .safetensors_files import Choose, load_safetensors, open_safetensors


def read_safetensors(
    path: Path, choose: Choose = lambda names, metadata: names
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the chosen tensors of a .safetensors file, on the CPU, and its metadata; all checked.
    """
    with _readable(path):
        tensors, header = load_safetensors(path, choose)
        return tensors, header.metadata


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata in the header of a .safetensors file; its data is not read."""
    with _readable(path):
        return open_safetensors(path).metadata


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Return the named tensors of a file that torch.save wrote, on the CPU; it has nothing else."""
    with _readable(path):
        return load_pickle(path)


def read_part(
    path: Path, choose: Callable[[Collection[str]], Collection[str]]
) -> tuple[dict[str, Tensor], str]:
    """As `read_pickle`, of the one dict in a file of which names are chosen; and its keys."""
    with _readable(path):
        return load_part(path, choose)


def read_npz(path: Path) -> dict[str, Tensor]:
    """Return the arrays of a file of numpy's, as tensors; FormatError where numpy is not there."""
    try:
        import numpy
    except ImportError as error:
        raise FormatError(f"'{path}' is read by numpy, which is not installed: {error}.") from error
    with _readable(path):
        try:
            with numpy.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        except (ValueError, TypeError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise FormatError(f"'{path}' is damaged: {error}.") from error


def read_config(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file."""
    with _readable(path):
        return read_json(path)


def read_text(path: Path) -> str:
    """Return the text of a file in UTF-8, with a sign in the place of what is none."""
    with _readable(path):
        return path.read_text(encoding="utf-8", errors="replace")


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Let an adapter's file that the system refuses be a FormatError, as a damaged one is."""
    try:
        yield
    except OSError as error:
        raise FormatError(f"'{path}' cannot be read: {error.strerror or error}.") from error
