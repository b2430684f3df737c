"""`merge`, `show`, `convert` and `diff`, thin over what does it: each returns (exit code, text)."""

import argparse
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .._adapter.adapter import Adapter
from .._adapter.compare import adapters_equal, describe, difference
from .._adapter.letters import counted, padded, width
from .._adapter.losses import worst_first
from .._checkpoint.layout import WeightedAdapter
from .._checkpoint.merge import merge_checkpoint
from .._errors import ConfigError, FormatError
from .._formats.table import format_of, format_read, read_adapter, write_adapter
from .._model.attach import attach, begin_injection
from .._model.extract import extract
from .._model.fit import fit
from .._model.program import read_program
from .base import model_of
from .conversions import table_of
from .report import plot


def merge(options: argparse.Namespace) -> tuple[int, str]:
    """Fold adapters into a checkpoint, and report what was written, how fast."""
    chosen = list(options.more)
    if options.adapter is not None:
        chosen.insert(0, (options.adapter, 1.0))
    if not chosen:
        raise ConfigError("there is no adapter to fold: name one after BASE, or some with "
                          "--adapter PATH=WEIGHT.")
    paths = [path for path, _ in chosen]
    resolved = [path.resolve() for path in paths]
    for path in paths:
        if resolved.count(path.resolve()) > 1:
            raise ConfigError(f"'{path}' is given more than once: give it once, with the sum of "
                              "the weights.")
    adapters = []
    for path, weight in chosen:
        adapters.append(WeightedAdapter(f"'{path}'", read_adapter(path)[0], weight))
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    try:
        done = merge_checkpoint(options.base, adapters, options.output, dtype=dtype,
                                untie=options.untie, force=options.force, inputs=paths,
                                threads=options.threads, progress=sys.stderr is not None,
                                max_error=options.max_error,
                                table=table_of)
    except KeyboardInterrupt:
        if options.base.is_dir():
            raise KeyboardInterrupt("interrupted; the same command goes on.") from None
        raise
    speed = _size(done.bytes / max(done.seconds, 1e-9))
    lines = [f"{options.output}: {done.changed} of {done.tensors} tensors changed; "
             f"{counted(done.files, 'file')}, {_size(done.bytes)}, in {done.seconds:.1f} s "
             f"({speed}/s)"]
    for site, error in worst_first(done.errors)[:1]:
        lines.append(f"rounding lost at most {error:.3g} of s B A, at {_site(site)}")
    return 0, "\n".join(lines)


def show(options: argparse.Namespace) -> tuple[int, str]:
    """Describe an adapter: its sites, ranks, scales, shapes, and the norms of what it adds.

    Or draw it, beside another one if there is one.
    """
    if options.plot is not None:
        return 0, plot(options)
    if options.other is not None:
        raise ConfigError("two adapters are shown together in pictures only: add --plot OUT.html, "
                          "or compare them by 'lorafx diff'.")
    if options.base is not None:
        raise ConfigError("--base is for --plot, which shows |s B A| over |W|: add --plot OUT.html."
                          )
    description = describe(*read_adapter(options.file))
    format_name = format_read(options.file).name
    if options.json:
        return 0, _json({"file": str(options.file), "format": format_name, **description})
    sites, trained = description["sites"], description["trained"]
    base = description["base"]
    parts = [f"adapter '{description['name']}' ({format_name})", counted(len(sites), "site")]
    if trained:
        parts[-1] += f" and {counted(len(trained), 'tensor')} trained whole"
    parts += [f"{description['parameters']:,} parameters", _size(description["bytes"])]
    lines = [f"{options.file}: {', '.join(parts)}",
             f"made for a base with the fingerprint {base}" if base else "made for an unnamed base",
             ""]
    rows = []
    for site, row in sites.items():
        rows.append([_site(site), str(row["rank"]), f"{row['scale']:g}", _shape(row["A"]),
                     _shape(row["B"]), row["dtype"], f"{row['norm']:.4g}"])
    for name, row in trained.items():
        rows.append([name, "-", "-", _shape(row["shape"]), "trained", row["dtype"],
                     f"{row['norm']:.4g}"])
    header = ["site", "rank", "scale", "A", "B", "dtype", "norm of s B A"]
    return 0, "\n".join(lines + _table(header, rows))


