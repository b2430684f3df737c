"""Training spread over processes: the same losses as in one, and what a step communicates.

A small MiniMind with an adapter at every linear layer of its blocks is brought to several processes
in each way that torch has, and by accelerate's offloading, and trained for five steps of AdamW; its
losses are compared with those of one process. Bytes are counted by the operators of torch's process
groups, in the last step and on the side of the first process: of a reduced or gathered tensor all
of it, of a sent one what is sent. The processes are gloo's, on this machine; nothing is timed.

    python benchmarks/sharded.py [--processes 4] [--only WORD ...] [--json out/sharded.json]
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common.machine import machine
from common.tables import aligned
from sharded_parts.setups import SETUPS
from sharded_parts.traffic import Kind
from sharded_parts.training import adapter_bytes


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4, help="an even number (default: 4)")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="set-ups with one of these words")
    parser.add_argument("--json", type=Path, default=Path("out/sharded.json"), metavar="FILE",
                        help="where results go")
    return parser.parse_args(argv)


def chosen(words: Sequence[str] | None) -> list[str]:
    """The names of the set-ups that have one of these words in them, or of all."""
    return [name for name in SETUPS if not words or any(word in name for word in words)]


def measure(names: Sequence[str]) -> list[dict[str, Any]]:
    """Run set-ups in this process and all others of its group: a row for each."""
    torch.set_num_threads(1)
    rows = []
    for name in names:
        setup, reference = SETUPS[name]
        losses, found = reference().losses, setup()
        differences = [abs(ours - theirs) for ours, theirs in zip(found.losses, losses)]
        rows.append({"name": name, "difference": max(differences),
                     "adapter": adapter_bytes(), **vars(found)})
    return rows


def start(options: argparse.Namespace) -> None:
    """Run this file in processes, which write the results."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc-per-node={options.processes}", __file__, "--json", str(options.json)]
    if options.only:
        command += ["--only", *options.only]
    subprocess.run(command, check=True, env={"OMP_NUM_THREADS": "1", **os.environ})


def inside(options: argparse.Namespace) -> dict[str, Any]:
    """Measure in one of the processes; the first writes and prints."""
    began = time.perf_counter()
    dist.init_process_group("gloo")
    rows = measure(chosen(options.only))
    results = {"machine": machine(torch.device("cpu")), "seconds": time.perf_counter() - began,
               "processes": dist.get_world_size(), "rows": rows}
    if dist.get_rank() == 0:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1))
        print(f"{table(results)}\n\n{LEGEND}\n{results['seconds']:.0f} s in all.")
    dist.destroy_process_group()
    return results


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the table and write the file; returns what it holds."""
    options = parse(argv)
    if dist.is_torchelastic_launched():
        return inside(options)
    start(options)
    results: dict[str, Any] = json.loads(options.json.read_text())
    return results


LEGEND = """\
loss: the largest difference to one process's in five steps (in bfloat16 to one process's that has
the same policy). Then bytes: of A and B; of a step, exchanged by the first process: gradients
reduced (FSDP1 reduces a row of all weights of a block), weights gathered, activations (and buffers,
which DDP broadcasts); of the parameters that it holds between steps, and at most in one."""


def table(results: Mapping[str, Any]) -> str:
    """A line for each set-up."""
    header = ["", "processes", "loss", "adapter", "reduced", "gathered", "activations", "held",
              "at most"]
    body = []
    for row in results["rows"]:
        moved = [f"{row['traffic'][kind.value]:,}" for kind in Kind]
        body.append([row["name"], str(row["processes"]), f"{row['difference']:.1e}",
                     f"{row['adapter']:,}", *moved, f"{row['held']:,}", f"{row['most']:,}"])
    return aligned(header, body)


def readme(results: Mapping[str, Any]) -> list[str]:
    """The section of benchmarks/README.md, from what the JSON file holds."""
    torch_version = results["machine"]["torch"].partition("+")[0]
    return [f"`benchmarks/sharded.py` trains one model with one adapter in {results['processes']} "
            "gloo processes, brought to them in each way that torch has, and by accelerate. With "
            f"torch {torch_version}, on {results['machine']['date']}:", table(results),
            " ".join(LEGEND.split())]


if __name__ == "__main__":
    main()
