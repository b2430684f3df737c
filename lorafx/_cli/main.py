"""The command line: `lorafx merge`, `show`, `convert` and `diff`, thin over the functions that do it."""

import argparse
import dataclasses
import io
import json
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

from .._adapter.compare import adapters_equal, describe, difference
from .._checkpoint.layout import WeightedAdapter
from .._checkpoint.merge import OUT_DTYPES, merge_checkpoint
from .._errors import ConfigError, FormatError, LorafxError
from .._formats.table import format_of, read_adapter, write_adapter
from .arguments import HelpRequested, UsageError, parse, say


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 where `diff` finds a difference, 2 for a mistake, said on stderr."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may lack a letter of a site's name
        sys.stdout.reconfigure(errors="backslashreplace")
    program = "lorafx"
    try:
        try:
            options = parse(argv)
            program = f"lorafx {options.command}"
            code, text = _COMMANDS[options.command](options)
        except HelpRequested as said:
            code, text = 0, str(said)
        return _print_result(text, code)
    except UsageError as error:
        say(error.program, str(error))
        return 2
    except (LorafxError, OSError) as error:
        say(program, str(error))
        return 2
    except MemoryError:
        say(program, "there is not enough memory.")
        return 2
    except KeyboardInterrupt as error:
        say(program, str(error) or "interrupted.")
        return 130


def _print_result(text: str, code: int) -> int:
    """Write what a command says; returns the exit code, that of other tools if the reader has gone."""
    if sys.stdout is None:  # it was closed when Python started
        return code
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python tries once more, and fails
        if isinstance(error, BrokenPipeError):
            return 141
        raise OSError(f"the output cannot be written: {error.strerror}.") from error
    return code


def _merge(options: argparse.Namespace) -> tuple[int, str]:
    chosen = [(options.adapter, 1.0)] * (options.adapter is not None) + options.more
    if not chosen:
        raise ConfigError("there is no adapter to fold: name one after BASE, or some with --adapter PATH=WEIGHT.")
    paths = [path for path, _ in chosen]
    for path in paths:
        if [other.resolve() for other in paths].count(path.resolve()) > 1:
            raise ConfigError(f"'{path}' is given more than once: give it once, with the sum of the weights.")
    adapters = [WeightedAdapter(f"'{path}'", read_adapter(path)[0], weight) for path, weight in chosen]
    try:
        done = merge_checkpoint(options.base, adapters, options.output, dtype=OUT_DTYPES.get(options.dtype), untie=options.untie,
                     force=options.force, inputs=paths, threads=options.threads, progress=sys.stderr is not None)
    except KeyboardInterrupt:
        if options.base.is_dir():
            raise KeyboardInterrupt("interrupted; the same command goes on.") from None
        raise
    return 0, (f"{options.output}: {done.changed} of {done.tensors} tensors changed; {_counted(done.files, 'file')}, "
               f"{_size(done.bytes)}, in {done.seconds:.1f} s ({_size(done.bytes / max(done.seconds, 1e-9))}/s)")


def _show(options: argparse.Namespace) -> tuple[int, str]:
    found = describe(*read_adapter(options.file))
    about = {"file": str(options.file), "format": format_of(options.file).name, **found}
    if options.json:
        return 0, _json(about)
    trained = f" and {_counted(len(about['trained']), 'tensor')} trained whole" if about["trained"] else ""
    lines = [f"{options.file}: adapter '{about['name']}' ({about['format']}), {_counted(len(about['sites']), 'site')}"
             f"{trained}, {about['parameters']:,} parameters, {_size(about['bytes'])}",
             f"made for a base with the fingerprint {about['base']}" if about["base"] else "made for an unnamed base",
             ""]
    rows = [[site or "(the model)", str(row["rank"]), f"{row['scale']:g}", _shape(row["A"]), _shape(row["B"]),
             row["dtype"], f"{row['norm']:.4g}"] for site, row in about["sites"].items()]
    rows += [[name, "-", "-", _shape(row["shape"]), "trained", row["dtype"], f"{row['norm']:.4g}"]
             for name, row in about["trained"].items()]
    return 0, "\n".join([*lines, *_table(["site", "rank", "scale", "A", "B", "dtype", "norm of s B A"], rows)])


def _convert(options: argparse.Namespace) -> tuple[int, str]:
    adapter, base = read_adapter(options.input)
    row = format_of(options.output)
    if options.output.exists() and not options.force:
        raise FormatError(f"'{options.output}' is there already: choose another path, or replace it with --force.")
    dropped = adapter.training is not None and not row.keeps_training
    if dropped:
        adapter = dataclasses.replace(adapter, training=None)
    write_adapter(adapter, options.output, None, base)
    left = "; the optimizer and step of its training are left out, as that format keeps none" if dropped else ""
    return 0, f"{options.output}: adapter '{adapter.name}' ({row.name}), {_counted(len(adapter.pairs), 'site')}{left}"


def _diff(options: argparse.Namespace) -> tuple[int, str]:
    (first, base), (second, other) = read_adapter(options.first), read_adapter(options.second)
    found = difference(first, second, (base, other))
    same = adapters_equal(found, options.tolerance)
    code = 0 if same else 1
    if options.json:
        return code, _json({"equal": same, **found})
    lines = [f"only in {path}: {name}" for path, names in ((options.first, found["only_first"]),
                                                           (options.second, found["only_second"])) for name in names]
    lines += [f"note: {key} is {ours!r} in {options.first}, {theirs!r} in {options.second}"
              for key, (ours, theirs) in found["config"].items()]
    rows = [[name, f"{value:.3g}"] for part in ("sites", "trained") for name, value in found[part].items()
            if not value <= options.tolerance]
    if rows:
        lines += _table(["site", "||D_a - D_b|| / ||D_a||"], rows)
    alike = len(found["sites"]) + len(found["trained"]) - len(rows)
    lines.append(f"{alike} of {_counted(alike + len(rows), 'common weight')} equal"
                 + (f" to a relative {options.tolerance:g}" if options.tolerance else ""))
    return code, "\n".join(lines)


_COMMANDS = {"merge": _merge, "show": _show, "convert": _convert, "diff": _diff}


def _json(value: Any) -> str:
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    """A value with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in (header, *rows)]


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
