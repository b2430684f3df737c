"""What it takes to switch the adapter of a live model, and to swap one for a file's.

All is about one Llama with two adapters. Beside lorafx's verbs stand PEFT's, and the copying of as
many bytes: `copy_` of each A and B of an adapter into another's.
"""

import dataclasses
import itertools
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from peft.utils.hotswap import hotswap_adapter
from torch import nn

import lorafx
from common.llama import VOCABULARY, frozen_llama
from common.timing import bootstrap, interleaved, thread_seconds
from serve_parts.contenders import Assignment, lorafx_model, peft_model
from serve_parts.run import RANK


@dataclasses.dataclass(frozen=True)
class Switching:
    """Two adapters of a Llama, in turn."""

    width: int
    layers: int
    rounds: int  # of switches
    forwards: int  # rounds of a switch and two forwards
    swaps: int
    compiled: bool = False  # by dynamo alone: what is read at each call is no backend's

    @property
    def label(self) -> str:
        """All that distinguishes the case."""
        compiled = ", compiled" if self.compiled else ""
        return f"switching, width {self.width}, {7 * self.layers} sites{compiled}"


CASES = (Switching(256, 24, 200, 30, 12), Switching(256, 4, 100, 30, 12, compiled=True))
TINY = (Switching(64, 1, 3, 3, 3, compiled=True),)
Call = Callable[[], float]  # it returns its processor time


def in_turn(names: list[str], verb: Callable[[str], Any]) -> Call:
    """A call that gives a verb one name after another, and is timed by itself."""
    turns = itertools.cycle(names)

    def call() -> float:
        name = next(turns)
        began = time.thread_time()
        verb(name)
        return time.thread_time() - began

    return call


def copied(model: nn.Module, names: list[str]) -> tuple[Callable[[str], None], int]:
    """What copies all A and B of another adapter, given its name, and how many bytes these are."""
    values = {name: [tensor.detach() for tensor in lorafx.parameters(model, name)]
              for name in names}
    place = [torch.empty_like(tensor) for tensor in values[names[0]]]

    def copy(name: str) -> None:
        for there, tensor in zip(place, values[name]):
            there.copy_(tensor)

    return copy, sum(tensor.nbytes for tensor in place)


def enter(model: nn.Module, name: str) -> None:
    """Enter a context that uses an adapter, and leave it."""
    with lorafx.using(model, name):
        pass


def swap(model: nn.Module, path: Path) -> None:
    """Put the adapter of a file in the place of the one of its name."""
    lorafx.load(model, path, path.stem, replace=True)


def after(switch: Call, forward: Callable[[], Any]) -> tuple[float, float, float]:
    """The times of a switch, of the first forward after it, and of the second."""
    switching = switch()
    times = []
    for _ in range(2):
        began = time.thread_time()
        forward()
        times.append(time.thread_time() - began)
    return switching, *times


def first_forwards(switch: Call, forward: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """What a switch takes with what the first forward after it takes more than the second."""
    for _ in range(4):
        after(switch, forward)
    found = numpy.array([after(switch, forward) for _ in range(rounds)])
    switching, first, second = found.T
    return {"more": bootstrap(lambda one, two: numpy.median(one - two, axis=-1), first, second),
            "forward": float(numpy.median(second)), "times": found.tolist()}


def percentiles(times: list[float]) -> dict[str, Any]:
    """The median and the 99th percentile."""
    half, most = numpy.percentile(times, [50, 99])
    return {"p50": float(half), "p99": float(most), "times": times}


def measure(case: Switching, rounds: int) -> dict[str, Any]:
    """All about one case, as plain data."""
    base = frozen_llama(case.width, case.layers)
    assignment = Assignment.draw(base, 2, 2, RANK)
    names = list(assignment.adapters)
    theirs: Any = peft_model(frozen_llama(case.width, case.layers), assignment).eval()
    ours = lorafx_model(base, assignment).eval()
    copy, size = copied(ours, names)
    calls = {"copy_ of its A and B": copy, "lorafx.activate": partial(lorafx.activate, ours),
             "lorafx.using": partial(enter, ours), "PEFT set_adapter": theirs.set_adapter}
    rows = interleaved({name: in_turn(names, verb) for name, verb in calls.items()},
                       rounds)
    token = torch.randint(VOCABULARY, (1, 1))
    switch = in_turn(names, partial(lorafx.activate, ours))
    model: Any = torch.compile(ours, backend="eager") if case.compiled else ours
    forward = torch.no_grad()(partial(model, token, use_cache=False))
    forwards = first_forwards(switch, forward, min(rounds, case.forwards))
    rows |= swaps(ours, theirs, names, min(rounds, case.swaps))
    return {"label": case.label, **dataclasses.asdict(case), "bytes": size, "forwards": forwards,
            "results": {name: percentiles(times) for name, times in rows.items()}}


def swaps(ours: nn.Module, theirs: Any, names: list[str], rounds: int) -> dict[str, list[float]]:
    """The times of putting a file's adapter in the place of one that is there, by contender."""
    with tempfile.TemporaryDirectory() as folder:
        file, there = Path(folder, f"{names[1]}.safetensors"), Path(folder, "peft")
        lorafx.save(ours, file, names[1])
        theirs.save_pretrained(there, selected_adapters=names[1:])
        calls = {
            "lorafx.load, replace=True": partial(swap, ours, file),
            "PEFT hotswap_adapter": partial(
                hotswap_adapter, theirs, str(there / names[1]), adapter_name=names[1],
                torch_device="cpu")}
        return interleaved({name: partial(thread_seconds, call, 1)
                            for name, call in calls.items()}, rounds)
