"""What a training step costs with LoRA, by lorafx and by its peers, beside the frozen model: a fair fight.

Contenders are the frozen base, the same again (the noise floor), PEFT (A and B in the base's dtype; under bfloat16 also
float32, its default), a forward patched by hand, and lorafx with and without joined branches; each eager and compiled.
All have the same base weights, A, B (random, B not zero), data, layers and loss, and compute dX through every layer, in
one process. First each passes a gate: outputs, dX, dA and dB against a float64 reference, or its row is void. Then they
are timed in interleaved rounds; shown are medians of ratios to the frozen base's time in the same round.

    python benchmarks/step.py [--full] [--only WORD ...] [--rounds N] [--json FILE] [--png FILE]
    python benchmarks/step.py --readme out/step.json out/merge.json
    python benchmarks/step.py --rule

The default takes less than five minutes on two idle CPU cores. `--full`, every model by tokens, ranks and targets,
takes many hours there: choose cells with `--only`. On a GPU all is in bfloat16, and compiled means with CUDA graphs.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kineto  # noqa: F401 (before torch)
import step_report
import step_rule
import torch
from step_cells import DEFAULT, TINY, Cell, grid
from step_measure import machine
from step_run import measure, warm_compiler
from tqdm import tqdm


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--full", action="store_true", help="the whole grid")
    chosen.add_argument("--tiny", action="store_true", help="models too small to say anything, to try the script")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cells whose label has all of these")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds of each cell, in place of its own number")
    parser.add_argument("--backend", default="inductor", help="of torch.compile (default: inductor)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    parser.add_argument("--json", type=Path, default=Path("out/step.json"), metavar="FILE", help="where results go")
    parser.add_argument("--png", type=Path, default=Path("out/step.png"), metavar="FILE", help="where the picture goes")
    chosen.add_argument("--rule", action="store_true",
                        help="instead, time which way is faster at which shapes: the constants of lorafx's own rules")
    parser.add_argument("--readme", type=Path, nargs="+", metavar="FILE",
                        help="run nothing; print the README's section from the JSON of step.py and, if given, merge.py")
    return parser.parse_args(argv)


def cells(options: argparse.Namespace) -> list[Cell]:
    """What to measure."""
    found = [cell for cell in (grid() if options.full else TINY if options.tiny else DEFAULT)
             if all(word in cell.label for word in options.only)]
    if options.rounds:
        found = [dataclasses.replace(cell, rounds=options.rounds) for cell in found]
    if options.device.startswith("cuda"):
        found = [dataclasses.replace(cell, dtype=torch.bfloat16) for cell in found]
    return list(dict.fromkeys(found))


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Measure, print the tables and write the files, or print the README's section; returns what the JSON holds."""
    began = time.perf_counter()
    options = parse(argv)
    if options.readme:
        print(step_report.readme(*(json.loads(path.read_text()) for path in options.readme)))
        return None
    if options.rule:
        print(step_rule.table())
        return None
    device = torch.device(options.device)
    results: dict[str, Any] = {"machine": machine(device), "seconds": 0.0, "cells": []}
    for path in (options.json, options.png):
        path.parent.mkdir(parents=True, exist_ok=True)
    chosen = cells(options)
    if any(cell.compiled for cell in chosen):
        warm_compiler(device, options.backend)
    for cell in tqdm(chosen, unit="cell"):
        found = measure(cell, device, options.backend)
        tqdm.write(f"\n{step_report.table(found)}")
        results["cells"].append(found)
        results["seconds"] = time.perf_counter() - began
        options.json.write_text(json.dumps(results, indent=1))
    step_report.draw(options.png, results["cells"])
    print(f"\n{step_report.LEGEND}\n\n{step_report.overview(results['cells'])}\n\n"
          f"{step_report.machine_words(results['machine'])}. {results['seconds']:.0f} s in all. "
          f"Files are {options.json} and {options.png}.")
    return results


if __name__ == "__main__":
    main()
