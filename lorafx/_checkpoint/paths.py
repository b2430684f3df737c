"""Where a merge may write: no file that is read, or that no merge wrote, is replaced."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from .._errors import FormatError
from .find import INDEX, SINGLE
from .kinds import kind_of


PARTIAL = ".partial"
STATE = ".lorafx-merge.json"  # in the folder of a merge that is not finished


def partial_path(target: Path) -> Path:
    """Return the folder in which what will be at a path is made."""
    return target.with_name(target.name + PARTIAL)


def check_paths(base: Path, out: Path, adapters: Iterable[Path], force: bool) -> None:
    """Raise FormatError unless `base` is of a known kind, and `out` a place for one of it."""
    if not base.exists():
        raise FormatError(f"There is no checkpoint '{base}'.")
    endings = kind_of(base).endings
    if endings and out.suffix.lower() not in endings:
        raise FormatError(
            f"'{base}' becomes a file of the same kind: end '{out}' in {' or '.join(endings)}.")
    above = next(folder for folder in out.resolve().parents if folder.exists())
    if not above.is_dir():
        raise FormatError(
            f"'{out}' would be in '{above}', which is not a folder: choose another path.")
    check_replaceable(out, base.is_dir(), True)
    if out.resolve().is_relative_to(base.resolve()):
        raise FormatError(f"'{out}' is '{base}' itself or in it, which is read meanwhile: choose a "
                          "path outside.")
    if any((folder / STATE).exists() for folder in (base, base.resolve().parent)):
        raise FormatError(
            f"'{base}' is what an interrupted lorafx merge left: let that finish first.")
    check_kept((base, *adapters), out)
    check_replaceable(out, base.is_dir(), force)


def check_replaceable(out: Path, folder: bool, force: bool) -> None:
    """Raise FormatError if something at `out` may not be replaced: it is not a checkpoint, say."""
    if folder and out.is_dir() and not out.is_symlink() and not any(out.iterdir()):
        return
    if folder and out.exists() and not any((out / name).is_file() for name in (INDEX, SINGLE)):
        raise FormatError(f"'{out}' is there already and is not a folder with a checkpoint, so "
                          "that it is not replaced: choose another path.")
    if not folder and out.is_dir():
        raise FormatError(f"'{out}' is a folder: name a file in it.")
    if out.is_symlink() and out.exists():
        raise FormatError(f"'{out}' is a link to '{out.resolve()}', which is there already: name "
                          "that to replace it, or choose another path.")
    if out.exists() and not force:
        raise FormatError(
            f"'{out}' is there already: choose another path, or replace it with --force.")


def check_kept(paths: Iterable[Path], out: Path) -> None:
    """Raise FormatError if a path, or a link on its way, would go when `out` is replaced."""
    target = out.resolve()
    for path in paths:
        for place in _links_and_target(path):
            if any(place.is_relative_to(gone) for gone in (target, partial_path(target))):
                raise FormatError(
                    f"'{path}' is '{out}' or in it, and would be replaced: choose another path.")


def _links_and_target(path: Path) -> Iterator[Path]:
    """Where a path is, and, if a link is there, where that leads, until it is not a link."""
    place = path.parent.resolve() / path.name
    while place.is_symlink():
        yield place
        linked = place.parent / os.readlink(place)
        place = linked.parent.resolve() / linked.name
    yield place.resolve()
