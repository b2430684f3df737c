"""One progress bar for all benchmarks: a bar on a terminal, a line now and then in a log."""

import io
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0


class Lines(io.TextIOBase):
    """A file that gets each new state of a bar as a line of its own; tqdm rewrites one line."""

    def __init__(self, file: TextIO) -> None:
        super().__init__()
        self.file = file
        self.written = ""

    def write(self, text: str) -> int:
        """Write a state of the bar, if it differs from the one before in more than time."""
        state = text.partition("[")[0].strip()
        if state and state != self.written:
            self.file.write(text.strip() + "\n")
            self.written = state
        return len(text)

    def flush(self) -> None:
        """Flush the file."""
        self.file.flush()


def progress(items: Iterable[Any] | None = None, **options: Any) -> "tqdm[Any]":
    """tqdm(items, **options); if stderr is not a terminal, it prints a line every half a minute."""
    if sys.stderr.isatty():
        return tqdm(items, **options)
    return tqdm(items, file=Lines(sys.stderr), ncols=100, mininterval=SECONDS_BETWEEN_LINES,
                maxinterval=2 * SECONDS_BETWEEN_LINES, **options)
