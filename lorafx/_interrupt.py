"""Lets Ctrl-C end the program `lorafx` without a traceback while Python still imports what it needs, such as torch.

`lorafx` itself imports this first. In any other program nothing changes.
"""

import signal
import sys
from pathlib import PurePath

_STARTED = sys.orig_argv[1:3] == ["-m", "lorafx"] or any(PurePath(path).stem == "lorafx" for path in sys.orig_argv[1:2])

if _STARTED and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def raise_again() -> None:
    """Let Ctrl-C be a KeyboardInterrupt again, so that what was begun is cleared up."""
    if _STARTED and signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
