"""Files on a disk: written whole or not at all, and read without running anything that they hold."""

import contextlib
import os
import re
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from ._adapter import Pair, check_plain, check_shapes, join
from ._errors import FormatError
from ._header import check_tensor_name, read_header, read_tensor
from ._pickled import read_tensors

if sys.platform != "win32":
    import fcntl


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that whatever happens on the way, the old one or the new one stands there, whole and on the disk.

    It goes to a temporary file in the same folder, is flushed, and renamed. Missing folders are made. What killed
    processes left of such temporary files of this path is removed first.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        with _temporary(path) as temporary:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(error.errno, f"'{path}' cannot be written, and stays as it was: {reason}") from error
    sync_folder(path.parent)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A new file beside a path, gone after the context. Its process holds a lock on it, which ends with the process."""
    while True:
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        _lock(handle, wait=True)
        if os.fstat(handle).st_nlink:
            break
        os.close(handle)  # another process took it for abandoned before it was locked
    if os.name != "posix":  # where an open file cannot be renamed
        os.close(handle)
    try:
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        if os.name == "posix":
            os.close(handle)


def _remove_abandoned(path: Path) -> None:
    """Remove temporary files of a path whose processes have ended: those that can be locked."""
    for name in os.listdir(path.parent) if os.name == "posix" else ():
        if re.fullmatch(rf"\.{re.escape(path.name)}\.[0-9a-f]{{32}}\.tmp", name):
            with contextlib.suppress(OSError):  # it is gone, or another user's
                handle = os.open(path.with_name(name), os.O_RDWR | os.O_NOFOLLOW)
                try:
                    if _lock(handle, wait=False):
                        path.with_name(name).unlink()
                finally:
                    os.close(handle)


def _lock(handle: int, wait: bool) -> bool:
    """Lock an open file until it is closed; False where another has the lock, or the system has none to give."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def sync_folder(folder: Path) -> None:
    """Let the names in a folder reach the disk too, where the system can do that."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a .safetensors file, on the CPU, and its header's metadata; all of it is checked first."""
    with _reading(path, "no safetensors file") as file:
        entries, metadata = read_header(file)
        return {name: read_tensor(file, entry) for name, entry in entries.items()}, metadata


def safetensors_names(path: Path) -> tuple[list[str], dict[str, str]]:
    """The names of the tensors of a .safetensors file, and its header's metadata."""
    with _reading(path, "no safetensors file") as file:
        entries, metadata = read_header(file)
        return list(entries), metadata


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
    except Exception as error:  # damaged bytes make the parsers of JSON, zip and pickle raise anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        reason = "".join(character if character.isprintable() else "?" for character in reason)
        raise FormatError(f"'{path}' is damaged or {otherwise}: {reason}.") from error


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
