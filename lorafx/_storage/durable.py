"""Files and folders written whole or not at all, whatever happens to processes and disks."""

import contextlib
import errno
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from .._errors import FormatError
from .locks import lock, locked_folder, unlock


def check_path(path: Path) -> None:
    """Raise unless a file could have this path."""
    if "\0" in str(path):
        raise FormatError(f"No path has a NUL character, as {str(path)!r} has.")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that, whatever happens, the old or the new one is there, whole, on the disk.

    It goes to a temporary file in the same folder, is flushed, and renamed. Missing folders are
    made, links are followed, and permissions kept. Temporary files of this path that killed
    processes left are removed first.
    """
    with _unchanged(path):
        path = _real(path)
        _prepare(path)
        _replace({path: content})
    sync_folder(path.parent)


def write_folder(folder: Path, contents: Callable[[], Mapping[str, bytes]]) -> None:
    """Write files into a folder, which appears with all of them if it is not there yet.

    An error changes nothing. In a folder that is there files are replaced in their order, all of
    them on the disk already: a process that is killed meanwhile leaves the first ones new and the
    others old, of which a reader must make sense. `contents` is called when no other process writes
    there, so that it may look at what there is.
    """
    with _unchanged(folder):
        folder, folders = _real(folder), {folder.parent}
        if folder.exists() or not _appear(folder, contents()):
            with locked_folder(folder):
                files = {_real(folder / name): content for name, content in contents().items()}
                for path in (folder, *files):
                    _prepare(path)
                changed_files = {}
                for path, content in files.items():
                    if _differs(path, content):
                        changed_files[path] = content
                _replace(changed_files)
            folders |= {path.parent for path in files}
    for changed in folders:
        sync_folder(changed)


@contextlib.contextmanager
def _unchanged(path: Path) -> Iterator[None]:
    """Let an error say that it keeps this path from being written."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        message = f"'{path}' cannot be written, and stays as it was: {reason}"
        raise OSError(error.errno, message) from error


def _real(path: Path) -> Path:
    """Where a path leads, through links."""
    target = Path(os.path.realpath(path))
    if target.is_symlink():  # that is as far as a loop of links can be followed
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return target


def _replace(files: Mapping[Path, bytes]) -> None:
    """Put files in place of what is there, in order, once all are on the disk; on an error none."""
    with contextlib.ExitStack() as stack:
        new = {}
        for path, content in files.items():
            new[path] = stack.enter_context(_written(path, content))
        first, last = list(new)[:-1], list(new)[-1:]
        old = {path: path.read_bytes() if path.exists() else None for path in first}
        try:
            for path, temporary in new.items():
                os.replace(temporary, path)
                if path in first:  # else a power cut might leave a later one new and this one old
                    _flush_folder(path.parent)
        except BaseException:
            if any(new[path].exists() for path in last):
                replaced = [path for path in old if not new[path].exists()]
                _put_back({path: old[path] for path in replaced})
            raise


def _differs(path: Path, content: bytes) -> bool:
    return not path.exists() or path.stat().st_size != len(content) or path.read_bytes() != content


def _put_back(old: Mapping[Path, bytes | None]) -> None:
    """Undo that files were replaced; None is one that was not there."""
    for path, content in old.items():
        try:
            if content is None:
                path.unlink()
            else:
                with _written(path, content) as temporary:
                    os.replace(temporary, path)
        except OSError as error:
            raise FormatError(
                f"'{path}' is written, but not all that belongs to it, and what was there cannot "
                f"be put back: {error.strerror or error}; save again.") from error


def _appear(folder: Path, contents: Mapping[str, bytes]) -> bool:
    """Make a folder that has these files at once; False if another process has made one."""
    _prepare(folder)
    with _temporary(folder, _open_folder) as (temporary, _):
        _replace({temporary / name: content for name, content in contents.items()})
        _flush_folder(temporary)
        try:
            os.rename(temporary, folder)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            return False
    return True


@contextlib.contextmanager
def _written(path: Path, content: bytes) -> Iterator[Path]:
    """A new file beside a path, on the disk, with the owner and permissions of what is there."""
    old = path.stat() if path.exists() else None
    mode = 0o666 if old is None else stat.S_IMODE(old.st_mode)
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR
    with _temporary(path, lambda name: os.open(name, flags, mode)) as (temporary, handle):
        # elsewhere an open file cannot be renamed
        with open(handle, "wb", closefd=os.name != "posix") as file:
            if old is not None:
                if os.name == "posix":
                    with contextlib.suppress(OSError):  # as a rule only root may give files away
                        os.fchown(handle, old.st_uid, old.st_gid)
                temporary.chmod(mode)
            file.write(content)
            flush_file(file)
        yield temporary


@contextlib.contextmanager
def _temporary(path: Path, make: Callable[[Path], int]) -> Iterator[tuple[Path, int]]:
    """What `make` makes and opens beside a path, locked, gone after the context."""
    while True:
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        handle, ours = make(temporary), False
        try:
            ours = lock(handle) is not False and temporary.exists()
        finally:
            if not ours:  # another process took it for abandoned before it was locked
                os.close(handle)
                remove(temporary)
        if ours:
            break
    try:
        yield temporary, handle
    finally:
        remove(temporary)
        if os.name == "posix":
            unlock(handle)


def _open_folder(folder: Path) -> int:
    """Make a folder, and open it."""
    while True:
        folder.mkdir()
        with contextlib.suppress(FileNotFoundError):  # another process took it for abandoned
            # elsewhere a folder cannot be opened
            return os.open(folder, os.O_RDONLY) if os.name == "posix" else -1


def _prepare(path: Path) -> None:
    """Make the folder of a path, and remove its temporary files that no process has locked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if os.name != "posix":
        return
    for name in os.listdir(path.parent):
        if re.fullmatch(rf"\.{re.escape(path.name)}\.[0-9a-f]{{32}}\.tmp", name):
            abandoned = path.with_name(name)
            mode = os.O_RDONLY if abandoned.is_dir() else os.O_RDWR
            with contextlib.suppress(OSError):  # it is gone, or another user's
                handle = os.open(abandoned, mode | os.O_NOFOLLOW)
                try:
                    if lock(handle):
                        remove(abandoned)
                finally:
                    unlock(handle)


def remove(path: Path) -> None:
    """Remove a file or a folder if it is there."""
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def flush_file(file: BinaryIO) -> None:
    """Let what was written to a file reach the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Let the names in a folder reach the disk too, where the system can do that."""
    try:
        _flush_folder(folder)
    except OSError as error:
        reason = error.strerror or error
        message = (
            f"What was saved in '{folder}' is there, whole, but its name may not be on the disk "
            f"yet, so that a power cut could bring back what was there before: {reason}")
        raise OSError(error.errno, message) from error


def _flush_folder(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            # some shared disks have no such thing
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(handle)
