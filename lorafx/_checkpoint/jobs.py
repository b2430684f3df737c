"""What a new checkpoint is made of: files to write, each with its path in the folder, its bytes, and how."""

import dataclasses
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from .._errors import FormatError
from .._storage.streams import Moved, copy_bytes, write_all


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
    """A file that is copied as it is; it is opened now, so that one that may not be read is known before any work."""
    with open(path, "rb") as opened:
        size = os.fstat(opened.fileno()).st_size

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
    """Every file below a folder, through links too: its path from there, and where it is. An empty folder is none."""
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
