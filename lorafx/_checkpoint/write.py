"""Large files and folders, written whole or not at all, that go on where they were interrupted.

All of it is written in a folder OUT.partial, and gets OUT's name when it is on the disk. In that
folder, `new` holds the finished files under their names, so that no other name can be one of
theirs; the one that is being written is `unfinished`, and STATE says what they are made from. A
file takes the place of an old one in one step. A folder cannot everywhere: the old one is moved to
`old` first, and only between that and the next step is nothing at OUT. A process that is killed
there leaves both whole, and the next merge to OUT puts the old one back before anything else.
"""

import contextlib
import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from .._errors import FormatError
from .._storage.durable import flush_file, remove, sync_folder
from .._storage.locks import is_at, lock
from .._storage.streams import Advance
from .jobs import Job
from .paths import STATE, check_replaceable, partial_path
from .progress import progress_shown


NEW, OLD, UNFINISHED = "new", "old", "unfinished"
_FLUSHED = 1 << 26  # bytes after which what is written is sent to the disk


def write_checkpoint(
    jobs: Sequence[Job], out: Path, identity: Mapping[str, Any], check: Callable[[], None], *,
    folder: bool, force: bool, progress: bool,
) -> None:
    """Write the files of a folder, or one file, to `out`.

    What was interrupted goes on if it had this identity: all that the content depends on. `check`
    raises if that has changed meanwhile.

    Raises:
        FormatError: `out` is as it was. OSError: so it is, unless the error says that `out` is
            finished.
    """
    target = out.resolve()
    with _work_folder(target) as partial:
        try:
            _restore(partial, target)
            check_replaceable(out, folder, force)
            _begin(partial, identity)
            _write_files(jobs, partial, progress)
            check()
            check_replaceable(out, folder, force)
            _put(partial / NEW if folder else partial / NEW / jobs[0].name, target, partial / OLD)
        except BaseException:
            if not _holds_files(partial):
                _remove(partial)
            raise
        try:
            sync_folder(target.parent)
            _remove(partial)
        except OSError as error:
            raise OSError(
                error.errno,
                f"'{out}' is finished and has its name, but what comes after that, letting the "
                f"name reach the disk and removing '{partial}', failed: {error.strerror or error}"
            ) from error


@contextlib.contextmanager
def _work_folder(target: Path) -> Iterator[Path]:
    """The folder in which `target` is made, locked meanwhile where the system can."""
    partial = partial_path(target)
    partial.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        partial.mkdir()
    try:
        file = _open_state(partial)
    except FileNotFoundError as error:
        raise _finished(partial) from error
    with file:
        if lock(file.fileno()) is False:
            raise FormatError(f"Another process is writing '{partial}': wait for it.")
        if os.name != "posix":  # where an open file cannot be removed
            file.close()
        elif not is_at(file.fileno(), partial / STATE):
            raise _finished(partial)
        yield partial


def _open_state(partial: Path) -> BinaryIO:
    """Mark a folder as one that a merge began, unless something else is there."""
    state = partial / STATE
    if not partial.is_symlink() and not partial.is_file() and not state.is_symlink():
        names = os.listdir(partial)
        if not names or STATE in names:
            return open(state, "ab")
    raise FormatError(f"'{partial}' is in the way, and no merge began it: remove it.")


def _finished(partial: Path) -> FormatError:
    return FormatError(f"Another process has just finished '{partial}': look at what it wrote.")


def _holds_files(partial: Path) -> bool:
    """True if there is anything that another merge goes on with, or that was at its output."""
    return any(any((partial / name).glob("*")) for name in (NEW, OLD))


def _restore(partial: Path, target: Path) -> None:
    """Put back a folder that a killed process had moved, or remove it if the new one is there."""
    old = partial / OLD
    if old.exists() and (partial / NEW).exists() and not target.exists():
        os.rename(old, target)
        sync_folder(target.parent)
    elif old.exists():
        remove(old)


def _begin(partial: Path, identity: Mapping[str, Any]) -> None:
    """Clear what an interrupted merge left, unless it has the same identity."""
    state, text = partial / STATE, json.dumps(identity).encode()
    if state.read_bytes() != text:
        _clear(partial)
        sync_folder(partial)
        with open(state, "wb") as file:
            file.write(text)
            flush_file(file)
    remove(partial / UNFINISHED)
    (partial / NEW).mkdir(exist_ok=True)


def _clear(partial: Path) -> None:
    """Remove everything but what says that a merge began the folder."""
    for path in partial.iterdir():
        if path.name != STATE:
            remove(path)


def _remove(partial: Path) -> None:
    """Remove the folder, unless another process begins in it as soon as the state is gone."""
    _clear(partial)
    (partial / STATE).unlink()
    try:
        partial.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            raise


def _write_files(jobs: Sequence[Job], partial: Path, progress: bool) -> None:
    """Write those files that are not there yet, and let all names reach the disk."""
    new = partial / NEW
    missing = [job for job in jobs if not (new / job.name).is_file()]
    total, needed = sum(job.size for job in jobs), sum(job.size for job in missing)
    free = shutil.disk_usage(partial).free
    if free < needed:
        message = f"{needed:,} bytes are to be written, but only {free:,} are free"
        raise OSError(errno.ENOSPC, message, str(partial))
    with progress_shown(total, progress) as advance:
        advance(total - needed)
        for job in missing:
            _write_job(job, partial, advance)
    folders = {new}
    for job in jobs:
        folders.update(above for above in (new / job.name).parents if new in above.parents)
    for folder in folders:
        sync_folder(folder)


def _write_job(job: Job, partial: Path, advance: Advance) -> None:
    """Write a file that gets its name when it is on the disk, with its source's permissions."""
    unfinished, path = partial / UNFINISHED, partial / NEW / job.name
    with open(unfinished, "xb") as file, _flushing(file, advance) as flushing_advance:
        # it may be opened again
        unfinished.chmod(stat.S_IMODE(job.source.stat().st_mode) | stat.S_IWUSR)
        job.write(file, flushing_advance)
        shutil.copymode(job.source, unfinished)
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(unfinished, path)


def _put(new: Path, target: Path, old: Path) -> None:
    """Give a file or folder its name; a folder that has it is moved first, and back on failure."""
    try:
        if target.is_dir():
            os.rename(target, old)
        os.replace(new, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.rename(old, target)
        raise


@contextlib.contextmanager
def _flushing(file: BinaryIO, advance: Advance) -> Iterator[Advance]:
    """Let what is written reach the disk while more is computed, and all of it in the end."""
    waiting = 0
    under_way: Future[None] | None = None

    def flushing_advance(count: int) -> None:
        nonlocal waiting, under_way
        advance(count)
        waiting += count
        if waiting >= _FLUSHED and (under_way is None or under_way.done()):
            if under_way is not None:
                under_way.result()  # raises what it met
            waiting, under_way = 0, pool.submit(os.fsync, file.fileno())

    with ThreadPoolExecutor(1) as pool:
        yield flushing_advance
        if under_way is not None:
            under_way.result()
        flush_file(file)
