"""How much is written, shown on stderr: a bar on a terminal, a line now and then in a log."""

import contextlib
import sys
import time
from collections.abc import Iterator

from tqdm import tqdm

from .._storage.streams import Advance


_QUIET = 3.0  # seconds in which nothing is printed to a log
_STEP = 10  # percent after which a line is printed to a log
_PAUSE = 30.0  # seconds after which one is printed though less has been written


@contextlib.contextmanager
def progress_shown(total: int, wanted: bool) -> Iterator[Advance]:
    """Yield a function to call with the number of bytes that have been written, of `total`.

    In a log there is no tqdm: even one that shows nothing takes a lock that is shared with forked
    processes, and that one which is killed may hold for ever.
    """
    if not wanted:
        yield _ignore
    elif sys.stderr.isatty():
        with tqdm(total=total, unit="B", unit_scale=True, desc="merging") as bar:
            yield bar.update
    else:
        yield _Log(total).advance


def _ignore(count: int) -> None:
    """Nobody looks."""


class _Log:
    """Prints a line for each tenth that is written, and after 30 seconds without one."""

    def __init__(self, total: int) -> None:
        self.total, self.written, self.printed_percent = total, 0, 0
        self.began = self.last = time.monotonic()

    def advance(self, count: int) -> None:
        """Add bytes; print a line if it is time to."""
        self.written += count
        now = time.monotonic()
        if now - self.began < _QUIET:
            return
        percent = 100 * self.written // max(self.total, 1)
        if percent // _STEP > self.printed_percent // _STEP or now - self.last >= _PAUSE:
            self.printed_percent, self.last = percent, now
            size = f"{self.written / 1e9:.2f} of {self.total / 1e9:.2f} GB"
            line = f"merging: {percent} %, {size}, {now - self.began:.0f} s"
            with contextlib.suppress(OSError):  # nobody reads
                print(line, file=sys.stderr, flush=True)
