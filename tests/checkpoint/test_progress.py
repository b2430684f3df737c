"""How much of a merge is written, in a log: a line now and then, none for one that is quick."""

import sys
import time

import pytest

from lorafx._checkpoint.progress import progress_shown
from tests.support.checkpoints import small_files
from tests.support.command_line import MERGE, main


@pytest.fixture
def clock(monkeypatch):
    """The time, which only the test moves."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def lines_of(capsys, clock, total: int, counts: list[int], seconds: float) -> list[str]:
    """What is printed while these bytes are written, each in so many seconds."""
    with progress_shown(total, True) as advance:
        for count in counts:
            clock[0] += seconds
            advance(count)
    written = capsys.readouterr()
    assert not written.out and "\r" not in written.err
    return written.err.splitlines()


def test_a_line_for_each_tenth(capsys, clock):
    lines = lines_of(capsys, clock, 20 * 10**9, [20 * 10**9 // 2560] * 2560, 1 / 128)
    wanted = ["merging: 15 %, 3.00 of 20.00 GB, 3 s"]  # the first that it may print
    for tenth in range(2, 11):
        wanted.append(f"merging: {10 * tenth} %, {2 * tenth:.2f} of 20.00 GB, {2 * tenth} s")
    assert lines == wanted


def test_a_line_in_half_a_minute_if_it_is_slow(capsys, clock):
    lines = lines_of(capsys, clock, 10**12, [10**8] * 100, 10.0)
    assert lines == [f"merging: {n * 3 // 100} %, {n * 0.3:.2f} of 1000.00 GB, {30 * n} s"
                     for n in range(1, 34)]


def test_a_few_large_steps(capsys, clock):
    lines = lines_of(capsys, clock, 4 * 10**9, [10**9] * 4, 5.0)
    assert [line.split(",")[0] for line in lines] == [
        "merging: 25 %", "merging: 50 %", "merging: 75 %", "merging: 100 %"]


def test_nothing_for_a_few_seconds_or_if_nobody_asked(capsys, clock):
    assert not lines_of(capsys, clock, 100, [1] * 100, 0.02)
    with progress_shown(100, False) as advance:
        clock[0] += 100
        advance(100)
    assert capsys.readouterr() == ("", "")


def test_a_reader_that_has_gone(clock, monkeypatch):
    tried = []

    class Gone:
        def isatty(self):
            return False

        def write(self, text=""):
            tried.append(text)
            raise BrokenPipeError(32, "Broken pipe")

        flush = write

    monkeypatch.setattr(sys, "stderr", Gone())
    with progress_shown(100, True) as advance:
        clock[0] += 40
        advance(50)
    assert tried  # and the merge goes on


def test_a_merge_that_is_quick_prints_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small_files(tmp_path)
    assert main(MERGE) == 0
    assert capsys.readouterr().err == ""
