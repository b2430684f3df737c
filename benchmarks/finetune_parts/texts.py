"""Three texts that every machine with CPython 3.11 or newer has, without download.

code: the source code of Python's standard library. Left out are packages that are not part of it,
    its tests, and what repeats the other two texts: `pydoc_data`, `html/entities.py`, and the
    tables of Unicode names in `encodings`.
prose: the English prose of Python's language reference, `pydoc_data.topics`. Some topics contain
    others, so every paragraph is kept once: none of the held-out ones is in the training part.
table: rows of one form, neither sentences nor code: every HTML character entity in alphabetical
    order, its code points and their Unicode names, as in
    "&eacute; U+00E9 LATIN SMALL LETTER E WITH ACUTE", from `html.entities` and `unicodedata`.

The last tenth of each text, contiguous, is held out: never trained on.
"""

import dataclasses
import functools
import html.entities
import sysconfig
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from pydoc_data import topics
from torch import Tensor

LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data",
                      "encodings"})


@dataclasses.dataclass(frozen=True)
class Text:
    """A text as bytes: `train` and `held_out` are uint8 (bytes); `checksum` is of the whole."""

    name: str
    checksum: int
    train: Tensor
    held_out: Tensor

    def batch(self, batch: int, length: int, generator: torch.Generator) -> Tensor:
        """Random windows of the training part: int64 (batch, length + 1)."""
        starts = torch.randint(len(self.train) - length, (batch, 1), generator=generator)
        return self.train[starts + torch.arange(length + 1)].long()  # (batch, length + 1)

    def evaluation(self, length: int, count: int = 96) -> Tensor:
        """Windows spread evenly over the held-out part: int64 (count, length + 1)."""
        starts = torch.linspace(0, len(self.held_out) - length - 1, count).long()  # (count)
        return self.held_out[starts[:, None] + torch.arange(length + 1)].long()


def code() -> str:
    """The standard library's source files in the order of their paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in root.rglob("*.py"):
        place = path.relative_to(root)
        if not LEFT_OUT & set(place.parts) and place != Path("html", "entities.py"):
            files.append(path)
    return "\n".join(path.read_text("utf-8", "replace") for path in sorted(files))


def prose() -> str:
    """The paragraphs of the language reference, each once, topics in alphabetical order."""
    joined = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    return "\n\n".join(dict.fromkeys(joined.split("\n\n")))


def table() -> str:
    """A row for each HTML character entity: its name, its code points, their Unicode names."""
    rows = []
    for name, points in sorted(html.entities.html5.items()):
        if name.endswith(";"):
            rows.append(f"&{name} {' '.join(map(_described, points))}")
    return "\n".join(rows)


def _described(point: str) -> str:
    return f"U+{ord(point):04X} {unicodedata.name(point, 'CONTROL CHARACTER')}"


@functools.cache
def read(write: Callable[[], str]) -> Text:
    """The text that a function writes, under the function's name, cut into its two parts."""
    encoded = bytearray(write().encode())
    data = torch.frombuffer(encoded, dtype=torch.uint8)  # (bytes)
    cut = len(data) - len(data) // 10
    return Text(write.__name__, zlib.crc32(encoded), data[:cut], data[cut:])
