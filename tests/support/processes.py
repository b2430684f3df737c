"""Forked processes that may be killed."""

import os
import threading
import time
from collections.abc import Callable

from tqdm import tqdm


def child(work: Callable[[], None]) -> int:
    """The id of a forked process that does this work and never returns; it may be killed.

    It has a lock of tqdm's of its own: it would hold that of this process for ever if it were
    killed with it.
    """
    pid = os.fork()
    if pid == 0:
        try:
            tqdm.set_lock(threading.RLock())
            work()
        finally:
            os._exit(0)
    return pid


def seconds(work: Callable[[], None]) -> float:
    """How long a forked process takes for this work, on this machine."""
    began = time.perf_counter()
    os.waitpid(child(work), 0)
    return time.perf_counter() - began
