"""What lorafx adapts in every architecture of the installed transformers, beside PEFT on the same model.

Each model type is built tiny from its config (tiny_models.py) with random weights and run on dummy inputs. Checked are

    identity          the output before training is the frozen original's, bit for bit, in eval and in train mode;
    no silent layer   an adapter alone, with a random B, changes the output, and B gets a gradient that is not zero;
    none unnamed      a linear layer without an adapter is named by `lorafx.summary(model).skipped`.

A weight counts as unused, and never as silent or unnamed, if the output stays the same when the weight itself is moved
by what the adapter adds to it, s B A; a gradient may be zero where that of the weight itself is.

    python benchmarks/coverage.py [--only NAME ...] [--out FILE] [--seconds-per-model 20] [--jobs 2]
"""

import argparse
import copy
import dataclasses
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from checks import Adapted, check_lorafx, check_peft, outputs, randomise, same
from report import aligned
from tiny_models import NoModel, architectures, tiny
from tqdm import tqdm

import lorafx

VERSIONS = ("torch", "transformers", "peft", "lorafx")


@dataclasses.dataclass
class Row:
    """One architecture. `stage`: "no class", "not built", "built" or "run"; `reason` says why it went no further."""

    name: str
    stage: str = "not built"
    reason: str = ""
    size: str = ""
    inputs: str = ""
    parameters: int = 0
    modes: list[str] = dataclasses.field(default_factory=list)
    lorafx: Adapted = dataclasses.field(default_factory=Adapted)
    peft: Adapted = dataclasses.field(default_factory=Adapted)
    seconds: float = 0.0

    def note(self) -> str:
        """What the numbers do not say."""
        said = [f"not run: {self.reason}"[:90]] if self.stage == "built" else []
        said += [self.reason] if self.stage == "run" and self.reason else []
        said += [f"{name} raised" for name, found in (("lorafx", self.lorafx), ("PEFT", self.peft)) if found.error]
        said += [self.size] if self.size != "tiny" else []
        return "; ".join(said)


class TimeLimit(BaseException):
    """A model took longer than it may. No Exception, lest a library's own handler swallows it."""


def examine(row: Row) -> None:
    """Fill in a row. What transformers, lorafx or PEFT raise is a result."""
    try:
        example = tiny(row.name)
    except NoModel as error:
        row.stage, row.reason = "no class", str(error)
        return
    except Exception as error:
        row.reason = sentence(error)
        return
    row.stage, row.size, row.inputs, row.reason = "built", example.size, example.how, example.reason
    base, inputs = example.model, example.inputs
    row.parameters = sum(parameter.numel() for parameter in base.parameters())
    randomise(base)
    if inputs is not None:
        row.stage = "run"
        for mode in ("eval", "train"):
            try:
                if same(*(outputs(copy.deepcopy(base), inputs, mode) for _ in range(2))):
                    row.modes.append(mode)
                else:
                    row.reason = f"stochastic in {mode} mode"
            except Exception as error:
                row.reason = f"in {mode} mode {sentence(error)}"
    for check, found in ((check_lorafx, row.lorafx), (check_peft, row.peft)):
        try:
            check(copy.deepcopy(base), inputs, row.modes, found)
            found.finished = True
        except Exception as error:
            found.error = sentence(error)


def sentence(error: BaseException) -> str:
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def child(row: Row, seconds: float, connection: Connection) -> None:
    """Examine one model in a process of its own, silently, and send the row."""
    def stop(*_: Any) -> None:
        raise TimeLimit(f"more than {seconds:g} s of processor time")

    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    warnings.simplefilter("ignore")
    began = time.perf_counter()
    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds, 1)  # and again: one in a finaliser is lost
    try:
        examine(row)
    except (TimeLimit, Exception) as error:
        row.reason = sentence(error)
    signal.setitimer(signal.ITIMER_PROF, 0)
    row.seconds = time.perf_counter() - began
    connection.send(row)


def examine_all(names: Sequence[str], seconds: float, jobs: int) -> list[Row]:
    """The rows of all models, each examined in a process forked for it, `jobs` at a time."""
    context = multiprocessing.get_context("fork")
    waiting, running, rows = list(reversed(names)), {}, []
    with tqdm(total=len(names), unit="model") as progress:
        while waiting or running:
            while waiting and len(running) < jobs:
                row = Row(waiting.pop())
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=child, args=(row, seconds, sender))
                process.start()
                sender.close()
                running[receiver] = row, process, time.perf_counter()
            ready = wait(list(running), timeout=1)
            late = [connection for connection, (_, _, began) in running.items()
                    if time.perf_counter() - began > 6 * seconds + 10 and connection not in ready]
            for connection in (*ready, *late):
                row, process, _ = running.pop(connection)
                if connection in late:
                    process.kill()
                try:
                    row = connection.recv()
                except EOFError:
                    process.join()
                    row.reason = f"its process ended with code {process.exitcode}"
                process.join()
                rows.append(row)
                progress.update()
    return sorted(rows, key=lambda row: row.name)