def convert(options: argparse.Namespace) -> tuple[int, str]:
    """Write an adapter in the format of another path, and report what that format cannot hold."""
    row = format_of(options.output, options.format)
    part = options.part if format_read(options.input).has_parts else None
    if options.part is not None and not (part or row.has_parts):
        raise FormatError(f"neither '{options.input}' nor '{options.output}' is of a pipeline: "
                          "leave out --part.")
    model = None if options.base is None else model_of(options.base)
    adapter, base = read_adapter(
        options.input, options.adapter, model, part=part, alpha=options.alpha)
    if model is not None:
        adapter = _fitted(adapter, model, options)
    if options.output.exists() and not options.force:
        raise FormatError(f"'{options.output}' is there already: choose another path, or replace "
                          "it with --force.")
    note = ""
    if adapter.training is not None and not row.keeps_training:
        adapter = dataclasses.replace(adapter, training=None)
        note = ("; the optimizer and step of its training are left out, as that format keeps "
                "none")
    write_adapter(adapter, options.output, model, base, options.format,
                  options.part if row.has_parts else None)
    count = counted(len(adapter.pairs), "site")
    return 0, f"{options.output}: adapter '{adapter.name}' ({row.name}), {count}{note}"


def _fitted(adapter: Adapter, model: nn.Module, options: argparse.Namespace) -> Adapter:
    """An adapter as this model has it, its A and B in the dtype that they have."""
    factors = [factor for A, B, _ in adapter.pairs.values() for factor in (A, B)]
    dtype = functools.reduce(torch.promote_types, {factor.dtype for factor in factors})
    exact = dataclasses.replace(
        adapter, config=dataclasses.replace(adapter.config, dtype=dtype))
    program = read_program(model)
    fitted = fit(program, exact, f"'{options.input}'", None)
    begin_injection(program)
    attach(program, fitted)
    found = extract(model, adapter.name)
    same = found.pairs.keys() == adapter.pairs.keys()
    return dataclasses.replace(
        found, config=adapter.config, training=adapter.training if same else None)


def diff(options: argparse.Namespace) -> tuple[int, str]:
    """Compare two adapters; the exit code is 1 if they differ by more than the tolerance."""
    first, first_base = read_adapter(options.first)
    second, second_base = read_adapter(options.second)
    found = difference(first, second, (first_base, second_base))
    same = adapters_equal(found, options.tolerance)
    code = 0 if same else 1
    if options.json:
        return code, _json({"equal": same, **found})
    lines = [f"only in {options.first}: {name}" for name in found["only_first"]]
    lines += [f"only in {options.second}: {name}" for name in found["only_second"]]
    for key, (ours, theirs) in found["config"].items():
        lines.append(f"note: {key} is {ours!r} in {options.first}, {theirs!r} in {options.second}")
    distances = [*found["sites"].items(), *found["trained"].items()]
    rows = []
    for name, distance in distances:
        if not distance <= options.tolerance:  # NaN is a difference
            rows.append([name, f"{distance:.3g}"])
    if rows:
        lines += _table(["site", "||D_a - D_b|| / ||D_a||"], rows)
    equal = len(distances) - len(rows)
    within = f" to a relative {options.tolerance:g}" if options.tolerance else ""
    lines.append(f"{equal} of {counted(len(distances), 'common weight')} equal{within}")
    return code, "\n".join(lines)


COMMANDS: Mapping[str, Callable[[argparse.Namespace], tuple[int, str]]] = {
    "merge": merge, "show": show, "convert": convert, "diff": diff,
}


def _json(value: Any) -> str:
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    """A value with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with the columns aligned."""
    lines = [header, *rows]
    widths = [max(map(width, column)) for column in zip(*lines)]
    return ["  ".join(map(padded, line, widths)).rstrip() for line in lines]


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _site(name: str) -> str:
    return name or "(the model)"


def _size(count: float) -> str:
    """Bytes in the largest unit that leaves at least 1."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
