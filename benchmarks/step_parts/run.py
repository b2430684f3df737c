"""How one cell of the step benchmark is measured: gate, count, and time."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from common.contenders import (
    BASE, CONTENDERS, NOISE, PAIRS, Contender, Method, compiled, make_contender, names_for)
from common.counting import Operators, held_bytes
from common.models import loss_of
from common.timing import interleaved, median, ratio, seconds, share, threads
from step_parts.cells import Cell, Task, task
from step_parts.gate import clear, errors, result, step, verdict

Row = dict[str, Any]
Times = dict[str, dict[str, list[float]]]  # {"step" or "forward": {contender: times by round}}


def warm_compiler(device: torch.device, backend: str) -> None:
    """Compile something, so that the first contender does not pay for what happens only once."""
    with fresh_cache():
        tensor = torch.ones(2, device=device, requires_grad=True)
        torch.compile(lambda x: x.sin().sum(), backend=backend)(tensor).backward()


def measure(cell: Cell, device: torch.device, backend: str = "inductor",
            methods: Mapping[str, Method] = CONTENDERS) -> dict[str, Any]:
    """All rows of a cell as plain data, and what lorafx adds to the base's time beside PEFT."""
    torch.compiler.reset()
    given = task(cell, device)
    rows: dict[str, Row] = {name: {"void": ""} for name in names_for(cell.dtype)}
    shares = []
    with threads(cell.threads):
        contenders = prepare_all(given, rows, methods, backend)
        if BASE in contenders:
            times = compare(given, contenders, rows)
            shares = [shown for pair in PAIRS if (shown := added(times, *pair))]
    dtype = str(cell.dtype).removeprefix("torch.")
    return {"label": cell.label, **dataclasses.asdict(cell), "dtype": dtype,
            "sites": len(given.adapters.values), "rows": rows, "shares": shares}


def prepare_all(given: Task, rows: Mapping[str, Row], methods: Mapping[str, Method],
                backend: str) -> dict[str, Contender]:
    """The contenders that pass the gate; if compiled, each with a cache of its own."""
    passed = {}
    with ExitStack() as caches:
        for name, row in rows.items():
            if given.cell.compiled and name != NOISE:  # it compiles what the frozen base did
                caches.close()
                caches.enter_context(fresh_cache())
            try:
                contender = prepare(given, name, methods[name], backend, row)
            except Exception as error:  # what a contender raises is a result
                row["void"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            if not row["void"]:
                passed[name] = contender
    return passed


def added(times: Times, ours: str, theirs: str) -> dict[str, Any] | None:
    """What one contender adds to the base as a share of what another adds, if both passed."""
    if not {ours, theirs} <= times["step"].keys():
        return None
    shares = {kind: share(found[ours], found[theirs], found[BASE]) for kind, found in times.items()}
    return {"ours": ours, "theirs": theirs, "added": shares,
            "step": ratio(times["step"][ours], times["step"][theirs])}


def prepare(given: Task, name: str, method: Method, backend: str, row: Row) -> Contender:
    """A contender; its row gets what is counted in one step, and why it is void if it is."""
    x = given.x
    contender = make_contender(name, method, given.base, given.adapters)
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
    row["alive_bytes"] = held_bytes(lambda: contender.model(x), x.device).after
    outputs: list[Tensor] = []
    held = held_bytes(lambda: outputs.append(counted(contender, given, row)), x.device)
    row["peak_bytes"] = held.most
    found = errors(result(contender, x, outputs.pop()), given.truths[bool(contender.pairs)])
    row["errors"] = dataclasses.asdict(found)
    row["void"] = verdict(found, given.cell.dtype)
    return contender


def counted(contender: Contender, given: Task, row: Row) -> Tensor:
    """A step: its logits. The row gets, eager, the number of operators."""
    with Operators() if not given.cell.compiled else nullcontext() as operators:
        output: Tensor = contender.model(given.x)
        loss_of(output, given.labels).backward()
    if operators is not None:
        row["operators"] = operators.total
    return output


def train_once(given: Task, contender: Contender) -> None:
    """A step, after which nothing is left but gradients."""
    clear(contender, given.x)
    step(contender, given.x, given.labels)


def infer_once(given: Task, contender: Contender) -> None:
    """A forward without gradients."""
    with torch.no_grad():
        contender.model(given.x)


def compare(given: Task, contenders: Mapping[str, Contender], rows: Mapping[str, Row]) -> Times:
    """Time the sound contenders against each other; the rows get what was found."""
    cell = given.cell
    times: Times = {}
    for kind, call, rounds in (("step", train_once, cell.rounds),
                               ("forward", infer_once, cell.forward_rounds)):
        if not rounds:
            continue
        calls = {name: partial(call, given, contender) for name, contender in contenders.items()}
        repeats, times[kind] = time_all(calls, cell, given.x.device, rounds, kind == "forward")
        for name, found in times[kind].items():
            rows[name][kind] = {"seconds": median(found), "times": found, "repeats": repeats,
                                "ratio": ratio(found, times[kind][BASE])}
    return times


def time_all(calls: Mapping[str, Callable[[], None]], cell: Cell, device: torch.device,
             rounds: int, cold: bool) -> tuple[int, dict[str, list[float]]]:
    """How often a call is repeated to last `cell.sample` seconds, and the times of all calls."""
    repeats = max(1, round(cell.sample / seconds(calls[BASE], device, 1)))
    if repeats > 1 or cell.compiled and cold:  # the gate has warmed up the rest
        for call in calls.values():
            call()
    samples = {name: partial(seconds, call, device, repeats) for name, call in calls.items()}
    return repeats, interleaved(samples, rounds)
