"""What the command line takes: its commands and their arguments, each checked, and a line on stderr for a mistake."""

import argparse
import contextlib
import math
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__
from .._checkpoint.merge import OUT_DTYPES


LORAFX = """\
examples:
  lorafx merge Llama-3.2-1B french.safetensors -o Llama-3.2-1B-french
  lorafx show french.safetensors
  lorafx convert french.safetensors french_512.pth
  lorafx diff french.safetensors french_512.pth --tolerance 1e-3

lorafx COMMAND --help has more. Exit codes: 0 if all went well, 1 if diff finds a difference, 2 for a mistake or a file
that cannot be read or written, of which a line on stderr says what it is, and 130 after Ctrl-C.
"""
MERGE = """\
examples:
  lorafx merge Llama-3.2-1B french.safetensors -o Llama-3.2-1B-french
  lorafx merge model.safetensors french.safetensors -o merged.safetensors --dtype bfloat16
  lorafx merge Llama-3.2-1B --adapter french.safetensors=0.7 --adapter law.safetensors=0.3 -o both
"""
SHOW = """\
examples:
  lorafx show french.safetensors
  lorafx show french.safetensors --json
  lorafx show peft_folder/french
"""
CONVERT = """\
examples:
  lorafx convert french.safetensors french_512.pth
  lorafx convert french_512.pth french.safetensors

The optimizer and step of a training run are kept from .safetensors to .safetensors; other formats hold none, and a
line says so.
"""
DIFF = """\
examples:
  lorafx diff before.safetensors after.safetensors
  lorafx diff french.safetensors french_512.pth --tolerance 1e-3 && echo alike

Two adapters are equal if they add the same to the same weights: s B A at every site, and the tensors trained whole.
What else differs (name, base, alpha, dropout, ...) is noted, and does not count.
"""
_MOST_THREADS = 1024


def say(program: str, message: str) -> None:
    """One line on stderr, whatever a path or a file has put into the message; none where stderr takes none."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(f"{program}: {line}", file=sys.stderr)


class HelpRequested(Exception):
    """What --help and --version say: no command is run."""


class UsageError(Exception):
    """What is wrong with the arguments of a program: `lorafx`, or one of its commands."""

    def __init__(self, program: str, message: str) -> None:
        super().__init__(f"{message}; '{program} --help' has examples.")
        self.program = program


class _Parser(argparse.ArgumentParser):
    """Raises what argparse would print, so that one place prints, and knows that it did."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(self.prog, message)

    def print_help(self, file: Any = None) -> NoReturn:
        raise HelpRequested(self.format_help().rstrip())

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = super().parse_known_args(args, namespace)
        if rest:  # of a command, in whose name argparse would not say it
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return found, rest


class _Version(argparse.Action):
    def __call__(self, *arguments: Any) -> NoReturn:
        raise HelpRequested(f"lorafx {__version__}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of a command, its name as `command`; raises Said, or a Mistake."""
    parser = _Parser(prog="lorafx", description="Work with LoRA adapters and checkpoints on a disk.", epilog=LORAFX,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version of lorafx and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, about: str, epilog: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=about, description=about, epilog=epilog,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)

    folding = command("merge", "fold adapters into a checkpoint on disk, one tensor in memory at a time", MERGE)
    folding.add_argument("base", type=_path, metavar="BASE",
                         help="a .safetensors, .pth or .pt file, or a Hugging Face folder")
    folding.add_argument("adapter", type=_path, nargs="?", metavar="ADAPTER", help="an adapter to fold, with weight 1")
    folding.add_argument("--adapter", type=_weighed, dest="more", action="append", default=[], metavar="PATH[=WEIGHT]",
                         help="another, and its weight; may be repeated")
    folding.add_argument("-o", "--output", type=_path, required=True, metavar="OUT", help="the new file or folder")
    folding.add_argument("--dtype", choices=OUT_DTYPES, help="of the new floating-point tensors; by default the old")
    folding.add_argument("--untie", action="store_true", help="give an adapted weight that is tied a tensor of its own")
    folding.add_argument("--threads", type=_count, default=1, metavar="N",
                         help="how many compute (1, which is as fast as most disks write)")
    folding.add_argument("--force", action="store_true", help="replace OUT")
    showing = command("show", "show what an adapter is", SHOW)
    showing.add_argument("file", type=_path, metavar="FILE")
    converting = command("convert", "write an adapter in the format that OUT's ending says", CONVERT)
    converting.add_argument("input", type=_path, metavar="IN")
    converting.add_argument("output", type=_path, metavar="OUT")
    converting.add_argument("--force", action="store_true", help="replace OUT")
    comparing = command("diff", "compare two adapters; the exit code is 0 if they are equal, 1 if not", DIFF)
    comparing.add_argument("first", type=_path, metavar="A")
    comparing.add_argument("second", type=_path, metavar="B")
    comparing.add_argument("--tolerance", type=_tolerance, default=0.0, metavar="X",
                           help="the largest ||D_a - D_b|| / ||D_a|| of equal weights (0)")
    for one in (showing, comparing):
        one.add_argument("--json", action="store_true", help="as JSON")
    return parser.parse_args(argv)


def _path(text: str) -> Path:
    """A path that is free, or a file or a folder, so that nothing that opens it waits or is caught in a loop."""
    try:
        kind = os.stat(text).st_mode
    except (FileNotFoundError, NotADirectoryError):
        if text:
            return Path(text)
        raise argparse.ArgumentTypeError("'' is no path") from None
    except (OSError, ValueError) as error:  # a character that no path can have is a ValueError
        reason = error.strerror if isinstance(error, OSError) else error
        raise argparse.ArgumentTypeError(f"'{text}' cannot be reached: {reason}") from error
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
        raise argparse.ArgumentTypeError(f"'{text}' is neither a file nor a folder, but a device, a pipe or a socket")
    return Path(text)


def _weighed(text: str) -> tuple[Path, float]:
    """PATH or PATH=WEIGHT."""
    path, equals, number = text.rpartition("=")
    try:
        weight = float(number) if equals else 1.0
    except ValueError:
        return _path(text), 1.0
    if not math.isfinite(weight):
        raise argparse.ArgumentTypeError(f"the weight of '{path}' must be a finite number, not {number}")
    return _path(path if equals else text), weight


def _count(text: str) -> int:
    """A number of threads; a system that has no room for very many ends the process."""
    if not (text.isdecimal() and len(text) < 5 and 1 <= int(text) <= _MOST_THREADS):
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number from 1 to {_MOST_THREADS}")
    return int(text)


def _tolerance(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is no finite number of at least 0")
    return number
