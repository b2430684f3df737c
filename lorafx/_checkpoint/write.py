"""Large files, and folders of them, that are written whole or not at all, and go on where they were interrupted.

All of it is written in a folder OUT.partial, and gets OUT's name when it is on the disk. In that folder, `new` holds
the finished files under their names, so that no other name can be one of theirs; the one that is being written is
`unfinished`, and STATE says what they are made from. A file takes the place of an old one in one step. A folder cannot
everywhere: the old one is moved to `old` first, and only between that and the next step is nothing at OUT. A process
that is killed there leaves both whole, and the next merge to OUT puts the old one back before it does anything else.
"""

import contextlib
import errno
import json
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from .._errors import FormatError
from .._storage.durable import lock, sync_folder
from .._storage.streams import Moved
from .find import INDEX, SINGLE
from .jobs import Job


PARTIAL = ".partial"
STATE = ".lorafx-merge.json"  # what is being written is made from this; who has locked it writes
NEW, OLD, UNFINISHED = "new", "old", "unfinished"
_FLUSHED = 1 << 26  # bytes after which what is written is sent to the disk
_ENDINGS = {".safetensors": (".safetensors",), ".pth": (".pth", ".pt"), ".pt": (".pth", ".pt")}


# Paths.

def check_paths(base: Path, out: Path, adapters: Iterable[Path], force: bool) -> None:
    """Raise FormatError unless `base` is there, of a known kind, and `out` is a place for the same kind."""
    if not base.exists():
        raise FormatError(f"There is no checkpoint '{base}'.")
    if not base.is_dir():
        endings = _ENDINGS.get(base.suffix.lower())
        if endings is None:
            raise FormatError(f"'{base}' is no checkpoint by its ending: name a .safetensors, .pth or .pt file, or a "
                              "folder.")
        if out.suffix.lower() not in endings:
            raise FormatError(f"'{base}' becomes a file of the same kind: end '{out}' in {' or '.join(endings)}.")
    above = next(folder for folder in out.resolve().parents if folder.exists())
    if not above.is_dir():
        raise FormatError(f"'{out}' would be in '{above}', which is no folder: choose another path.")
    check_replaceable(out, base.is_dir(), True)
    if out.resolve().is_relative_to(base.resolve()):
        raise FormatError(f"'{out}' is '{base}' itself or in it, which is read meanwhile: choose a path outside.")
    if any((folder / STATE).exists() for folder in (base, base.resolve().parent)):
        raise FormatError(f"'{base}' is what an interrupted lorafx merge left: let that finish first.")
    check_kept((base, *adapters), out)
    check_replaceable(out, base.is_dir(), force)


def check_replaceable(out: Path, folder: bool, force: bool) -> None:
    """Raise FormatError if something is at `out`, unless it is an empty folder or of the kind that is to replace it."""
    if folder and out.is_dir() and not out.is_symlink() and not any(out.iterdir()):
        return
    if folder and out.exists() and not any((out / name).is_file() for name in (INDEX, SINGLE)):
        raise FormatError(f"'{out}' is there already and is no folder with a checkpoint, so that it is not replaced: "
                          "choose another path.")
    if not folder and out.is_dir():
        raise FormatError(f"'{out}' is a folder: name a file in it.")
    if out.is_symlink() and out.exists():
        raise FormatError(f"'{out}' is a link to '{out.resolve()}', which is there already: name that to replace it, "
                          "or choose another path.")
    if out.exists() and not force:
        raise FormatError(f"'{out}' is there already: choose another path, or replace it with --force.")


def check_kept(paths: Iterable[Path], out: Path) -> None:
    """Raise FormatError if one of the paths, or a link that it leads through, would go when `out` is replaced."""
    target = out.resolve()
    for path in paths:
        for place in _way(path):
            if any(place.is_relative_to(gone) for gone in (target, _partial(target))):
                raise FormatError(f"'{path}' is '{out}' or in it, and would be replaced: choose another path.")


def _way(path: Path) -> Iterator[Path]:
    """Where a path is, and, if a link is there, where that leads, until it is no link."""
    place = path.parent.resolve() / path.name
    while place.is_symlink():
        yield place
        linked = place.parent / os.readlink(place)
        place = linked.parent.resolve() / linked.name
    yield place.resolve()


def _partial(target: Path) -> Path:
    return target.with_name(target.name + PARTIAL)


# Writing.