def table(rows: Sequence[Row]) -> str:
    """A line for each architecture that was built."""
    header = ["architecture", "sites", "adapted", "skipped", "regions", "breaks", "unused", "identity", "no silent",
              "PEFT: layers", "unused", "identity", "no silent", "s", "note"]
    body = []
    for row in rows:
        if row.stage in ("built", "run"):
            own, other = row.lorafx, row.peft
            body.append([row.name, shown(own.sites), shown(own.layers), str(len(own.skipped)), shown(own.regions),
                         str(len(own.breaks)), str(len(own.unused)), verdict(own.identical()), verdict(own.no_silent()),
                         shown(other.layers), str(len(other.unused)), verdict(other.identical()),
                         verdict(other.no_silent()), f"{row.seconds:.1f}", row.note()])
    return aligned(header, body)


def shown(count: int | None) -> str:
    """A number, or what stands for none."""
    return "-" if count is None else str(count)


def verdict(passed: bool | None) -> str:
    """pass, FAIL, or what stands for neither."""
    return {None: "-", True: "pass", False: "FAIL"}[passed]


def summary(rows: Sequence[Row]) -> str:
    """The numbers of architectures that came how far and passed what, and each failure in one line."""
    built = [row for row in rows if row.stage in ("built", "run")]
    run = [row for row in rows if row.stage == "run"]
    lines = [f"{len(rows):5} architectures have a config in transformers",
             f"{sum(row.stage == 'no class' for row in rows):5} of them are parts that no Auto class makes a model of",
             f"{len(built):5} built, {sum(row.size != 'tiny' for row in built)} of them less small than the others",
             f"{len(run):5} run", ""]
    counted = []
    for library in ("lorafx", "peft"):
        found = [getattr(row, library) for row in run]
        counted.append([
            {"lorafx": "lorafx", "peft": "PEFT"}[library],
            str(sum(getattr(row, library).layers or 0 for row in built)), str(sum(one.layers or 0 for one in found)),
            str(sum(bool(one.error) for one in found)), of(one.identical() for one in found),
            of(one.no_silent() for one in found), str(sum(len(one.silent) for one in found)),
            str(sum(len(one.unused) for one in found))])
    lines += [aligned(["", "adapted: of built", "of run", "raised", "identity", "no silent layer", "silent layers",
                       "unused layers"], counted), ""]
    for library, title in (("lorafx", "lorafx"), ("peft", "PEFT")):
        failed = [(row.name, problem) for row in built for problem in getattr(row, library).problems()]
        lines += [f"{title} failed on {len({name for name, _ in failed})} architectures:",
                  *(f"  {name}: {problem}" for name, problem in failed), ""]
    late = [f"  {row.name}: {name}" for row in built for name, found in (("lorafx", row.lorafx), ("PEFT", row.peft))
            if not found.finished and not found.error]
    lines += ["not all checks made within the time limit:", *late, ""]
    for stage, title in (("built", "built, not run"), ("not built", "not built")):
        lines += [f"{title}:", *(f"  {row.name}: {row.reason}" for row in rows if row.stage == stage), ""]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in VERSIONS)
    return "\n".join([*lines, f"{versions}; {datetime.date.today()}"])


def of(verdicts: Iterable[bool | None]) -> str:
    """How many passed, of those that were found out."""
    known = [passed for passed in verdicts if passed is not None]
    return f"{sum(known)} of {len(known)}"


def injection_time(rounds: int = 3) -> str:
    """The least of some times that either library takes for a Llama of 24 layers of 2048 on the meta device."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            hidden_size=2048, intermediate_size=5632, num_hidden_layers=24, num_attention_heads=16))
    config = peft.LoraConfig(target_modules="all-linear")
    times: dict[str, list[float]] = {"lorafx": [], "PEFT": []}
    for _ in range(rounds):
        for name, adapt in (("lorafx", lambda m: lorafx.inject(m, targets="linear")),
                            ("PEFT", lambda m: peft.get_peft_model(m, config))):
            fresh = copy.deepcopy(model)
            began = time.perf_counter()
            adapt(fresh)
            times[name].append(time.perf_counter() - began)
    ours, theirs = min(times["lorafx"]), min(times["PEFT"])
    return (f"Llama of 24 layers of 2048 on meta tensors takes lorafx {ours:.2f} s and PEFT {theirs:.2f} s to inject: "
            f"{ours / theirs:.2f} of its time")


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Examine, print the tables; returns the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these model types, and no others")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rows to this file too, as JSON")
    parser.add_argument("--seconds-per-model", type=float, default=20.0, metavar="S",
                        help="of processor time; more is given up")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="models at a time, in a process each")
    options = parser.parse_args(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    known = architectures()
    unknown = set(options.only or ()) - set(known)
    if unknown:
        parser.error(f"transformers has no config for {', '.join(sorted(unknown))}")
    rows = examine_all(options.only or known, options.seconds_per_model, options.jobs)
    print(table(rows))
    print()
    print(summary(rows))
    print(f"\nA {injection_time()}")
    if options.out is not None:
        options.out.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    return rows


if __name__ == "__main__":
    main()
