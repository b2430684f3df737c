"""Merges an adapter into a checkpoint on disk with `lorafx merge`, beside a copy and beside PEFT.

The checkpoint is made here: a Llama's tensors in bfloat16, in shards. Each program runs in a
process of its own, in rounds that alternate; what it wrote is on the disk (fsync) before its clock
stops. Memory is the process's peak resident set.

    python benchmarks/stream.py [--bytes 8e9] [--rounds 3] [--folder FOLDER] [--json FILE]
"""

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from common.machine import in_words, machine
from common.tables import aligned, size
from stream_parts import programs
from stream_parts.checkpoint import check, make

COPY, LORAFX, NOTHING = "copy the files", "lorafx merge", "import lorafx"
PEFT = "PEFT: load, merge_and_unload, save"
Program = Callable[[Path, Path], dict[str, Any]]


def why_not_peft(total: int) -> str:
    """Why PEFT is left out, if it is: it holds the whole model."""
    needed, free = 1.5 * total, programs.free_memory()
    if free >= needed:
        return ""
    return f"it needs about {size(needed)} of memory, and {size(free)} are free"


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All about one checkpoint, as plain data."""
    about = make(folder, options)
    compared: dict[str, Program] = {COPY: programs.copy, LORAFX: programs.lorafx}
    skipped = "--no-peft" if options.no_peft else why_not_peft(about["bytes"])
    if not skipped:
        compared[PEFT] = programs.peft
    found = run_rounds(folder, compared, options.rounds)
    rows = {}
    for name, several in found.items():
        times = [one["seconds"] for one in several]
        peak = None if name == COPY else max(one["peak"] for one in several)
        rows[name] = {"seconds": median(times), "times": times, "peak": peak}
    ratios = [one / other for one, other in zip(rows[LORAFX]["times"], rows[COPY]["times"])]
    start = programs.run(programs.IMPORT)
    above = rows[LORAFX]["peak"] - start["peak"]
    return {**about, "machine": machine(torch.device("cpu")), "rows": rows,
            "skipped": {PEFT: skipped} if skipped else {}, "import": start,
            "of_copy": median(ratios), "ratios": ratios, "above_import": above,
            "tensors": above / about["largest"]}


def run_rounds(folder: Path, compared: Mapping[str, Program],
               rounds: int) -> dict[str, list[dict[str, Any]]]:
    """What each program took in each round; every second round runs backwards."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in compared}
    out = folder / "out"
    for number in range(rounds):
        order = list(compared)
        if number % 2:
            order.reverse()
        for name in order:
            os.sync()
            found[name].append(compared[name](folder, out))
            if name == LORAFX and number == 0:
                check(folder / "base", out)
            shutil.rmtree(out)
    return found


def table(found: dict[str, Any]) -> str:
    """The programs, a line for each, and what lorafx is judged by."""
    first = found["rows"][COPY]["seconds"]
    body = []
    for name, row in found["rows"].items():
        seconds, peak = row["seconds"], row["peak"]
        body.append([name, f"{seconds:.1f} s", f"{seconds / first:.2f}",
                     f"{size(found['bytes'] / seconds)}/s", "-" if peak is None else size(peak)])
    start = found["import"]
    body.append([NOTHING, f"{start['seconds']:.1f} s", "-", "-", size(start["peak"])])
    lines = [f"{size(found['bytes'])} in {found['shards']} shards, {found['sites']} sites adapted, "
             f"largest tensor {size(found['largest'])}",
             aligned(["", "time", "x copy", "rate", "peak memory"], body)]
    lines += [f"{name} was left out: {why}." for name, why in found["skipped"].items()]
    lines.append(f"lorafx merge took {found['of_copy']:.2f} times what copying took in its round "
                 f"(at most 1.5 wanted), and {size(max(found['above_import'], 0))}, "
                 f"{max(found['tensors'], 0):.2f} of the largest tensor, above what importing "
                 "takes (at most 3 wanted).")
    return "\n".join(lines)


def readme(found: dict[str, Any]) -> list[str]:
    """The section of benchmarks/README.md, from what the JSON file holds."""
    return ["`benchmarks/stream.py` merges an adapter into a checkpoint on disk, beside a copy "
            "of its files and beside PEFT, each in a process of its own; what is written is on the "
            f"disk before the clock stops. {in_words(found['machine'], 'peft')}, medians of "
            f"{len(found['ratios'])} rounds:", table(found)]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--bytes", type=float, default=8e9, help="of the checkpoint (8e9)")
    add("--shard", type=float, default=2e9, help="bytes of a shard (2e9)")
    add("--hidden", type=int, default=4096)
    add("--vocabulary", type=int, default=32000)
    add("--rank", type=int, default=16)
    add("--rounds", type=int, default=3)
    add("--no-peft", action="store_true", help="leave PEFT out")
    add("--tiny", action="store_true",
        help="a checkpoint too small to say anything, to try the script")
    add("--folder", type=Path, help="where the files go meanwhile; needs twice the bytes")
    add("--json", type=Path, default=Path("out/stream.json"), metavar="FILE",
        help="where results go")
    options = parser.parse_args(argv)
    if options.tiny:
        options.bytes, options.shard, options.rounds = 2e6, 5e5, 1
        options.hidden, options.vocabulary = 64, 100
    return options


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the table and write the file; returns what it holds."""
    options = parse(argv)
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = measure(Path(folder), options)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=1))
    print(table(found))
    return found


if __name__ == "__main__":
    main()
