"""The command line: it parses the arguments, runs a command, and prints its result or one line of error."""

import contextlib
import io
import os
import sys
from collections.abc import Sequence

from .._errors import LorafxError
from .arguments import HelpRequested, UsageError, parse


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code: 0, 1 if `diff` finds a difference, 2 after an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may lack a letter of a site's name
        sys.stdout.reconfigure(errors="backslashreplace")
    program = "lorafx"
    try:
        try:
            options = parse(argv)
            program = f"lorafx {options.command}"
            from .commands import COMMANDS  # imports torch
            code, text = COMMANDS[options.command](options)
        except HelpRequested as help_text:
            code, text = 0, str(help_text)
        return _print_result(text, code)
    except UsageError as error:
        _print_error(error.program, str(error))
        return 2
    except (LorafxError, OSError) as error:
        _print_error(program, str(error))
        return 2
    except MemoryError:
        _print_error(program, "there is not enough memory.")
        return 2
    except KeyboardInterrupt as error:
        _print_error(program, str(error) or "interrupted.")
        return 130


def _print_result(text: str, code: int) -> int:
    """Write the result; return the exit code, or that of other tools if the reader has gone."""
    if sys.stdout is None:  # it was closed when Python started
        return code
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python tries again
        if isinstance(error, BrokenPipeError):
            return 141
        raise OSError(f"the output cannot be written: {error.strerror}.") from error
    return code


def _print_error(program: str, message: str) -> None:
    """Write one line on stderr, whatever a path has put into the message, or none if it is closed."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(f"{program}: {line}", file=sys.stderr)
