"""What LoRA adds to a forward pass without gradients: one token after others, and many at once.

Contenders are the frozen base, the same again (the noise floor), PEFT, lorafx, and lorafx merged:
of one base, a Llama of transformers with six layers, all linear layers adapted with the same A and
B, in one process. Decoding is one token after 32 others, with their cache; prefill is 512 tokens;
`layer` is one linear layer by itself, of one token. First each one's logits are compared with those
of the base with W + s B A in float64, or its row is void. Then all are timed in interleaved rounds,
in one thread.

    python benchmarks/decode.py [--rounds N] [--json FILE]
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import common.openmp  # noqa: F401 (before torch)
import torch

from common.machine import in_words, machine
from common.progress import progress
from common.tables import aligned, interval
from common.timing import threads
from decode_parts.run import BASE, CASES, LORAFX, MERGED, NOISE, PEFT, TINY, measure

LEGEND = """\
Milliseconds of the base are the least, and medians are over rounds; what others add to it is the
median of differences in one round. Of PEFT's: what lorafx adds as a share of what PEFT adds, from
medians, with its 95 % interval, and from the least times."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true",
                        help="a model too small to say anything, to try the script")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds of each case")
    parser.add_argument("--json", type=Path, default=Path("out/decode.json"), metavar="FILE",
                        help="where results go")
    return parser.parse_args(argv)


def table(cases: Sequence[Mapping[str, Any]]) -> str:
    """A line for each case."""
    body, void = [], []
    for case in cases:
        rows, base = case["rows"], case["rows"][BASE]
        added = [f"{1000 * rows[name]['added']:+.2f}" for name in (NOISE, PEFT, LORAFX, MERGED)]
        body.append([case["label"], f"{1000 * base['least']:.2f}", f"{1000 * base['median']:.2f}",
                     *added, interval(case["share"], 2), f"{case['share_of_least']:.2f}"])
        for name, row in rows.items():
            if row["void"]:
                void.append(f"{case['label']}: {name} is void, {row['void']}")
    header = ["ms", "base", "median", "again", "PEFT", "lorafx", "merged", "of PEFT's", "least"]
    return "\n".join([aligned(header, body), *void])


def readme(results: Mapping[str, Any]) -> list[str]:
    """The section of benchmarks/README.md, from what the JSON file holds."""
    return [
        "`benchmarks/decode.py` times forward passes without gradients of a Llama of transformers: "
        "one token after 32 others, 512 tokens at once, one layer by itself. "
        f"{in_words(results['machine'], 'peft')}, in one thread, in {results['seconds']:.0f} s:",
        table(results["cases"]), " ".join(LEGEND.split())]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the table and write the file; returns what it holds."""
    began, options = time.perf_counter(), parse(argv)
    with threads(1):
        cases = progress(TINY if options.tiny else CASES, unit="case")
        found = [measure(case, options.rounds or case.rounds) for case in cases]
        results = {"machine": machine(torch.device("cpu")),
                   "seconds": time.perf_counter() - began, "cases": found}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=1))
    print(f"{table(found)}\n\n{LEGEND}\n{results['seconds']:.0f} s in all.")
    return results


if __name__ == "__main__":
    main()
