"""Set-ups that run in several processes: `setup` marks them, `torchrun` runs modules of them.

A set-up is a function that asserts what must hold, and may return plain data for its report. All
set-ups of some modules run one after the other in one group of gloo processes, which are given what
torch's own torchrun gives its processes. They are forked from one process that has imported all
modules of set-ups and has done nothing else, as importing takes longer than running.
"""

import datetime
import gc
import importlib
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.internals import replace_internal

Setup = Callable[[], Any]
SETUPS: dict[str, dict[str, Setup]] = {}  # {module: {name: set-up}}, as far as they are imported
ROOT = Path(__file__).parents[2]
FORKS = multiprocessing.get_context("forkserver")


def setup(function: Setup) -> Setup:
    """Mark a function of a module of tests that torchrun is to run."""
    SETUPS.setdefault(function.__module__.removeprefix("tests."), {})[function.__name__] = function
    return function


def torchrun(modules: Sequence[str], processes: int, *names: str) -> dict[str, Any]:
    """{module.set-up: what it returned in rank 0}, in new processes.

    It runs all set-ups of these modules of tests, or those named.
    """
    start_server()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        environment = dict(os.environ) | {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
            "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
            "TORCHELASTIC_RUN_ID": "tests", "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_USE_AGENT_STORE": "True"}
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        group = [FORKS.Process(target=main, args=(folder, environment | rank, modules, names),
                               daemon=True) for rank in ranks]
        for process in group:
            process.start()
        ended = [process.exitcode for process in all_ended(group)]
        assert not any(ended), "".join(path.read_text() for path in sorted(folder.glob("*.log")))
        found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def start_server() -> None:
    """Start, once, the process that is forked."""
    folder = ROOT / "tests" / "sharded"
    modules = [f"tests.sharded.{path.stem}" for path in folder.glob("[!_]*.py")]
    FORKS.set_forkserver_preload([
        *(module for module in modules if ".test_" not in module), "tests.benchmarks.in_processes"])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                            "PYTHONPATH": str(ROOT)}.items():
            patch.setenv(name, value)
        forkserver.ensure_running()


def all_ended(group: Sequence[Any]) -> Sequence[Any]:
    """Processes, at the end of the last; where one fails, the others are killed."""
    running = {process.sentinel: process for process in group}
    while running:
        for sentinel in connection.wait(list(running)):
            ended = running.pop(sentinel)
            ended.join()
            if ended.exitcode:
                for process in running.values():
                    process.kill()
    return group


def main(folder: Path, environment: dict[str, str], modules: Sequence[str],
         names: Sequence[str]) -> None:
    """Run set-ups in this process, one of the group."""
    log = os.open(folder / f"{environment['RANK']}.log", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ.update(environment)
    os.chdir(ROOT)
    gc.freeze()  # what the server imported
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    results: dict[str, Any] = {}
    replace_internal(pytest.MonkeyPatch(), "kept_below", 0)
    for name, function in chosen(modules, names).items():
        print(f"[{dist.get_rank()}] {name}", file=sys.stderr, flush=True)
        torch.manual_seed(0)
        results[name] = function()
        dist.barrier()
    if dist.get_rank() == 0:
        (folder / "report.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def chosen(modules: Sequence[str], names: Sequence[str]) -> dict[str, Setup]:
    """{module.set-up: it} of these modules, all or those named."""
    found: dict[str, Setup] = {}
    for module in modules:
        importlib.import_module(f"tests.{module}")
        short = module.rpartition(".")[2]
        found |= {f"{short}.{name}": function for name, function in SETUPS[module].items()}
    return {name: found[name] for name in names or found}
