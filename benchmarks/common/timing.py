"""Times in interleaved rounds, and ratios of them with 95 % intervals."""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy
import torch

Interval = tuple[float, float, float]  # the estimate, and the ends of its 95 % interval


def interleaved(calls: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """The times that each call returns, one a round.

    Every second round runs backwards and each pair of rounds starts elsewhere: what drifts
    meanwhile meets all calls alike, and none has always the same place or predecessor.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        for index in range(rounds):
            order = list(calls) if index % 2 == 0 else list(reversed(calls))
            start = index // 2 % len(order)
            for name in order[start:] + order[:start]:
                times[name].append(calls[name]())
            gc.collect(1)  # not what was there before
    finally:
        gc.enable()
    return times


def seconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """The time of one call, the mean of some that follow each other.

    Where one thread computes, that is its processor time, to which other processes add nothing.
    """
    if device.type == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(repeats):
            call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1000 / repeats
    clock = time.perf_counter if torch.get_num_threads() > 1 else time.thread_time
    return _mean(clock, call, repeats)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Within this, so many threads compute what an operator is asked for."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def thread_seconds(call: Callable[[], Any], repeats: int) -> float:
    """This thread's processor time of one call, the mean of some that follow each other."""
    call()  # what the others used is in the caches
    return _mean(time.thread_time, call, repeats)


def _mean(clock: Callable[[], float], call: Callable[[], Any], repeats: int) -> float:
    began = clock()
    for _ in range(repeats):
        call()
    return (clock() - began) / repeats


def bootstrap(statistic: Callable[..., Any], *samples: Sequence[float],
              draws: int = 2000) -> Interval:
    """A statistic of paired samples and its 95 % interval, by the percentile bootstrap over rounds.

    The statistic takes arrays whose last axis is that of the rounds, and gives one without it.
    Efron 1979, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7(1).
    """
    table = numpy.array(samples)  # (samples, rounds)
    chosen = numpy.random.default_rng(0).integers(0, table.shape[1], (draws, table.shape[1]))
    low, high = numpy.nanpercentile(statistic(*table[:, chosen]), [2.5, 97.5])
    return float(statistic(*table)), float(low), float(high)


def ratio(times: Sequence[float], base: Sequence[float]) -> Interval:
    """The median over rounds of times / base."""
    return bootstrap(lambda t, b: numpy.median(t / b, axis=-1), times, base)


def share(ours: Sequence[float], theirs: Sequence[float], base: Sequence[float]) -> Interval:
    """What ours adds to the base as a share of theirs: (ours / base - 1) / (theirs / base - 1)."""
    def of_medians(o: Any, t: Any, b: Any) -> Any:
        return (numpy.median(o / b, axis=-1) - 1) / (numpy.median(t / b, axis=-1) - 1)

    return bootstrap(of_medians, ours, theirs, base)


def median(times: Sequence[float]) -> float:
    """The middle time."""
    return statistics.median(times)
