"""What lorafx adapts in every architecture of the installed transformers, beside PEFT.

Each model type is built tiny from its config (coverage_parts/models.py) with random weights and run
on dummy inputs. Checked are

    identity          the output before training is the frozen original's, bit for bit, in eval and
                      in train mode;
    no silent layer   an adapter alone, with a random B, changes the output, and B gets a gradient
                      that is not zero;
    none unnamed      a linear layer without an adapter is named by `lorafx.summary(model).skipped`.

A weight counts as unused, and never as silent or unnamed, if the output stays the same when the
weight itself is moved by what the adapter adds to it, s B A; a gradient may be zero where that of
the weight itself is.

    python benchmarks/coverage.py [--only NAME ...] [--out FILE] [--seconds-per-model 20] [--jobs 2]
"""

import argparse
import copy
import dataclasses
import datetime
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import lorafx
from coverage_parts.models import architectures
from coverage_parts.processes import examine_all
from coverage_parts.report import summary, table, versions
from coverage_parts.rows import Row


def injection_time(rounds: int = 3) -> str:
    """The least of some times to inject into a Llama of 24 layers of 2048, on the meta device."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            hidden_size=2048, intermediate_size=5632, num_hidden_layers=24,
            num_attention_heads=16))
    config = peft.LoraConfig(target_modules="all-linear")
    libraries: dict[str, Callable[[Any], Any]] = {
        "lorafx": lambda fresh: lorafx.inject(fresh, targets="linear"),
        "PEFT": lambda fresh: peft.get_peft_model(fresh, config)}
    times: dict[str, list[float]] = {name: [] for name in libraries}
    for _ in range(rounds):
        for name, adapt in libraries.items():
            fresh = copy.deepcopy(model)
            began = time.perf_counter()
            adapt(fresh)
            times[name].append(time.perf_counter() - began)
    ours, theirs = min(times["lorafx"]), min(times["PEFT"])
    return (f"Llama of 24 layers of 2048 on meta tensors takes lorafx {ours:.2f} s and PEFT "
            f"{theirs:.2f} s to inject: {ours / theirs:.2f} of its time")


def parse(argv: Sequence[str] | None, known: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME",
                        help="these model types, and no others")
    parser.add_argument("--out", type=Path, metavar="FILE",
                        help="write the rows to this file too, as JSON")
    parser.add_argument("--seconds-per-model", type=float, default=20.0, metavar="S",
                        help="of processor time; more is given up")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(),
                        help="models at a time, in a process each")
    options = parser.parse_args(argv)
    unknown = set(options.only or ()) - set(known)
    if unknown:
        parser.error(f"transformers has no config for {', '.join(sorted(unknown))}")
    return options


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Examine, print the tables; returns the rows."""
    began = time.perf_counter()
    known = architectures()
    options = parse(argv, known)
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    rows = examine_all(options.only or known, options.seconds_per_model, options.jobs)
    seconds = time.perf_counter() - began
    print(f"{table(rows)}\n\n{summary(rows)}\n\nA {injection_time()}")
    if options.out is not None:
        results = {"date": str(datetime.date.today()), "versions": versions(), "seconds": seconds,
                   "rows": [dataclasses.asdict(row) for row in rows]}
        options.out.write_text(json.dumps(results, indent=1))
    return rows


if __name__ == "__main__":
    main()
