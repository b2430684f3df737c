"""Architectures are examined in processes of their own: one that crashes or hangs is one row."""

import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from common.progress import progress
from coverage_parts.models import sentence
from coverage_parts.rows import Row, examine

Running = dict[Any, tuple[Row, Any, float]]  # {connection: (row, process, when it began)}


class TimeLimit(BaseException):
    """A model took longer than it may. No Exception, lest a library's own handler swallows it."""


def child(row: Row, seconds: float, connection: Connection) -> None:
    """Examine one model in this process, silently, and send the row."""
    def stop(*_: Any) -> None:
        raise TimeLimit(f"more than {seconds:g} s of processor time")

    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    warnings.simplefilter("ignore")
    began = time.perf_counter()
    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds, 1)  # and again: one in a finaliser is lost
    try:
        examine(row)
    except (TimeLimit, Exception) as error:
        row.reason = sentence(error)
    signal.setitimer(signal.ITIMER_PROF, 0)
    row.seconds = time.perf_counter() - began
    connection.send(row)


def start(row: Row, seconds: float, running: Running) -> None:
    """Begin to examine a model in a process forked for it."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(row, seconds, sender))
    process.start()
    sender.close()
    running[receiver] = row, process, time.perf_counter()


def finish(connection: Any, running: Running, late: bool) -> Row:
    """The row that a process sent, or the one that it was given and why it sent none."""
    row, process, _ = running.pop(connection)
    if late:
        process.kill()
    try:
        row = connection.recv()
    except EOFError:
        process.join()
        row.reason = f"its process ended with code {process.exitcode}"
    process.join()
    return row


def examine_all(names: Sequence[str], seconds: float, jobs: int) -> list[Row]:
    """The rows of all models, `jobs` at a time, each with `seconds` of processor time."""
    waiting = list(reversed(names))
    running: Running = {}
    rows = []
    with progress(total=len(names), unit="model") as bar:
        while waiting or running:
            while waiting and len(running) < jobs:
                start(Row(waiting.pop()), seconds, running)
            ready = wait(list(running), timeout=1)
            now = time.perf_counter()
            for connection, (_, _, began) in list(running.items()):
                late = now - began > 6 * seconds + 10 and connection not in ready
                if late or connection in ready:
                    rows.append(finish(connection, running, late))
                    bar.update()
    return sorted(rows, key=lambda row: row.name)
