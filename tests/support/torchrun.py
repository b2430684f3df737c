"""Set-ups that run in several processes: `setup` marks them, `torchrun` runs modules of them.

A set-up is a function that asserts what must hold, and may return plain data for its report. All
set-ups of some modules run one after the other in one group of gloo processes, started by torchrun,
as starting takes longer than running.
"""

import datetime
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Setup = Callable[[], Any]
SETUPS: dict[str, Setup] = {}  # of the modules that this process has imported
ROOT = Path(__file__).parents[2]


def setup(function: Setup) -> Setup:
    """Mark a function of a module of tests that torchrun is to run."""
    SETUPS[f"{function.__module__.rpartition('.')[2]}.{function.__name__}"] = function
    return function


def torchrun(modules: Sequence[str], processes: int, *names: str) -> dict[str, Any]:
    """{module.set-up: what it returned in rank 0}, in new processes.

    It runs all of these modules of tests and of those that they import, or those named.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   f"--nproc-per-node={processes}", "-m", "tests.support.torchrun",
                   ",".join(modules), str(report), *names]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                       "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        found: dict[str, Any] = json.loads(report.read_text())
    return found


def main(modules: str, report: str, *names: str) -> None:
    """Run set-ups in this process, one of the group."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    for module in modules.split(","):
        importlib.import_module(f"tests.{module}")
    results: dict[str, Any] = {}
    for name in names or list(registered()):
        print(f"[{dist.get_rank()}] {name}", file=sys.stderr, flush=True)
        torch.manual_seed(0)
        results[name] = registered()[name]()
        dist.barrier()
    if dist.get_rank() == 0:
        Path(report).write_text(json.dumps(results))
    dist.destroy_process_group()


def registered() -> dict[str, Setup]:
    """Those of this file as it is imported by the set-ups' module, not as it is run."""
    found: dict[str, Setup] = importlib.import_module("tests.support.torchrun").SETUPS
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
