"""The commands and their arguments, each checked before anything runs or torch is imported."""

import argparse
import math
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .._version import __version__


LORAFX = """\
examples:
  lorafx merge Llama-3.2-1B french.safetensors -o Llama-3.2-1B-french
  lorafx show french.safetensors
  lorafx convert french.safetensors french_512.pth
  lorafx diff french.safetensors french_512.pth --tolerance 1e-3

lorafx COMMAND --help has more. Exit codes: 0 if all went well, 1 if diff finds a difference, 2 for
a mistake or a file that cannot be read or written, as a line on stderr says, 130 after Ctrl-C.
"""
MERGE = """\
examples:
  lorafx merge Llama-3.2-1B french.safetensors -o Llama-3.2-1B-french
  lorafx merge model.safetensors french.safetensors -o merged.safetensors --dtype bfloat16
  lorafx merge Llama-3.2-1B --adapter french.safetensors=0.7 --adapter law.safetensors=0.3 -o both
  lorafx merge Llama-3.2-1B french.safetensors -o merged --max-error 0.1

The last line says where rounding loses most: ||written - (W + s B A)|| / ||s B A||. With another
--dtype, W's own rounding counts in it.
"""
SHOW = """\
examples:
  lorafx show french.safetensors
  lorafx show french.safetensors --json
  lorafx show peft_folder/french
  lorafx show french.safetensors --plot report.html --base Llama-3.2-1B
  lorafx show french.safetensors law.safetensors --plot report.png

--plot draws, with matplotlib, how large a change the adapter makes by layer and kind of site, how
much of its rank it uses, its singular values and, given two adapters, the cosine between them.
"""
CONVERT = """\
examples:
  lorafx convert french.safetensors french_512.pth
  lorafx convert french_512.pth french.safetensors
  lorafx convert peft_folder sdxl.safetensors --format kohya --base unet/model.safetensors
  lorafx convert lit_model.pth.lora french.safetensors --alpha 16

--base says what a format leaves to the model: the names of layers (kohya-ss, diffusers) and their
kinds (PEFT, MLX). The optimizer and step of a training run are kept from .safetensors to
.safetensors; other formats hold none, and a line says so.
"""
DIFF = """\
examples:
  lorafx diff before.safetensors after.safetensors
  lorafx diff french.safetensors french_512.pth --tolerance 1e-3 && echo alike

Two adapters are equal if they add the same to the same weights: s B A at every site, and the
tensors trained whole. What else differs (name, base, alpha, dropout, ...) is noted, and does not
count.
"""
PICTURES = (".html", ".png")
OUT_DTYPES = ("float32", "float16", "bfloat16")
MAX_THREADS = 1024  # a system that has no room for very many ends the process


class HelpRequested(Exception):
    """--help or --version: the text to print, and no command is run."""


class UsageError(Exception):
    """Wrong arguments of a program: `lorafx`, or one of its commands."""

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
        if rest:  # argparse would report those of a command under the name `lorafx`
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return found, rest


class _Version(argparse.Action):
    def __call__(self, *arguments: Any) -> NoReturn:
        raise HelpRequested(f"lorafx {__version__}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of a command, its name as `command`, or raise one of the above."""
    parser = _Parser(prog="lorafx", epilog=LORAFX,
                     description="Work with LoRA adapters and checkpoints on a disk.",
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action=_Version, nargs=0,
                        help="show the version of lorafx and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (description, examples, add_arguments) in _COMMANDS.items():
        add_arguments(commands.add_parser(
            name, help=description, description=description, epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter))
    return parser.parse_args(argv)


def _add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", type=_path, metavar="BASE",
                        help="a .safetensors, .pth or .pt file, or a Hugging Face folder")
    parser.add_argument("adapter", type=_path, nargs="?", metavar="ADAPTER",
                        help="an adapter to fold, with weight 1")
    parser.add_argument("--adapter", type=_weighted_path, dest="more", action="append", default=[],
                        metavar="PATH[=WEIGHT]", help="another, and its weight; may be repeated")
    parser.add_argument("-o", "--output", type=_path, required=True, metavar="OUT",
                        help="the new file or folder")
    parser.add_argument("--dtype", choices=OUT_DTYPES,
                        help="of the new floating-point tensors; by default the old")
    parser.add_argument("--max-error", type=_at_least_zero, metavar="X",
                        help="write nothing if rounding W + s B A to what is written would lose "
                             "more than this of s B A anywhere, such as 0.1")
    parser.add_argument("--untie", action="store_true",
                        help="give an adapted weight that is tied a tensor of its own")
    parser.add_argument("--threads", type=_thread_count, default=1, metavar="N",
                        help="how many compute (1, which is as fast as most disks write)")
    parser.add_argument("--force", action="store_true", help="replace OUT")


def _add_show_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=_path, metavar="FILE")
    parser.add_argument("other", type=_path, nargs="?", metavar="OTHER",
                        help="with --plot, an adapter to compare it with")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as JSON")
    form.add_argument("--plot", type=_picture, metavar="OUT",
                      help="as pictures: an .html page or a .png, which replaces what is there")
    parser.add_argument("--base", type=_path, metavar="BASE",
                        help="with --plot, its base, to show |s B A| over |W|")


