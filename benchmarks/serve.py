"""Adapters that are served: rows of a batch with adapters of their own, and the verbs that switch.

Contenders are the frozen base, PEFT's `adapter_names`, a loop that activates one adapter of lorafx
after another and takes its rows through the model, and `lorafx.rows`, all rows at once: of one
base, a Llama of transformers with six layers, all linear layers adapted, or one linear layer. The
adapters, of rank 8, go round the rows. First each one's results are compared with those of the base
with W + s B A of each row in float64, or its row is void. Base, one adapter and rows are compared
with themselves, compiled. A training step of eight adapters is compared with lorafx's of one on as
many tokens, after each adapter's gradients with those of its own rows alone. Of a Llama with 168
sites it is timed how long it takes to switch the adapter, and to swap it for a file's, beside PEFT
and beside the copying of as many bytes. All are timed in interleaved rounds, in one thread, by its
processor time.

    python benchmarks/serve.py [--only WORD ...] [--rounds N] [--json FILE]
    python benchmarks/serve.py --rule
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common.openmp  # noqa: F401 (before torch)
import torch

from common.machine import machine
from common.progress import progress
from common.timing import threads
from serve_parts import compiled, report, rule, run, switching, training

# {kind of case: what it is measured by}
MEASURES = {"switching": switching, "serving": run, "compiled": compiled, "training": training}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--tiny", action="store_true",
                        help="models too small to say anything, to try the script")
    chosen.add_argument("--rule", action="store_true",
                        help="instead, time which form of the kernel is faster at which shapes")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD",
                        help="cases whose label has all of these")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds of each case")
    parser.add_argument("--json", type=Path, default=Path("out/serve.json"), metavar="FILE",
                        help="where results go")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Measure, print the tables and write the file; returns what it holds."""
    began, options = time.perf_counter(), parse(argv)
    with threads(1):
        if options.rule:
            print(rule.table())
            return None
        results: dict[str, Any] = {"machine": machine(torch.device("cpu"))}
        for kind, module in MEASURES.items():
            cases = module.TINY if options.tiny else module.CASES
            chosen = [case for case in cases if all(word in case.label for word in options.only)]
            results[kind] = [module.measure(case, options.rounds or case.rounds)
                             for case in progress(chosen, unit="case")]
        results["seconds"] = time.perf_counter() - began
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=1))
    for kind, (table, legend) in report.TABLES.items():
        print(f"{table(results[kind])}\n{legend}\n")
    print(f"{results['seconds']:.0f} s in all.")
    return results


if __name__ == "__main__":
    main()