def run(jobs: Sequence[Job], out: Path, about: Mapping[str, Any], check: Callable[[], None], folder: bool, force: bool,
        progress: bool) -> None:
    """Write the files of a folder, or one file; goes on with what was interrupted if it was `about` the same.

    `check` raises if something else was written than what it is about.

    Raises:
        FormatError: `out` is as it was. OSError: so it is, unless the error says that `out` is finished.
    """
    target = out.resolve()
    with _work_folder(target) as partial:
        try:
            _restore(partial, target)
            check_replaceable(out, folder, force)
            _begin(partial, about)
            _write_all_files(jobs, partial, progress)
            check()
            check_replaceable(out, folder, force)
            _put(partial / NEW if folder else partial / NEW / jobs[0].name, target, partial / OLD)
        except BaseException:
            if not any(True for name in (NEW, OLD) for _ in (partial / name).glob("*")):
                _remove(partial)
            raise
        try:
            sync_folder(target.parent)
            _remove(partial)
        except OSError as error:
            raise OSError(error.errno, f"'{out}' is finished and has its name, but what comes after that, letting the "
                          f"name reach the disk and removing '{partial}', failed: {error.strerror or error}") from error


@contextlib.contextmanager
def _work_folder(target: Path) -> Iterator[Path]:
    """The folder in which `target` is made, kept from other processes meanwhile, where the system can."""
    partial = _partial(target)
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
        elif not _is_at(file, partial / STATE):
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


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether an open file is the one at a path."""
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())


def _finished(partial: Path) -> FormatError:
    return FormatError(f"Another process has just finished '{partial}': look at what it wrote.")


def _restore(partial: Path, target: Path) -> None:
    """Put back the folder that a killed process had moved away, or remove it if the new one had taken its place."""
    old = partial / OLD
    if old.exists() and (partial / NEW).exists() and not target.exists():
        os.rename(old, target)
        sync_folder(target.parent)
    elif old.exists():
        shutil.rmtree(old)


def _begin(partial: Path, about: Mapping[str, Any]) -> None:
    """Clear what an interrupted merge left, unless it was about the same."""
    state, text = partial / STATE, json.dumps(about).encode()
    if state.read_bytes() != text:
        _clear(partial)
        sync_folder(partial)
        with open(state, "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    (partial / UNFINISHED).unlink(missing_ok=True)
    (partial / NEW).mkdir(exist_ok=True)


def _clear(partial: Path) -> None:
    """Remove everything but what says that a merge began the folder."""
    for path in partial.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != STATE:
            path.unlink()


def _remove(partial: Path) -> None:
    """Remove the folder, unless another process begins in it as soon as the state is gone."""
    _clear(partial)
    (partial / STATE).unlink()
    try:
        partial.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            raise


def _write_all_files(jobs: Sequence[Job], partial: Path, progress: bool) -> None:
    """Write those files that are not there yet, and let all names reach the disk."""
    new = partial / NEW
    left = [job for job in jobs if not (new / job.name).is_file()]
    needed, total = (sum(job.size for job in some) for some in (left, jobs))
    free = shutil.disk_usage(partial).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed:,} bytes are to be written, but only {free:,} are free", str(partial))
    with _bar(total, progress) as moved:
        moved(total - needed)
        for job in left:
            _write_file(job, partial, moved)
    for folder in {new, *(above for job in jobs for above in (new / job.name).parents if new in above.parents)}:
        sync_folder(folder)


def _write_file(job: Job, partial: Path, moved: Moved) -> None:
    """Write a file that has its name only when it is on the disk, with the permissions of the one it is made from."""
    unfinished, path = partial / UNFINISHED, partial / NEW / job.name
    with open(unfinished, "xb") as file, _flushing(file, moved) as told:
        unfinished.chmod(stat.S_IMODE(job.source.stat().st_mode) | stat.S_IWUSR)  # it may be opened again
        job.write(file, told)
        shutil.copymode(job.source, unfinished)
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(unfinished, path)


def _put(new: Path, target: Path, old: Path) -> None:
    """Give a file or a folder its name; a folder that has it is moved away before, and back if that fails."""
    try:
        if target.is_dir():
            os.rename(target, old)
        os.replace(new, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.rename(old, target)
        raise


@contextlib.contextmanager
def _flushing(file: BinaryIO, moved: Moved) -> Iterator[Moved]:
    """Let what is written reach the disk while more is computed, and all of it in the end."""
    waiting = 0
    under_way: Future[None] | None = None

    def told(count: int) -> None:
        nonlocal waiting, under_way
        moved(count)
        waiting += count
        if waiting >= _FLUSHED and (under_way is None or under_way.done()):
            if under_way is not None:
                under_way.result()  # raises what it met
            waiting, under_way = 0, pool.submit(os.fsync, file.fileno())

    with ThreadPoolExecutor(1) as pool:
        yield told
        if under_way is not None:
            under_way.result()
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _bar(total: int, progress: bool) -> Iterator[Moved]:
    """Show on a terminal how much is written. Elsewhere there is no tqdm: even one that shows nothing takes a lock that
    is shared with forked processes, and that one which is killed may hold for ever."""
    if progress and sys.stderr.isatty():
        with tqdm(total=total, unit="B", unit_scale=True, desc="merging") as bar:
            yield bar.update
    else:
        yield _ignore


def _ignore(count: int) -> None:
    """Nobody looks."""
