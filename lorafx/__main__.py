"""The command line: `lorafx merge`, `show`, `convert` and `diff`, thin over the functions that do it."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import _formats
from ._adapter import Adapter
from ._compare import are_equal, describe, difference
from ._errors import ConfigError, FormatError, LorafxError
from ._stored import Weighed
from ._stream import OUT_DTYPES, merge

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
"""
CONVERT = """\
examples:
  lorafx convert french.safetensors french_512.pth
  lorafx convert french_512.pth french.safetensors
"""
DIFF = """\
examples:
  lorafx diff before.safetensors after.safetensors
  lorafx diff french.safetensors french_512.pth --tolerance 1e-3 && echo alike
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 where `diff` finds a difference, 2 for a mistake, said on stderr."""
    options = _parser().parse_args(argv)
    try:
        code: int = options.run(options)
        return code
    except (LorafxError, OSError) as error:
        print(f"lorafx {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"lorafx {options.command}: interrupted; the same command goes on.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lorafx", description="Work with LoRA adapters and checkpoints on a disk.",
                                     epilog="lorafx COMMAND --help has examples.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, about: str, examples: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=about, description=about, epilog=examples,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
        made.set_defaults(run=run)
        return made

    folding = command("merge", _merge, "fold adapters into a checkpoint on disk, one tensor in memory at a time", MERGE)
    folding.add_argument("base", type=Path, metavar="BASE",
                         help="a .safetensors, .pth or .pt file, or a Hugging Face folder")
    folding.add_argument("adapter", nargs="?", metavar="ADAPTER", help="an adapter to fold, with weight 1")
    folding.add_argument("--adapter", dest="more", action="append", default=[], metavar="PATH[=WEIGHT]",
                         help="another, and its weight; may be repeated")
    folding.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="the new file or folder")
    folding.add_argument("--dtype", choices=OUT_DTYPES, help="of the new floating-point tensors; by default the old")
    folding.add_argument("--untie", action="store_true", help="give an adapted weight that is tied a tensor of its own")
    folding.add_argument("--threads", type=_count, default=1, metavar="N",
                         help="how many compute (1, which is as fast as most disks write)")
    folding.add_argument("--force", action="store_true", help="replace OUT")
    showing = command("show", _show, "show what an adapter is", SHOW)
    showing.add_argument("file", type=Path, metavar="FILE")
    converting = command("convert", _convert, "write an adapter in the format that OUT's ending says", CONVERT)
    converting.add_argument("input", type=Path, metavar="IN")
    converting.add_argument("output", type=Path, metavar="OUT")
    converting.add_argument("--force", action="store_true", help="replace OUT")
    comparing = command("diff", _diff, "compare two adapters; the exit code is 0 if they are equal, 1 if not", DIFF)
    comparing.add_argument("first", type=Path, metavar="A")
    comparing.add_argument("second", type=Path, metavar="B")
    comparing.add_argument("--tolerance", type=float, default=0.0, metavar="X",
                           help="the largest ||D_a - D_b|| / ||D_a|| of equal weights (0)")
    for one in (showing, comparing):
        one.add_argument("--json", action="store_true", help="as JSON")
    return parser


