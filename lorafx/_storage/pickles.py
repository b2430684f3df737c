"""Dicts of named tensors that torch.save wrote, read once their archive holds what it claims.

torch.load reads it, which with weights_only looks up and calls nothing but what makes tensors.
"""

import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from .._adapter.adapter import check_plain
from .._adapter.config import short_repr
from .._errors import FormatError
from .._kernels.private import storage_key
from .untrusted import check_tensor_name, open_untrusted


def load_pickle(path: Path, mapped: bool = False) -> dict[str, Tensor]:
    """Return the named tensors of a file, on the CPU: plain ones, none of them expanded.

    All of an adapter's file is read and held against its checksums; no tensor may be larger than
    the file or stand there twice. A checkpoint's is `mapped`: its tensors are read from the disk
    where they are needed, if its format allows that, and checksums are not, as that would read all
    of it; they may share memory, and have any names.

    Raises:
        FormatError: the file holds anything else. OSError: as the system says.
    """
    with open_untrusted(path, "holds more than tensors") as file:
        archive = _open_archive(file)
        if mapped:
            content = _load(path, mmap=archive is not None)
        elif archive is None:
            raise ValueError(OLD_FILE)
        else:
            _check_checksums(archive)
            file.seek(0)
            content = _load(file)
        _check_flat(path, content)
        if archive is not None and not mapped:
            _check_sizes(content, archive, os.fstat(file.fileno()).st_size)
        _check_tensors(path, content, mapped)
    # a state_dict has the versions of its modules too
    return content if mapped else dict(content)


def load_part(
    path: Path, choose: Callable[[Collection[str]], Collection[str]]
) -> tuple[dict[str, Tensor], str]:
    """Return named tensors of one dict in a file, and the keys that lead there, dotted.

    `choose` returns those of a dict's names that are meant. If it does for one dict alone, as of
    `{"epoch": 3, "model": {...}}`, these are returned; else the file must be as for `load_pickle`.

    Raises:
        FormatError: the file holds anything else. OSError: as the system says.
    """
    with open_untrusted(path, "holds more than tensors") as file:
        archive = _open_archive(file)
        if archive is None:
            raise ValueError(OLD_FILE)
        _check_checksums(archive)
        file.seek(0)
        content = _load(file)
        meant = []
        for keys in [[], *_parts_with_tensors(content)]:
            names = choose([name for name in _part(content, keys) if isinstance(name, str)])
            if names:
                meant.append((keys, names))
        if len(meant) != 1:
            _check_flat(path, content, [keys for keys, _ in meant if keys])
            meant = [([], content)]
        _check_sizes(content, archive, os.fstat(file.fileno()).st_size)
        keys, names = meant[0]
        part = {name: _part(content, keys)[name] for name in names}
        _check_tensors(path, part, mapped=False)
    return part, ".".join(keys)


def _part(content: Any, keys: Iterable[str]) -> dict[Any, Any]:
    """The dict under these keys; an empty one if there is none."""
    for key in keys:
        content = content[key]
    return content if isinstance(content, dict) else {}


def _check_tensors(path: Path, content: dict[Any, Any], mapped: bool) -> None:
    """Raise FormatError unless a dict has named tensors, plain ones, and nothing else."""
    for name, value in content.items():
        plain = isinstance(value, Tensor) and not (mapped and isinstance(value, nn.Parameter))
        if not isinstance(name, str) or not plain:
            kind = type(value).__name__
            raise FormatError(f"'{path}' holds {short_repr(name)}, a {kind}, where only named "
                              "tensors are read: save the state_dict by itself.")
        if not mapped:
            check_tensor_name(name)
        check_plain(name, value)


OLD_FILE = ("it is not an archive, as torch.save has written them since torch 1.6; load it by "
            "torch.load, and save it again")
_IS_FOLDER = 0x10  # an attribute for which torch reads nothing, and leaves memory as it was