def _add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", type=_path, metavar="IN")
    parser.add_argument("output", type=_path, metavar="OUT")
    parser.add_argument("--format", metavar="NAME",
                        help="diffusers, kohya or mlx, where OUT's ending does not say it")
    parser.add_argument("--base", type=_path, metavar="BASE",
                        help="its base, a .safetensors file or a Hugging Face folder")
    parser.add_argument("--part", metavar="PART",
                        help="of a diffusion pipeline, such as unet or text_encoder_2")
    parser.add_argument("--adapter", metavar="NAME", help="which one, where IN has several")
    parser.add_argument("--alpha", type=_finite, metavar="X",
                        help="of IN, where that does not keep it (torchtune, litgpt, loralib)")
    parser.add_argument("--force", action="store_true", help="replace OUT")


def _add_diff_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", type=_path, metavar="A")
    parser.add_argument("second", type=_path, metavar="B")
    parser.add_argument("--tolerance", type=_at_least_zero, default=0.0, metavar="X",
                        help="the largest ||D_a - D_b|| / ||D_a|| of equal weights (0)")
    parser.add_argument("--json", action="store_true", help="as JSON")


_COMMANDS: dict[str, tuple[str, str, Callable[[argparse.ArgumentParser], None]]] = {
    "merge": ("fold adapters into a checkpoint on disk, one tensor in memory at a time",
              MERGE, _add_merge_arguments),
    "show": ("show what an adapter is", SHOW, _add_show_arguments),
    "convert": ("write an adapter in the format that OUT's ending says",
                CONVERT, _add_convert_arguments),
    "diff": ("compare two adapters; the exit code is 0 if they are equal, 1 if not",
             DIFF, _add_diff_arguments),
}


def _path(text: str) -> Path:
    """A path that is free, or a file or a folder, so that nothing that opens it waits or loops."""
    try:
        kind = os.stat(text).st_mode
    except (FileNotFoundError, NotADirectoryError):
        if text:
            return Path(text)
        raise argparse.ArgumentTypeError("'' is not a path") from None
    except (OSError, ValueError) as error:  # a character that no path can have is a ValueError
        reason = error.strerror if isinstance(error, OSError) else error
        raise argparse.ArgumentTypeError(f"'{text}' cannot be reached: {reason}") from error
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
        raise argparse.ArgumentTypeError(
            f"'{text}' is neither a file nor a folder, but a device, a pipe or a socket")
    return Path(text)


def _picture(text: str) -> Path:
    """The path of a picture, which its ending says."""
    path = _path(text)
    if path.suffix.lower() not in PICTURES or path.is_dir():
        raise argparse.ArgumentTypeError(f"'{text}' is no picture: name a file that ends in "
                                         f"{' or '.join(PICTURES)}")
    return path


def _weighted_path(text: str) -> tuple[Path, float]:
    """PATH or PATH=WEIGHT."""
    path, equals, number = text.rpartition("=")
    try:
        weight = float(number) if equals else 1.0
    except ValueError:
        return _path(text), 1.0
    if not math.isfinite(weight):
        raise argparse.ArgumentTypeError(
            f"the weight of '{path}' must be a finite number, not {number}")
    return _path(path if equals else text), weight


def _thread_count(text: str) -> int:
    if not (text.isdecimal() and len(text) < 5 and 1 <= int(text) <= MAX_THREADS):
        raise argparse.ArgumentTypeError(
            f"'{text}' is not a whole number from 1 to {MAX_THREADS}")
    return int(text)


def _finite(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"'{text}' is not a finite number")
    return number


def _at_least_zero(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is not a finite number of at least 0")
    return number
