"""Measuring: times in interleaved rounds, ratios with intervals, and exact counts of operators and bytes."""

import datetime
import gc
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

Interval = tuple[float, float, float]  # the estimate, and the ends of its 95 % interval


def interleaved(calls: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """The times that each call returns, one a round: every second round runs backwards, each pair starts elsewhere.

    So what drifts while the rounds go on meets all alike, and none has always the same place or the same one before it.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        for index in range(rounds):
            order = list(calls) if index % 2 == 0 else list(reversed(calls))
            start = index // 2 % len(order)
            for name in order[start:] + order[:start]:
                times[name].append(calls[name]())
            gc.collect()
    finally:
        gc.enable()
        gc.unfreeze()
    return times


def seconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """The time of one call, the mean of some that follow each other."""
    if device.type == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(repeats):
            call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1000 / repeats
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats


def interval(statistic: Callable[..., float], *samples: Sequence[float], draws: int = 2000) -> Interval:
    """A statistic of paired samples and its 95 % interval, by the percentile bootstrap over rounds, seeded alike.

    Efron 1979, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7(1).
    """
    table = numpy.array(samples)  # (samples, rounds)
    chosen = numpy.random.default_rng(0).integers(0, table.shape[1], (draws, table.shape[1]))
    found = [statistic(*table[:, rounds]) for rounds in chosen]
    return (float(statistic(*table)), *map(float, numpy.nanpercentile(found, [2.5, 97.5])))


def ratio(times: Sequence[float], base: Sequence[float]) -> Interval:
    """The median over rounds of times / base."""
    return interval(lambda t, b: float(numpy.median(t / b)), times, base)


def share(ours: Sequence[float], theirs: Sequence[float], base: Sequence[float]) -> Interval:
    """What ours adds over the base, as a share of what theirs adds: (ours / base - 1) / (theirs / base - 1)."""
    return interval(lambda o, t, b: float((numpy.median(o / b) - 1) / (numpy.median(t / b) - 1)), ours, theirs, base)


def machine(device: torch.device) -> dict[str, Any]:
    """What figures depend on: the day, versions, processor, cores, threads and what else was running."""
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {"date": str(datetime.date.today()), "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "peft", "lorafx")},
            "processor": names[0] if names else platform.machine(), "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "load_before": round(os.getloadavg()[0], 2),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"}


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def median(times: Sequence[float]) -> float:
    """The middle time."""
    return statistics.median(times)


# Allocation, and one view that its schema does not call a view: operators that compute nothing.
_FREE = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided", "_unsafe_view"}


class Operators(TorchDispatchMode):
    """Counts the operators that compute: all but views, questions about a tensor, and allocation."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        returns = func._schema.returns
        if not func.is_view and name not in _FREE and any("Tensor" in str(value.type) for value in returns):
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        """All that were counted."""
        return sum(self.counts.values())


@contextmanager
def saved(model: nn.Module) -> Iterator[dict[int, int]]:
    """{address: bytes} of each distinct storage that autograd saves for backward inside, but for the model's own.

    Exact as long as what is saved lives on until the context ends, since then no address is used twice.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """The most that torch's allocator gave out at one time during a call, beyond what it had given out before.

    Exact for tensors, from the allocator's own events; what a library (oneDNN, MKL) allocates by itself is not seen.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events, found = list(profiler.profiler.kineto_results.experimental_event_tree()), []
    while events:
        event = events.pop()
        events += event.children
        if event.typed[0] == torch._C._profiler._EventType.Allocation:
            found.append((event.start_time_ns, event.typed[1].alloc_size))
    held = most = 0
    for _, size in sorted(found, key=lambda item: item[0]):
        held += size
        most = max(most, held)
    return most
