"""Batches whose rows use adapters of their own: in decoding, in a prompt, and in training.

Contenders are the frozen base, PEFT's `adapter_names`, a loop that activates one adapter of lorafx
after another and takes its rows through the model, and `lorafx.rows`, all rows at once: of one
base, a Llama of transformers with six layers, all linear layers adapted, or one linear layer. The
adapters, of rank 8, go round the rows. First each one's results are compared with those of the base
with W + s B A of each row in float64, or its row is void. A training step of eight adapters is
compared with lorafx's of one on as many tokens, after each adapter's gradients with those of its
own rows alone. All are timed in interleaved rounds, in one thread, by its processor time.

    python benchmarks/serve.py [--only WORD ...] [--rounds N] [--json FILE]
    python benchmarks/serve.py --rule
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import common.openmp  # noqa: F401 (before torch)
import torch

from common.contenders import BASE, LORAFX, PEFT
from common.machine import in_words, machine
from common.progress import progress
from common.tables import aligned, interval
from serve_parts import rule, run, training
from serve_parts.contenders import LOOP
from serve_parts.training import ONE

LEGEND = """\
Milliseconds are the least over rounds. PEFT / and loop / are medians over rounds of their time over
lorafx's, / base of lorafx's over the frozen base's, with 95 % intervals."""


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


def serving_table(cases: Sequence[Mapping[str, Any]]) -> str:
    """A line for each batch that is served."""
    body, void = [], []
    for case in cases:
        rows, faster = case["rows"], case["faster"]
        least = [f"{1000 * rows[name]['least']:.2f}" for name in (BASE, PEFT, LOOP, LORAFX)]
        body.append([case["label"], *least, interval(faster[PEFT], 2), interval(faster[LOOP], 2),
                     interval(case["over_base"], 2)])
        for name, row in rows.items():
            if row["void"]:
                void.append(f"{case['label']}: {name} is void, {row['void']}")
    header = ["ms", "base", "PEFT", "loop", "lorafx", "PEFT /", "loop /", "/ base"]
    return "\n".join([aligned(header, body), *void])


def training_table(cases: Sequence[Mapping[str, Any]]) -> str:
    """A line for each training step."""
    body, void = [], []
    for case in cases:
        least = [f"{1000 * case['rows'][name]['least']:.1f}" for name in (ONE, LORAFX)]
        body.append([case["label"], *least, interval(case["over_one"], 2)])
        if case["void"]:
            void.append(f"{case['label']} is void, {case['void']}")
    return "\n".join([aligned(["ms", "one adapter", "all", "all / one"], body), *void])


def readme(results: Mapping[str, Any]) -> list[str]:
    """The section of benchmarks/README.md, from what the JSON file holds."""
    return [
        "`benchmarks/serve.py` takes the rows of a batch through adapters of their own: one token "
        "after 32 others, a prompt, one layer by itself, a training step. "
        f"{in_words(results['machine'], 'peft')}, in one thread, in {results['seconds']:.0f} s:",
        serving_table(results["serving"]), " ".join(LEGEND.split()),
        training_table(results["training"])]


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Measure, print the tables and write the file; returns what it holds."""
    began, options = time.perf_counter(), parse(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if options.rule:
            print(rule.table())
            return None
        results: dict[str, Any] = {"machine": machine(torch.device("cpu"))}
        for kind, cases, measure in (
                ("serving", run.TINY if options.tiny else run.grid(), run.measure),
                ("training", training.TINY if options.tiny else training.CASES, training.measure)):
            chosen = [case for case in cases if all(word in case.label for word in options.only)]
            results[kind] = [measure(case, options.rounds or case.rounds)
                             for case in progress(chosen, unit="case")]
        results["seconds"] = time.perf_counter() - began
    finally:
        torch.set_num_threads(threads)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=1))
    print(f"{serving_table(results['serving'])}\n\n{training_table(results['training'])}\n\n"
          f"{LEGEND}\n{results['seconds']:.0f} s in all.")
    return results


if __name__ == "__main__":
    main()
