"""Locks on open files and folders, which end with their process, where the system has them."""

import contextlib
import errno
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path


if sys.platform != "win32":
    import fcntl
PATIENCE = 300  # seconds that a save waits for others of the same folder
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # as on some shared disks


def lock(handle: int) -> bool | None:
    """Lock an open file or folder at once; False if another has the lock, None without locks."""
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


def unlock(handle: int) -> None:
    """Close what was locked, and unlock it even if a child of this process has it open too."""
    if sys.platform != "win32":
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


def is_at(handle: int, path: Path) -> bool:
    """True if an open file or folder is the one at a path, not one that was there before."""
    return path.exists() and os.path.samestat(os.fstat(handle), path.stat())


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Write to a folder while no other process does, if it can be locked; wait up to PATIENCE."""
    if os.name != "posix":
        yield
        return
    last = time.monotonic() + PATIENCE
    while True:
        handle = os.open(folder, os.O_RDONLY)
        try:
            if lock(handle) is not False and is_at(handle, folder):
                yield
                return
        finally:
            unlock(handle)
        if time.monotonic() > last:
            message = f"another process has been writing to it for {PATIENCE} seconds"
            raise OSError(errno.EAGAIN, message)
        time.sleep(0.005)