def _open_archive(file: BinaryIO) -> zipfile.ZipFile | None:
    """The archive in a file, None if it does not begin as one.

    ValueError unless each member is stored as it is, once, in one folder, within the file.
    """
    size = os.fstat(file.fileno()).st_size
    if file.read(4) != b"PK\x03\x04":
        return None
    archive = zipfile.ZipFile(file)
    members = archive.infolist()
    names = {member.filename for member in members}
    if len(names) != len(members) or len({name.partition("/")[0] for name in names}) != 1:
        raise ValueError("its archive has two members of one name, or not one folder")
    claimed = 0
    for member in members:
        claimed += member.file_size
        stored = member.compress_type == zipfile.ZIP_STORED
        if not stored or member.file_size != member.compress_size or claimed > size:
            raise ValueError("its archive is compressed or claims more than the file holds")
        if member.is_dir() or member.external_attr & _IS_FOLDER:
            raise ValueError(f"its member {member.filename[:80]!r} is marked as a folder")
    return archive


def _check_checksums(archive: zipfile.ZipFile) -> None:
    """Raise ValueError if a byte of an archive's members has changed."""
    damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of its member {damaged[:80]!r} is wrong")


def _check_sizes(content: dict[Any, Any], archive: zipfile.ZipFile, size: int) -> None:
    """Raise ValueError if tensors are not what the archive of this size holds, each once."""
    storages = set()
    for name, value in _tensors_in(content):
        storages.add(storage_key(value.untyped_storage()))
        if value.nbytes > size:
            raise ValueError(f"{str(name)[:80]!r} claims {value.numel()} elements, and the "
                             f"file has {size} bytes")
    data = [name for name in archive.namelist() if name.partition("/")[2].startswith("data/")]
    if len(storages) < len(data):
        raise ValueError("it names a tensor twice, or holds more data than its tensors have")


def _tensors_in(content: Any) -> Iterator[tuple[Any, Tensor]]:
    """Each tensor in dicts, lists and tuples, and its key there."""
    seen: set[int] = set()
    left: list[tuple[Any, Any]] = [(None, content)]
    while left:
        key, value = left.pop()
        if isinstance(value, Tensor):
            yield key, value
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            left += [*(value.items() if isinstance(value, dict) else enumerate(value))]


def _check_flat(path: Path, content: Any, parts: list[list[str]] | None = None) -> None:
    """Raise FormatError unless it is a dict, with no tensors in a part: {"model": {...}}.

    `parts` are those that may be meant, if that is known.
    """
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise FormatError(f"'{path}' holds a {kind}, not a dict of named tensors.")
    parts = parts or _parts_with_tensors(content)
    if parts:
        names = ", ".join(repr(".".join(keys)[:80]) for keys in parts[:3])
        first = "".join(f"[{short_repr(key)}]" for key in parts[0])
        which = "that part" if len(parts) == 1 else "the part that is meant"
        raise FormatError(f"'{path}' holds tensors under {names}: save {which} by itself, "
                          f"torch.save(content{first}, ...).")


def _parts_with_tensors(content: Any, depth: int = 3) -> list[list[str]]:
    """Where a checkpoint of a training run has dicts of named tensors: their keys."""
    parts: list[list[str]] = []
    for key, value in _part(content, ()).items():
        if not isinstance(key, str) or not isinstance(value, dict):
            continue
        named = [inner for name, inner in value.items() if isinstance(name, str)]
        if any(isinstance(inner, Tensor) for inner in named):
            parts.append([key])
        elif depth > 1:
            parts += [[key, *keys] for keys in _parts_with_tensors(value, depth - 1)]
    return parts


def _load(file: BinaryIO | Path, mmap: bool = False) -> Any:
    """torch.load, on the CPU, with a reason of its own for what it does not let in."""
    try:
        with warnings.catch_warnings():  # torch's, of kinds of tensors that are refused here
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:  # its advice is to let everything in
        raise ValueError("torch.load with weights_only=True does not let it in") from error
