"""How fast adapters are folded into weights, and that merged weights cost nothing.

The same base and the same A and B are merged by `lorafx.merge` and by PEFT's `merge_and_unload`, beside two ways of
merely copying the adapted weights: into fresh memory (clone) and into memory that is there (copy_). Bytes are those
that a merge must move at least, every adapted weight read once and written once, and GB/s is these over the time.
Both libraries are timed as they are called: lorafx.merge gives a new model, so that its time includes fresh memory and
the new modules; PEFT merges in place, in a copy that is made for each round outside of the time. A and B have each
library's default dtype. Merged weights are first compared with W + s B A in float64.

    python benchmarks/merge.py [--json FILE]
"""

import argparse
import copy
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from report import aligned
from step_contenders import Adapters, contend, draw, injected, peft_model
from step_measure import Interval, interleaved, machine, median, ratio, seconds
from step_models import MODELS, targets
from torch import Tensor, nn
from tqdm import tqdm

import lorafx

CLONE, COPY, PEFT, LORAFX = "clone", "copy_", "PEFT merge_and_unload", "lorafx.merge"
# The largest relative error of a merged weight; of bfloat16 half a unit in the last place and a little more.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 0.01}


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison; `inference` is the number of tokens on which the merged model's own speed is measured, if any.

    `sample` is the least time, in seconds, of what is timed as one: several forwards where one is shorter.
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
    for model in ("MiniMind 26M", "Llama layer, 2048") for dtype in (torch.float32, torch.bfloat16)
    for rank in (8, 64))
TINY = (Case("tiny MiniMind", 8, torch.float32, 3, 8, 0), Case("tiny encoder", 4, torch.bfloat16, 3, 8, 0))


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


def weights_of(model: nn.Module, adapters: Adapters) -> list[Tensor]:
    """The adapted layers' weights, in order."""
    return [model.get_submodule(name).weight.detach() for name in adapters.values]


def judge(merged: nn.Module, base: nn.Module, adapters: Adapters) -> dict[str, Any]:
    """The largest relative error of a merged weight, and the share of entries that are not the sum's nearest number."""
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


def measure(case: Case, device: torch.device) -> dict[str, Any]:
    """All about one case, as plain data."""
    torch.manual_seed(0)
    family = MODELS[case.model]
    base = family.build(family.width, family.layers).to(device, case.dtype).requires_grad_(False)
    adapters = draw(base, targets(base, "linear"), case.rank)
    ours = contend(LORAFX, injected, base, adapters).model
    theirs = contend(PEFT, partial(peft_model, wide=True), copy.deepcopy(base), adapters).model
    weights = weights_of(base, adapters)
    room = [torch.empty_like(weight) for weight in weights]
    moved = 2 * sum(weight.nbytes for weight in weights)

    def merge_theirs() -> float:
        fresh: Any = copy.deepcopy(theirs)
        return once(fresh.merge_and_unload, device)

    calls = {
        CLONE: partial(once, lambda: [weight.clone() for weight in weights], device),
        COPY: partial(once, lambda: [place.copy_(weight) for place, weight in zip(room, weights)], device),
        PEFT: merge_theirs,
        LORAFX: partial(once, lambda: lorafx.merge(ours), device),
    }
    judged = {LORAFX: judge(lorafx.merge(ours), base, adapters),
              PEFT: judge(copy.deepcopy(theirs).merge_and_unload(), base, adapters)}
    for call in calls.values():
        call()
    times = interleaved(calls, case.rounds)
    rows = {name: {"seconds": median(found), "rate": moved / median(found), "times": found, **judged.get(name, {})}
            for name, found in times.items()}
    return {"label": case.label, **dataclasses.asdict(case), "dtype": str(case.dtype).removeprefix("torch."),
            "bytes": moved, "rows": rows, "faster_than_peft": ratio(times[PEFT], times[LORAFX]),
            "of_clone": ratio(times[CLONE], times[LORAFX]), "of_copy": ratio(times[COPY], times[LORAFX]),
            "inference": inference(case, base, lorafx.merge(ours), device) if case.inference else None}


def inference(case: Case, base: nn.Module, merged: nn.Module, device: torch.device) -> dict[str, Interval]:
    """Forward of the merged model over the untouched base's, and of a copy of the base over it: the noise."""
    x = torch.randn(1, case.inference, MODELS[case.model].width).to(device, case.dtype)

    def forward(model: nn.Module) -> None:
        with torch.no_grad():
            model(x)

    models = {"base": base.eval(), "a copy of the base": copy.deepcopy(base), "merged": merged.eval()}
    for model in models.values():
        forward(model)
    repeats = max(1, round(case.sample / seconds(partial(forward, base), device, 1)))
    times = interleaved({name: partial(seconds, partial(forward, model), device, repeats)
                         for name, model in models.items()}, case.rounds)
    return {name: ratio(found, times["base"]) for name, found in times.items() if name != "base"}


LEGEND = """\
GB/s: each adapted weight read once and written once, over the median time. x PEFT, of clone, of copy_: medians over
rounds of ratios of speeds, with 95 % intervals. Forward is timed in the same rounds as the untouched base's."""


def shown(found: Sequence[float]) -> str:
    """An estimate and its interval: 1.23 [1.20, 1.30]."""
    return f"{found[0]:.2f} [{found[1]:.2f}, {found[2]:.2f}]"


def table(cases: Sequence[dict[str, Any]]) -> str:
    """The speeds of merging, a line for each case."""
    names = (CLONE, COPY, PEFT, LORAFX)
    body, void = [], []
    for case in cases:
        rows = case["rows"]
        body.append([case["label"], *(f"{rows[name]['rate'] / 1e9:.2f}" for name in names),
                     shown(case["faster_than_peft"]), shown(case["of_clone"]), f"{case['of_copy'][0]:.2f}"])
        void += [f"{case['label']}: {name} is void, {row['void']}" for name, row in rows.items() if row.get("void")]
    header = ["GB/s", "clone", "copy_", "PEFT", "lorafx", "x PEFT", "of clone", "of copy_"]
    return "\n".join([aligned(header, body), *void])


def rounding(cases: Sequence[dict[str, Any]]) -> str:
    """How merged weights are rounded, a line for each case in a narrow dtype."""
    return aligned(["entries not rounded to nearest", "PEFT", "lorafx"],
                   [[case["label"], *(f"{100 * case['rows'][name]['not_nearest']:.2f} %" for name in (PEFT, LORAFX))]
                    for case in cases if case["dtype"] != "float32"])


def inference_table(cases: Sequence[dict[str, Any]]) -> str:
    """The merged model's forward over the base's, a line for each case in which it was timed."""
    return aligned(["forward over the untouched base's", "a copy of the base", "merged"],
                   [[case["label"], *(f"{found[0]:.3f} [{found[1]:.3f}, {found[2]:.3f}]"
                                      for found in case["inference"].values())] for case in cases if case["inference"]])


def tables(cases: Sequence[dict[str, Any]]) -> str:
    """All three."""
    return f"{table(cases)}\n\n{rounding(cases)}\n\n{inference_table(cases)}"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the tables and write the file; returns what it holds."""
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="models too small to say anything, to try the script")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    parser.add_argument("--json", type=Path, default=Path("out/merge.json"), metavar="FILE", help="where results go")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    cases = [measure(case, device) for case in tqdm(TINY if options.tiny else DEFAULT, unit="case")]
    results = {"machine": machine(device), "seconds": time.perf_counter() - began, "rows": cases}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=1))
    print(f"{tables(cases)}\n\n{LEGEND}\n{results['seconds']:.0f} s in all.")
    return results


if __name__ == "__main__":
    main()
