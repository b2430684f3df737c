"""Reads what torch.save wrote, tensors only, once the archive is known to hold what it claims.

torch.load does it, which with weights_only looks up and calls nothing but what makes tensors. Damage is a ValueError,
or whatever that raises; the caller, who knows the path, gives it a name.
"""

import os
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from .._adapter.adapter import check_plain
from .._errors import ConfigError, FormatError


def read_tensors(file: BinaryIO) -> Any:
    """What the file holds, on the CPU; no tensor of a dict is larger than the file."""
    size = os.fstat(file.fileno()).st_size
    if file.read(4) != b"PK\x03\x04":
        raise ValueError("it is no archive, as torch.save has written them since torch 1.6; load it by torch.load, and "
                         "save it again")
    archive = check_archive(file)
    damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of its member {damaged[:80]!r} is wrong")
    file.seek(0)
    content = load_tensors(file)
    if not isinstance(content, dict):
        return content
    storages = {value.untyped_storage()._cdata for value in content.values() if isinstance(value, Tensor)}
    if len(storages) < sum(name.partition("/")[2].startswith("data/") for name in archive.namelist()):
        raise ValueError("it names a tensor twice, or holds more data than its tensors have")
    for name, value in content.items():
        if isinstance(value, Tensor) and value.numel() * value.element_size() > size:
            raise ValueError(f"{str(name)[:80]!r} claims {value.numel()} elements, and the file has {size} bytes")
    return content


def load_tensors(file: BinaryIO | Path, mmap: bool = False) -> Any:
    """torch.load, on the CPU, with a reason of its own for what it does not let in."""
    try:
        with warnings.catch_warnings():  # torch's, of kinds of tensors that callers refuse, or only carry along
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:  # its advice is to let everything in
        raise ValueError("torch.load with weights_only=True does not let it in") from error


def check_archive(file: BinaryIO) -> zipfile.ZipFile:
    """The archive in a file; ValueError unless each member is stored as it is, once, in one folder, within the file."""
    size = os.fstat(file.fileno()).st_size
    archive = zipfile.ZipFile(file)
    members = archive.infolist()
    names = {info.filename for info in members}
    if len(names) != len(members) or len({name.partition("/")[0] for name in names}) != 1:
        raise ValueError("its archive has two members of one name, or not one folder")
    if any(info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size for info in members) or sum(
            info.file_size for info in members) > size:
        raise ValueError("its archive is compressed or claims more than the file holds")
    return archive


def open_pickle(path: Path) -> dict[str, Tensor]:
    """The plain tensors of a file that torch.save wrote, mapped from the disk where its format allows that.

    Its archive is held against its size, but not against its checksums, as that would read all of it.
    """
    try:
        with open(path, "rb") as file:
            mapped = zipfile.is_zipfile(file)
            if mapped:
                check_archive(file)
        held = load_tensors(path, mmap=mapped)
    except OSError:
        raise
    except Exception as error:  # damaged bytes make torch's unpickler raise anything
        reason = str(error).partition("\n")[0]
        raise FormatError(f"'{path}' is damaged or holds more than tensors: {reason}.") from error
    if not isinstance(held, dict):
        raise FormatError(f"'{path}' holds a {type(held).__name__}, not a dict of named tensors.")
    for name, value in held.items():
        if not (isinstance(name, str) and isinstance(value, Tensor) and not isinstance(value, nn.Parameter)):
            raise FormatError(f"'{path}' holds {name!r}, a {type(value).__name__}, where only named tensors are read: "
                              "save the state_dict by itself.")
        try:
            check_plain(name, value)
        except ConfigError as error:
            raise FormatError(f"'{path}' cannot be merged: {error}") from error
    return held
