"""Large files, and folders of them, that are written whole or not at all, and go on where they were interrupted.

What is written goes beside OUT, to OUT.partial, and gets OUT's name when all of it is on the disk. In a folder each
file gets its name when it is on the disk, so that those which have it are done.
"""

import contextlib
import dataclasses
import errno
import functools
import io
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from ._checkpoint import INDEX, SINGLE, Moved, copy_bytes, write_all
from ._errors import FormatError
from ._files import sync_folder

if sys.platform != "win32":
    import fcntl

STATE = ".lorafx-merge.json"  # what a folder that is being written is made from
_FLUSHED = 1 << 26  # bytes after which what is written is sent to the disk
UNFINISHED = ".unfinished"  # the end of a file's name until it is on the disk


class Writer(Protocol):
    """Writes the content of a file, and tells `moved` of its bytes."""

    def __call__(self, file: io.BufferedWriter, moved: Moved) -> None: ...


@dataclasses.dataclass(frozen=True)
class Job:
    """One file to write: its path in the folder, its bytes, how, and the file that it is made from."""

    name: str
    size: int
    write: Writer
    source: Path


def copy_job(path: Path, name: str) -> Job:
    """A file that is copied as it is."""
    size = path.stat().st_size

    def write(file: io.BufferedWriter, moved: Moved) -> None:
        with open(path, "rb") as source:
            copy_bytes(source, file, 0, size, moved)

    return Job(name, size, write, path)


def json_job(path: Path, name: str, content: dict[str, Any]) -> Job:
    """A JSON file with new content."""
    text = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()

    def write(file: io.BufferedWriter, moved: Moved) -> None:
        write_all(file, memoryview(text), moved)

    return Job(name, len(text), write, path)


def files_in(folder: Path, within: str = "", above: frozenset[Path] = frozenset()) -> Iterator[tuple[str, Path]]:
    """Every file below a folder, through links too: its path from there, and where it is."""
    real = folder.resolve()
    if real in above:
        raise FormatError(f"'{folder}' is a link to a folder that it is in.")
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from files_in(path, f"{within}{path.name}/", above | {real})
        elif path.is_file():
            yield within + path.name, path
        else:
            raise FormatError(f"'{path}' is no file that can be carried along: it is a link to nothing, or a device.")


def check_paths(base: Path, out: Path, adapters: Iterable[Path], force: bool) -> None:
    """Raise FormatError unless `base` is there, of a known kind, and `out` is a place for the same kind."""
    endings = {".safetensors": (".safetensors",), ".pth": (".pth", ".pt"), ".pt": (".pth", ".pt")}
    if not base.exists():
        raise FormatError(f"There is no checkpoint '{base}'.")
    if not base.is_dir() and base.suffix.lower() not in endings:
        raise FormatError(f"'{base}' is no checkpoint by its ending: name a .safetensors, .pth or .pt file, or a "
                          "folder.")
    if not base.is_dir() and out.suffix.lower() not in endings[base.suffix.lower()]:
        raise FormatError(f"'{base}' becomes a file of the same kind: end '{out}' in "
                          f"{' or '.join(endings[base.suffix.lower()])}.")
    if not base.is_dir() and out.is_dir():
        raise FormatError(f"'{out}' is a folder: name a file in it.")
    holds = out.is_dir() and any((out / name).is_file() for name in (INDEX, SINGLE))
    if base.is_dir() and out.exists() and not holds:
        raise FormatError(f"'{out}' is there already and is no folder with a checkpoint, so that it is not replaced: "
                          "choose another path.")
    target = out.resolve()
    if target.is_relative_to(base.resolve()):
        raise FormatError(f"'{out}' is '{base}' itself or in it, which is read meanwhile: choose a path outside.")
    if (base / STATE).exists():
        raise FormatError(f"'{base}' is what an interrupted lorafx merge left: let that finish first.")
    for path in (base, *adapters):
        real = path.resolve()
        if real.is_relative_to(target) or real.is_relative_to(target.with_name(target.name + ".partial")):
            raise FormatError(f"'{path}' is '{out}' or in it, and would be replaced: choose another path.")
    if out.exists() and not force:
        raise FormatError(f"'{out}' is there already: choose another path, or replace it with --force.")


