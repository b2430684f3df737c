"""How one cell of the step benchmark is measured: gate, count, and time."""

import dataclasses
import time
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from step_cells import Cell, Task, task
from step_contenders import BASE, CONTENDERS, NOISE, PAIRS, Contender, Way, compiled, contend, names_for
from step_gate import clear, errors, result, step, verdict
from step_measure import Operators, interleaved, median, peak_bytes, ratio, saved, seconds, share
from step_models import loss_of
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

Row = dict[str, Any]


def warm_compiler(device: torch.device, backend: str) -> None:
    """Compile something, so that the first contender does not pay for what the compiler does only once."""
    with fresh_cache():
        tensor = torch.ones(2, device=device, requires_grad=True)
        torch.compile(lambda x: x.sin().sum(), backend=backend)(tensor).backward()


def measure(cell: Cell, device: torch.device, backend: str = "inductor",
            ways: Mapping[str, Way] = CONTENDERS) -> dict[str, Any]:
    """All rows of a cell as plain data, and what lorafx adds to the base's time as a share of what PEFT adds."""
    torch.compiler.reset()
    given = task(cell, device)
    rows: dict[str, Row] = {name: {"void": ""} for name in names_for(cell.dtype)}
    contenders: dict[str, Contender] = {}
    with ExitStack() as caches:
        for name, row in rows.items():
            if cell.compiled and name != NOISE:  # it compiles what the frozen base did
                caches.close()
                caches.enter_context(fresh_cache())
            try:
                contenders[name] = prepare(given, name, ways[name], backend, row)
            except Exception as error:  # what a contender raises is a result
                row["void"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    timed = {name: contender for name, contender in contenders.items() if not rows[name]["void"]}
    shares = []
    if BASE in timed:
        times = compare(given, timed, rows)
        for ours, theirs in PAIRS:
            if ours in timed and theirs in timed:
                added = {kind: share(found[ours], found[theirs], found[BASE]) for kind, found in times.items()}
                over = ratio(times["step"][ours], times["step"][theirs])
                shares.append({"ours": ours, "theirs": theirs, "added": added, "step": over})
    return {"label": cell.label, **dataclasses.asdict(cell), "dtype": str(cell.dtype).removeprefix("torch."),
            "sites": len(given.adapters.values), "rows": rows, "shares": shares}


def prepare(given: Task, name: str, way: Way, backend: str, row: Row) -> Contender:
    """Make a contender, write into its row what is counted in one step, and let the gate judge what the step gave."""
    x = given.x
    contender = contend(name, way, given.base, given.adapters)
    row["inject_seconds"] = contender.seconds
    if given.cell.compiled:
        contender = compiled(contender, x.device, backend)
        counters.clear()
        clear(contender, x)
        began = time.perf_counter()
        step(contender, x, given.labels)
        row["compile_seconds"] = time.perf_counter() - began
        row["graphs"] = counters["stats"]["unique_graphs"]
        row["breaks"] = sum(counters["graph_break"].values())
    clear(contender, x)
    outputs = []
    row["peak_bytes"] = peak_bytes(lambda: outputs.append(counted(contender, given, row)), x.device)
    found = errors(result(contender, x, outputs.pop()), given.truths[bool(contender.pairs)])
    row["errors"] = dataclasses.asdict(found)
    row["void"] = verdict(found, given.cell.dtype)
    return contender


def counted(contender: Contender, given: Task, row: Row) -> Tensor:
    """A step: its logits. Writes into the row what it saves for backward and, if it is not compiled, its operators."""
    with Operators() if not given.cell.compiled else nullcontext() as operators:
        with saved(contender.model) as sizes:
            output: Tensor = contender.model(given.x)
        row["saved_bytes"] = sum(sizes.values())
        loss_of(output, given.labels).backward()
    if operators is not None:
        row["operators"] = operators.total
    return output


def compare(given: Task, contenders: Mapping[str, Contender], rows: Mapping[str, Row]) -> dict[str, Any]:
    """Time the sound contenders against each other, and write what was found into their rows; the times."""
    cell, x, labels = given.cell, given.x, given.labels

    def train(contender: Contender) -> None:
        clear(contender, x)
        step(contender, x, labels)

    def infer(contender: Contender) -> None:
        with torch.no_grad():
            contender.model(x)

    times: dict[str, Any] = {}
    for kind, call, rounds in (("step", train, cell.rounds), ("forward", infer, cell.forward_rounds)):
        once = {name: partial(call, contender) for name, contender in contenders.items()}
        if not rounds:
            continue
        repeats = max(1, round(cell.sample / seconds(once[BASE], x.device, 1)))
        if repeats > 1 or cell.compiled and kind == "forward":  # the gate has warmed up the rest
            for warm_up in once.values():
                warm_up()
        samples = {name: partial(seconds, one, x.device, repeats) for name, one in once.items()}
        times[kind] = interleaved(samples, rounds)
        for name in contenders:
            rows[name][kind] = {"seconds": median(times[kind][name]), "times": times[kind][name], "repeats": repeats,
                                "ratio": ratio(times[kind][name], times[kind][BASE])}
    return times
