"""How fast adapters are folded into weights, and that merged weights cost nothing.

The same base and the same A and B are merged by `lorafx.merge` and by PEFT's `merge_and_unload`,
beside two ways of merely copying the adapted weights: into fresh memory (clone) and into memory
that is there (copy_). Bytes are those that a merge must move at least, every adapted weight read
once and written once, and GB/s is these over the time. Both libraries are timed as they are called:
lorafx.merge gives a new model, so that its time includes fresh memory and the new modules; PEFT
merges in place, in a copy that is made for each round outside of the time. A and B have each
library's default dtype. Merged weights are first compared with W + s B A in float64.

    python benchmarks/merge.py [--json FILE]
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from common.machine import machine
from common.progress import progress
from merge_parts.report import LEGEND, tables
from merge_parts.run import DEFAULT, TINY, measure


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true",
                        help="models too small to say anything, to try the script")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="where to run")
    parser.add_argument("--json", type=Path, default=Path("out/merge.json"), metavar="FILE",
                        help="where results go")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the tables and write the file; returns what it holds."""
    began = time.perf_counter()
    options = parse(argv)
    device = torch.device(options.device)
    cases = progress(TINY if options.tiny else DEFAULT, unit="case")
    rows = [measure(case, device) for case in cases]
    results = {"machine": machine(device), "seconds": time.perf_counter() - began, "rows": rows}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=1))
    print(f"{tables(rows)}\n\n{LEGEND}\n{results['seconds']:.0f} s in all.")
    return results


if __name__ == "__main__":
    main()