def run_file(job: Job, out: Path, force: bool, progress: bool) -> None:
    """Write one file; one that was interrupted starts over."""
    out = out.resolve()
    partial = out.with_name(out.name + ".partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    _check_room(out.parent, job.size)
    with open(partial, "ab", buffering=0) as lock, _held(lock.fileno(), partial):
        try:
            with open(partial, "wb") as file, _bar(job.size, progress) as bar, _flushing(file, bar.update) as moved:
                job.write(file, moved)
            _check_free(out, force)
        except BaseException:
            partial.unlink()
            raise
        os.replace(partial, out)
    sync_folder(out.parent)


def run_folder(jobs: Sequence[Job], out: Path, about: Mapping[str, Any], force: bool, progress: bool) -> None:
    """Write the files of a folder; goes on with one that was interrupted if it was `about` the same."""
    out = out.resolve()
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    handle = os.open(partial, os.O_RDONLY) if os.name == "posix" else None
    try:
        with _held(handle, partial):
            _begin(jobs, partial, about)
            left = [job for job in jobs if not (partial / job.name).is_file()]
            _check_room(partial, sum(job.size for job in left))
            with _bar(sum(job.size for job in jobs), progress) as bar:
                bar.update(sum(job.size for job in jobs) - sum(job.size for job in left))
                for job in left:
                    _write(job.write, partial / job.name, bar.update, job.source)
            _check_free(out, force)
            (partial / STATE).unlink()
            for folder in {partial / job.name for job in jobs}:
                sync_folder(folder.parent)
            _put(partial, out)
    finally:
        if handle is not None:
            os.close(handle)


def _begin(jobs: Sequence[Job], partial: Path, about: Mapping[str, Any]) -> None:
    """Clear what an interrupted merge left, unless it was about the same."""
    state = partial / STATE
    text = json.dumps(about).encode()

    if state.is_file() and state.read_bytes() == text:
        return
    ours = {STATE, *(job.name for job in jobs)}
    found = [name.removesuffix(UNFINISHED) for name, _ in files_in(partial)]
    if not state.is_file() and not ours.issuperset(found):
        raise FormatError(f"'{partial}' is in the way, and no merge began it: remove it.")
    for path in partial.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path != state:
            path.unlink()
    sync_folder(partial)
    _write(functools.partial(write_all, content=memoryview(text)), state, _ignore)
    sync_folder(partial)


def _write(write: "Writer | functools.partial[None]", path: Path, moved: Moved, like: Path | None = None) -> None:
    """Write a file that has its name only when it is on the disk, with the permissions of another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + UNFINISHED)
    with open(unfinished, "wb") as file, _flushing(file, moved) as told:
        write(file, moved=told)
    if like is not None:
        shutil.copymode(like, unfinished)
    os.replace(unfinished, path)


def _ignore(count: int) -> None:
    """The state is no part of what is merged."""


def _put(partial: Path, out: Path) -> None:
    """Give a folder its name; one that is there is moved away before and removed after."""
    old = out.with_name(f".{out.name}.{uuid.uuid4().hex}.old")
    if out.exists():
        os.rename(out, old)
    os.rename(partial, out)
    sync_folder(out.parent)
    if old.exists():
        shutil.rmtree(old)


def _check_free(out: Path, force: bool) -> None:
    """Raise if something came to `out` while its content was written."""
    if out.exists() and not force:
        raise FormatError(f"'{out}' came to be while it was written: choose another path, or replace it with --force.")


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed:,} bytes are to be written, but only {free:,} are free", str(folder))


@contextlib.contextmanager
def _flushing(file: io.BufferedWriter, moved: Moved) -> Iterator[Moved]:
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
def _held(handle: int | None, path: Path) -> Iterator[None]:
    """Keep other processes from writing to the same place meanwhile, where the system can."""
    if sys.platform == "win32" or handle is None:
        yield
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise FormatError(f"Another process is writing '{path}': wait for it.") from error
    if not path.exists() or not os.path.samestat(os.fstat(handle), path.stat()):
        raise FormatError(f"Another process has just finished '{path}': look at what it wrote.")
    yield


def _bar(total: int, progress: bool) -> "tqdm[Any]":
    return tqdm(total=total, unit="B", unit_scale=True, desc="merging", disable=None if progress else True)
