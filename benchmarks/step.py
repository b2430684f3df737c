"""What a training step costs with LoRA, by lorafx and by its peers, beside the frozen model.

Contenders are the frozen base, the same again (the noise floor), PEFT (A and B in the base's dtype;
under bfloat16 also float32, its default), a forward patched by hand, and lorafx with and without
joined branches; each eager and compiled. All have the same base weights, A, B (random, B not zero),
data, layers and loss, and compute dX through every layer, in one process. First each passes a gate:
outputs, dX, dA and dB against a float64 reference, or its row is void. Then they are timed in
interleaved rounds; shown are medians of ratios to the frozen base's time in the same round: by the
processor's time in one thread, or by the clock in the cells of two.

    python benchmarks/step.py [--full] [--only WORD ...] [--rounds N] [--json FILE] [--png FILE]
    python benchmarks/step.py --readme out/step.json out/merge.json
    python benchmarks/step.py --rule

The default takes about twelve minutes on two idle CPU cores. `--full`, every model by tokens,
ranks and targets, takes many hours there: choose cells with `--only`. On a GPU all is in bfloat16,
and compiled means with CUDA graphs.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common.kineto  # noqa: F401 (before torch)
import torch
from tqdm import tqdm

from common.machine import in_words, machine
from common.progress import progress
from common.readme import markdown
from step_parts import report, rule
from step_parts.cells import DEFAULT, TINY, Cell, grid
from step_parts.picture import draw
from step_parts.run import measure, warm_compiler


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add, chosen = parser.add_argument, parser.add_mutually_exclusive_group()
    chosen.add_argument("--full", action="store_true", help="the whole grid")
    chosen.add_argument("--tiny", action="store_true",
                        help="models too small to say anything, to try the script")
    add("--only", nargs="+", default=[], metavar="WORD", help="cells whose label has all of these")
    add("--rounds", type=int, metavar="N", help="rounds of each cell, in place of its own number")
    add("--backend", default="inductor", help="of torch.compile (default: inductor)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    add("--json", type=Path, default=Path("out/step.json"), metavar="FILE", help="where results go")
    add("--png", type=Path, default=Path("out/step.png"), metavar="FILE",
        help="where the picture goes")
    chosen.add_argument("--rule", action="store_true",
                        help="instead, time which way is faster at which shapes: the constants of "
                             "lorafx's own rules")
    add("--readme", type=Path, nargs="+", metavar="FILE",
        help="run nothing; print the section `performance` of benchmarks/README.md from the JSON "
             "of step.py and, if given, merge.py (readme.py puts it there)")
    return parser.parse_args(argv)


def cells(options: argparse.Namespace) -> list[Cell]:
    """What to measure."""
    known = grid() if options.full else TINY if options.tiny else DEFAULT
    found = []
    for cell in known:
        if all(word in cell.label for word in options.only):
            if options.rounds:
                cell = dataclasses.replace(cell, rounds=options.rounds)
            if options.device.startswith("cuda"):
                cell = dataclasses.replace(cell, dtype=torch.bfloat16)
            found.append(cell)
    return list(dict.fromkeys(found))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all cells, print each one's table, and keep what is there so far in the JSON file."""
    began = time.perf_counter()
    device = torch.device(options.device)
    results: dict[str, Any] = {"machine": machine(device), "seconds": 0.0, "cells": []}
    for path in (options.json, options.png):
        path.parent.mkdir(parents=True, exist_ok=True)
    chosen = cells(options)
    if any(cell.compiled for cell in chosen):
        warm_compiler(device, options.backend)
    for cell in progress(chosen, unit="cell"):
        found = measure(cell, device, options.backend)
        tqdm.write(f"\n{report.table(found)}")
        results["cells"].append(found)
        results["seconds"] = time.perf_counter() - began
        options.json.write_text(json.dumps(results, indent=1))
    return results


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Measure, print and write, or print the README's section; returns what the JSON holds."""
    options = parse(argv)
    if options.readme:
        found = [json.loads(path.read_text()) for path in options.readme]
        print(markdown(report.readme(*found)))
        return None
    if options.rule:
        print(rule.table())
        return None
    results = run(options)
    draw(options.png, results["cells"])
    print(f"\n{report.LEGEND}\n\n{report.overview(results['cells'])}\n\n"
          f"{in_words(results['machine'], 'peft')}. {results['seconds']:.0f} s in all. "
          f"Files are {options.json} and {options.png}.")
    return results


if __name__ == "__main__":
    main()