def _count(text: str) -> int:
    """A number of threads."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def _read(path: Path) -> tuple[Adapter, str | None]:
    return _formats.read(path)


def _format_of(path: Path) -> str:
    return next(row.name for row in _formats.FORMATS if row.fits(path))


def _merge(options: argparse.Namespace) -> int:
    chosen = [(options.adapter, 1.0)] * (options.adapter is not None) + [_weighed(text) for text in options.more]
    if not chosen:
        raise ConfigError("there is no adapter to fold: name one after BASE, or some with --adapter PATH=WEIGHT.")
    paths = [Path(path) for path, _ in chosen]
    for path in paths:
        if [other.resolve() for other in paths].count(path.resolve()) > 1:
            raise ConfigError(f"'{path}' is given more than once: give it once, with the sum of the weights.")
    adapters = [Weighed(f"'{path}'", _read(path)[0], weight) for path, (_, weight) in zip(paths, chosen)]
    done = merge(options.base, adapters, options.output, dtype=OUT_DTYPES.get(options.dtype), untie=options.untie,
                 force=options.force, inputs=paths, threads=options.threads, progress=True)
    print(f"{options.output}: {done.changed} of {done.tensors} tensors changed; {_counted(done.files, 'file')}, "
          f"{_size(done.bytes)}, in {done.seconds:.1f} s ({_size(done.bytes / max(done.seconds, 1e-9))}/s)")
    return 0


def _weighed(text: str) -> tuple[str, float]:
    """PATH or PATH=WEIGHT."""
    path, equals, number = text.rpartition("=")
    try:
        weight = float(number) if equals else 1.0
    except ValueError:
        return text, 1.0
    if not math.isfinite(weight):
        raise ConfigError(f"the weight of '{path}' must be a finite number, not {number}.")
    return (path, weight) if equals else (text, weight)


def _show(options: argparse.Namespace) -> int:
    found = describe(*_read(options.file))
    about = {"file": str(options.file), "format": _format_of(options.file), **found}
    if options.json:
        print(json.dumps(about, indent=2))
        return 0
    trained = f" and {_counted(len(about['trained']), 'tensor')} trained whole" if about["trained"] else ""
    print(f"{options.file}: adapter '{about['name']}' ({about['format']}), {_counted(len(about['sites']), 'site')}"
          f"{trained}, {about['parameters']:,} parameters, {_size(about['bytes'])}")
    print(f"made for a base with the fingerprint {about['base']}\n" if about["base"] else "made for an unnamed base\n")
    rows = [[site or "(the model)", str(row["rank"]), f"{row['scale']:g}", _shape(row["A"]), _shape(row["B"]),
             row["dtype"], f"{row['norm']:.4g}"] for site, row in about["sites"].items()]
    rows += [[name, "-", "-", _shape(row["shape"]), "trained", row["dtype"], f"{row['norm']:.4g}"]
             for name, row in about["trained"].items()]
    print(_table(["site", "rank", "scale", "A", "B", "dtype", "norm of s B A"], rows))
    return 0


def _convert(options: argparse.Namespace) -> int:
    adapter, base = _read(options.input)
    if options.output.exists() and not options.force:
        raise FormatError(f"'{options.output}' is there already: choose another path, or replace it with --force.")
    _formats.write(adapter, options.output, None, base)
    print(f"{options.output}: adapter '{adapter.name}' ({_format_of(options.output)}), "
          f"{_counted(len(adapter.pairs), 'site')}")
    return 0


def _diff(options: argparse.Namespace) -> int:
    (first, base), (second, other) = _read(options.first), _read(options.second)
    found = difference(first, second, (base, other))
    same = are_equal(found, options.tolerance)
    if options.json:
        for part in ("sites", "trained"):  # JSON has no infinity
            found[part] = {name: value if math.isfinite(value) else None for name, value in found[part].items()}
        print(json.dumps({"equal": same, **found}, indent=2))
        return 0 if same else 1
    for path, names in ((options.first, found["only_first"]), (options.second, found["only_second"])):
        for name in names:
            print(f"only in {path}: {name}")
    for key, (ours, theirs) in found["config"].items():
        print(f"{key}: {ours!r} in {options.first}, {theirs!r} in {options.second}")
    rows = [[name, f"{value:.3g}"] for part in ("sites", "trained") for name, value in found[part].items()
            if not value <= options.tolerance]
    if rows:
        print(_table(["site", "||D_a - D_b|| / ||D_a||"], rows))
    alike = len(found["sites"]) + len(found["trained"]) - len(rows)
    print(f"{alike} of {_counted(alike + len(rows), 'common weight')} equal"
          + (f" to a relative {options.tolerance:g}" if options.tolerance else ""))
    return 0 if same else 1


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
                     for row in (header, *rows))


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}" + "s" * (number != 1)


def _size(count: float) -> str:
    """Bytes in the largest unit that leaves at least 1."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


if __name__ == "__main__":
    sys.exit(main())
