"""Files and folders that are written whole or not at all, whatever happens to processes and disks."""

import contextlib
import errno
import os
import re
import shutil
import stat
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from .._errors import FormatError


if sys.platform != "win32":
    import fcntl
PATIENCE = 300  # seconds that a save waits for others of the same folder
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # as on some shared disks


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that whatever happens on the way, the old one or the new one stands there, whole and on the disk.

    It goes to a temporary file in the same folder, is flushed, and renamed. Missing folders are made, links are
    followed, and permissions kept. What killed processes left of such temporary files of this path is removed first.
    """
    with _unchanged(path):
        path = _real(path)
        _prepare(path)
        _replace({path: content})
    sync_folder(path.parent)


def write_folder(folder: Path, contents: Callable[[], Mapping[str, bytes]]) -> None:
    """Write files into a folder, which appears with all of them if it is not there yet; an error changes nothing.

    In one that is there they are replaced in their order, all of them on the disk already: a process that is killed
    meanwhile leaves the first ones new and the others old, of which a reader must make sense. `contents` is called when
    no other process writes there, so that it may look at what there is.
    """
    with _unchanged(folder):
        folder, folders = _real(folder), {folder.parent}
        if folder.exists() or not _appear(folder, contents()):
            with _alone(folder):
                files = {_real(folder / name): content for name, content in contents().items()}
                for path in (folder, *files):
                    _prepare(path)
                _replace({path: content for path, content in files.items() if _differs(path, content)})
            folders |= {path.parent for path in files}
    for changed in folders:
        sync_folder(changed)


@contextlib.contextmanager
def _unchanged(path: Path) -> Iterator[None]:
    """Let what keeps a path from being written say so."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise OSError(error.errno, f"'{path}' cannot be written, and stays as it was: {reason}") from error


def _real(path: Path) -> Path:
    """Where a path leads, through links."""
    found = Path(os.path.realpath(path))
    if found.is_symlink():  # that is as far as a loop of links can be followed
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return found


def _replace(files: Mapping[Path, bytes]) -> None:
    """Put files in place of what is there, one after the other once all are on the disk, or after an error none."""
    with contextlib.ExitStack() as stack:
        new = {path: stack.enter_context(_written(path, content)) for path, content in files.items()}
        first, last = list(new)[:-1], list(new)[-1:]
        old = {path: path.read_bytes() if path.exists() else None for path in first}
        try:
            for path, temporary in new.items():
                os.replace(temporary, path)
                if path in first:
                    _flush(path.parent)  # else a power cut might leave a later one new and this one old
        except BaseException:
            if any(new[path].exists() for path in last):
                _put_back({path: content for path, content in old.items() if not new[path].exists()})
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
            raise FormatError(f"'{path}' is written, but not all that belongs to it, and what was there cannot be put "
                              f"back: {error.strerror or error}; save again.") from error


def _appear(folder: Path, contents: Mapping[str, bytes]) -> bool:
    """Make a folder that has these files at once; False if another process has made one meanwhile."""
    _prepare(folder)
    with _temporary(folder, _open_folder) as (temporary, _):
        _replace({temporary / name: content for name, content in contents.items()})
        _flush(temporary)
        try:
            os.rename(temporary, folder)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            return False
    return True


@contextlib.contextmanager
def _written(path: Path, content: bytes) -> Iterator[Path]:
    """A new file beside a path, whole and on the disk, with the owner and permissions of what is at the path."""
    old = path.stat() if path.exists() else None
    mode = 0o666 if old is None else stat.S_IMODE(old.st_mode)
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR
    with _temporary(path, lambda name: os.open(name, flags, mode)) as (temporary, handle):
        with open(handle, "wb", closefd=os.name != "posix") as file:  # elsewhere an open file cannot be renamed
            if old is not None:
                if os.name == "posix":
                    with contextlib.suppress(OSError):  # as a rule only root may give files away
                        os.fchown(handle, old.st_uid, old.st_gid)
                temporary.chmod(mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield temporary


@contextlib.contextmanager
def _temporary(path: Path, make: Callable[[Path], int]) -> Iterator[tuple[Path, int]]:
    """What `make` makes and opens beside a path, gone after the context, with a lock that ends with this process."""
    while True:
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        handle, ours = make(temporary), False
        try:
            ours = lock(handle) is not False and temporary.exists()
        finally:
            if not ours:  # another process took it for abandoned before it was locked
                os.close(handle)
                _remove(temporary)
        if ours:
            break
    try:
        yield temporary, handle
    finally:
        _remove(temporary)
        if os.name == "posix":
            _unlock(handle)


def _open_folder(folder: Path) -> int:
    """Make a folder, and open it."""
    while True:
        folder.mkdir()
        with contextlib.suppress(FileNotFoundError):  # another process took it for abandoned
            return os.open(folder, os.O_RDONLY) if os.name == "posix" else -1  # elsewhere it cannot be opened


def _prepare(path: Path) -> None:
    """Make the folder of a path, and remove temporary ones of the path whose processes have ended: they can be locked.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in os.listdir(path.parent) if os.name == "posix" else ():
        if re.fullmatch(rf"\.{re.escape(path.name)}\.[0-9a-f]{{32}}\.tmp", name):
            found = path.with_name(name)
            with contextlib.suppress(OSError):  # it is gone, or another user's
                handle = os.open(found, (os.O_RDONLY if found.is_dir() else os.O_RDWR) | os.O_NOFOLLOW)
                try:
                    if lock(handle):
                        _remove(found)
                finally:
                    _unlock(handle)


def _remove(path: Path) -> None:
    """Remove a file or a folder if it is there."""
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Write to a folder while no other process does, where the system can lock one; waits for others, to a limit."""
    if os.name != "posix":
        yield
        return
    last = time.monotonic() + PATIENCE
    while True:
        handle = os.open(folder, os.O_RDONLY)
        try:
            if lock(handle) is not False and os.path.samestat(os.fstat(handle), folder.stat()):
                yield
                return
        finally:
            _unlock(handle)
        if time.monotonic() > last:
            raise OSError(errno.EAGAIN, f"another process has been writing to it for {PATIENCE} seconds")
        time.sleep(0.005)


def lock(handle: int) -> bool | None:
    """Lock an open file or folder without waiting; False where another has the lock, None where there are no locks."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True


def _unlock(handle: int) -> None:
    """Close what was locked, and unlock it even if a child of this process has it open too."""
    if sys.platform != "win32":
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


def sync_folder(folder: Path) -> None:
    """Let the names in a folder reach the disk too, where the system can do that."""
    try:
        _flush(folder)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(error.errno, f"What was saved in '{folder}' is there, whole, but its name may not be on the disk "
                                   f"yet, so that a power cut could bring back what was there before: {reason}"
                      ) from error


def _flush(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some shared disks have no such thing
                raise
        finally:
            os.close(handle)
