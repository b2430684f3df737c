"""How one case of the merge benchmark is measured: judge, time, and time what was merged."""

import copy
import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import lorafx
from common.contenders import Adapters, draw, injected, make_contender, peft_wide
from common.models import MODELS, targets
from common.timing import Interval, interleaved, median, ratio, seconds

CLONE, COPY, PEFT, LORAFX = "clone", "copy_", "PEFT merge_and_unload", "lorafx.merge"
# The largest relative error of a merged weight; of bfloat16 half a unit in the last place and more.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 0.01}


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison; with `inference` tokens, the merged model's own speed is measured on them.

    `sample` is the least time, in seconds, of what is timed as one: several forwards where one is
    shorter.
    """

    model: str
    rank: int
    dtype: torch.dtype
    rounds: int = 15
    inference: int = 0
    sample: float = 0.1

    @property
    def label(self) -> str:
        """All that distinguishes the case."""
        return f"{self.model}, {str(self.dtype).removeprefix('torch.')}, rank {self.rank}"


DEFAULT = tuple(
    Case(model, rank, dtype, inference=256 if rank == 8 else 0)
    for model in ("MiniMind 26M", "Llama layer, 2048")
    for dtype in (torch.float32, torch.bfloat16)
    for rank in (8, 64))
TINY = (Case("tiny MiniMind", 8, torch.float32, 3, 8, 0),
        Case("tiny encoder", 4, torch.bfloat16, 3, 8, 0))


def once(call: Callable[[], Any], device: torch.device) -> float:
    """The seconds that a call takes; what it returns is freed outside of the time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    kept = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    taken = time.perf_counter() - began
    del kept
    return taken


def judge(merged: nn.Module, base: nn.Module, adapters: Adapters) -> dict[str, Any]:
    """The largest relative error of a merged weight, and the share of entries rounded wrongly."""
    worst, wrong, entries = 0.0, 0, 0
    for name, (A, B) in adapters.values.items():
        weight, found = base.get_submodule(name).weight, merged.get_submodule(name).weight
        true = weight.double() + adapters.scale * (B.double() @ A.double())  # (out, in)
        error = ((found.double() - true).norm() / true.norm()).item()
        worst = error if not error <= worst else worst
        wrong += int((found != true.to(weight.dtype)).sum())
        entries += weight.numel()
    passed = worst <= TOLERANCE[weight.dtype]
    return {"error": worst, "not_nearest": wrong / entries,
            "void": "" if passed else f"a merged weight has a relative error of {worst:.1e}"}


def merged_by_peft(adapted: Any) -> nn.Module:
    """What PEFT merges in place, in a copy."""
    return copy.deepcopy(adapted).merge_and_unload()


def time_peft(adapted: nn.Module, device: torch.device) -> float:
    """The seconds that PEFT takes to merge; the copy is made outside of the time."""
    fresh: Any = copy.deepcopy(adapted)
    return once(fresh.merge_and_unload, device)


def clone_all(weights: list[Tensor]) -> list[Tensor]:
    """Copies in fresh memory."""
    return [weight.clone() for weight in weights]


def copy_all(weights: list[Tensor], places: list[Tensor]) -> None:
    """Copies in memory that is there."""
    for place, weight in zip(places, weights):
        place.copy_(weight)


def measure(case: Case, device: torch.device) -> dict[str, Any]:
    """All about one case, as plain data."""
    torch.manual_seed(0)
    family = MODELS[case.model]
    base = family.build(family.width, family.layers).to(device, case.dtype).requires_grad_(False)
    adapters = draw(base, targets(base, "linear"), case.rank)
    ours = make_contender(LORAFX, injected, base, adapters).model
    theirs = make_contender(PEFT, peft_wide, copy.deepcopy(base), adapters).model
    weights = [base.get_submodule(name).weight.detach() for name in adapters.values]
    places = [torch.empty_like(weight) for weight in weights]
    moved = 2 * sum(weight.nbytes for weight in weights)
    calls = {
        CLONE: partial(once, partial(clone_all, weights), device),
        COPY: partial(once, partial(copy_all, weights, places), device),
        PEFT: partial(time_peft, theirs, device),
        LORAFX: partial(once, partial(lorafx.merge, ours), device),
    }
    judged = {LORAFX: judge(lorafx.merge(ours), base, adapters),
              PEFT: judge(merged_by_peft(theirs), base, adapters)}
    for call in calls.values():
        call()
    times = interleaved(calls, case.rounds)
    rows = {}
    for name, found in times.items():
        rows[name] = {"seconds": median(found), "rate": moved / median(found), "times": found,
                      **judged.get(name, {})}
    dtype = str(case.dtype).removeprefix("torch.")
    return {"label": case.label, **dataclasses.asdict(case), "dtype": dtype, "bytes": moved,
            "rows": rows, "faster_than_peft": ratio(times[PEFT], times[LORAFX]),
            "of_clone": ratio(times[CLONE], times[LORAFX]),
            "of_copy": ratio(times[COPY], times[LORAFX]),
            "inference": inference(case, base, lorafx.merge(ours), device)}


def forward(model: nn.Module, x: Tensor) -> None:
    """A forward without gradients."""
    with torch.no_grad():
        model(x)


def inference(case: Case, base: nn.Module, merged: nn.Module,
              device: torch.device) -> dict[str, Interval] | None:
    """Forward of the merged model over the base's, and of a copy of the base over it: the noise."""
    if not case.inference:
        return None
    x = torch.randn(1, case.inference, MODELS[case.model].width).to(device, case.dtype)
    models = {"base": base.eval(), "a copy of the base": copy.deepcopy(base),
              "merged": merged.eval()}
    calls = {name: partial(forward, model, x) for name, model in models.items()}
    for call in calls.values():
        call()
    repeats = max(1, round(case.sample / seconds(calls["base"], device, 1)))
    samples = {name: partial(seconds, call, device, repeats) for name, call in calls.items()}
    times = interleaved(samples, case.rounds)
    return {name: ratio(times[name], times["base"]) for name in ("a copy of the base", "merged")}
