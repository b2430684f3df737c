"""What a new checkpoint is made of: files, each with its path in the folder, its bytes, and how."""

import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from .._errors import FormatError
from .._kernels.losses import Losses
from .._storage.streams import Advance, copy_bytes, write_all
from .plan import MergePlan


class Writer(Protocol):
    """Writes the content of a file, and calls `advance` with its bytes."""

    def __call__(self, file: io.BufferedWriter, advance: Advance) -> None: ...


@dataclass(frozen=True)
class Job:
    """A file to write: its path in the folder, its bytes, how, and what it is made from."""

    name: str
    size: int
    write: Writer
    source: Path


@dataclass(frozen=True)
class Sum:
    """A tensor W + D of a new checkpoint; what rounding it loses is noted while `rows` computes it.
    """

    losses: Losses
    rows: Callable[[], Iterator[Tensor]]


@dataclass(frozen=True)
class PreparedMerge:
    """What is known before a byte is written: files, what changes, and the number of tensors."""

    jobs: list[Job]
    plan: MergePlan
    tensors: int
    sums: list[Sum]

    def errors(self) -> dict[str, float]:
        """{site: |written - (W + D)| / |D|}; what has not been computed yet is, and not written."""
        errors: dict[str, float] = {}
        for each in self.sums:
            if not each.losses.complete:
                for _ in each.rows():
                    pass
            errors |= each.losses.errors()
        return errors


def copy_job(path: Path, name: str) -> Job:
    """Return a job that copies a file, opened now so that one that may not be read fails early."""
    with open(path, "rb") as opened:
        size = os.fstat(opened.fileno()).st_size

    def write(file: io.BufferedWriter, advance: Advance) -> None:
        with open(path, "rb") as source:
            copy_bytes(source, file, 0, size, advance)

    return Job(name, size, write, path)


def json_job(path: Path, name: str, content: dict[str, Any]) -> Job:
    """Return a job that writes a JSON file with new content."""
    text = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()

    def write(file: io.BufferedWriter, advance: Advance) -> None:
        write_all(file, memoryview(text), advance)

    return Job(name, len(text), write, path)


def files_in(
    folder: Path, within: str = "", above: frozenset[Path] = frozenset()
) -> Iterator[tuple[str, Path]]:
    """Yield every file below a folder, through links too: its path from there, and where it is.

    An empty folder is none.
    """
    real = folder.resolve()
    if real in above:
        raise FormatError(f"'{folder}' is a link to a folder that it is in.")
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from files_in(path, f"{within}{path.name}/", above | {real})
        elif path.is_file():
            yield within + path.name, path
        else:
            raise FormatError(f"'{path}' is not a file that can be carried along: it is a link to "
                              "nothing, or a device.")
