"""The benchmarks of speed, untimed: exact counts, wrong contenders refused, and the report."""

import json

import merge
import pytest
import step
import torch
import torch.nn.functional as F
from torch import nn

import lorafx
from common.contenders import (
    BASE, CONTENDERS, LORAFX, LORAFX_NARROW, NOISE, PATCHED, PEFT, PEFT_WIDE, compiled, draw,
    make_contender, names_for, patched)
from common.counting import Operators, held_bytes, saved
from common.models import MODELS, targets
from common.timing import interleaved, ratio, share
from merge_parts import report as merge_report
from merge_parts import run as merge_run
from step_parts import cells as step_cells
from step_parts import gate as step_gate
from step_parts import report as step_report
from step_parts import rule as step_rule
from step_parts.gate import TOLERANCE, Errors, errors, verdict
from step_parts.run import measure
from tests.support.internals import internal

CPU = torch.device("cpu")
EAGER, NARROW, COMPILED = step_cells.TINY
COUNTED = {"void", "inject_seconds", "alive_bytes", "peak_bytes", "errors", "step"}


def wrong(change):
    """The patched forward, but for a change of each layer's branch."""
    def way(base, adapters):
        model, pairs = patched(base, adapters)
        for name in pairs:
            change(model.get_submodule(name).lora)
        return model, pairs
    return way


class Doubled(torch.autograd.Function):
    """x itself, with twice the gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def doubled(lora):
    lora.A.register_forward_hook(lambda module, inputs, output: Doubled.apply(output))


def raises(base, adapters):
    raise ValueError("no such way")


WRONG = {
    "output": (wrong(lambda lora: setattr(lora, "scale", 1.9)), "its output has a relative error"),
    "gradients": (wrong(doubled), "its gradient of "),
    "a frozen A": (wrong(lambda lora: lora.A.weight.requires_grad_(False)),
                   "its gradient of an A has a relative error of nan"),
    "an error": (raises, "ValueError: no such way"),
}


@pytest.mark.parametrize("way, reason", WRONG.values(), ids=WRONG)
def test_the_gate(way, reason):
    found = measure(EAGER, CPU, methods={**CONTENDERS, PATCHED: way})["rows"]
    assert reason in found[PATCHED]["void"] and "step" not in found[PATCHED]
    assert all(not row["void"] and "step" in row for name, row in found.items() if name != PATCHED)


def test_the_gate_by_numbers():
    assert not verdict(Errors(1e-5, 9e-5, None, None), torch.float32)
    assert "gradient of a B has a relative error of 2.0e-04, above 0.0001" in verdict(
        Errors(0, 0, 0, 2e-4), torch.float32)
    assert "nan" in verdict(Errors(0, float("nan"), 0.5, 0), torch.bfloat16)
    assert not verdict(Errors(0.05, 0.01, 0.01, 0.09), torch.bfloat16)


@pytest.mark.parametrize(
    "name", [name for name in CONTENDERS if name not in (PEFT_WIDE, LORAFX_NARROW)]
)
def test_all_contenders_compute_the_same(name):
    """In float64, where nothing hides behind rounding, and to the same A and B."""
    given = step_cells.task(step_cells.Cell("tiny encoder", 2, 8, 2, "square", torch.float64), CPU)
    contender = make_contender(name, CONTENDERS[name], given.base, given.adapters)
    output = step_gate.step(contender, given.x, given.labels)
    found = step_gate.result(contender, given.x, output)
    assert list(contender.pairs) == ([] if name in (BASE, NOISE) else targets(given.base, "square"))
    assert not verdict(errors(found, given.truths[bool(contender.pairs)]), torch.float64)


def test_adapters_are_large_enough_to_be_missed():
    base = nn.Sequential(nn.Linear(300, 200))
    adapters = draw(base, ["0"], 8)
    A, B = adapters.values["0"]
    assert 0.2 < adapters.scale * (B @ A).norm() / base[0].weight.norm() < 0.5 and B.abs().min() > 0


def test_saved_bytes():
    base = nn.Sequential(nn.Linear(3, 5)).requires_grad_(False)
    x = torch.randn(7, 3, requires_grad=True)
    with saved(base) as sizes:
        base(x)
    assert sizes == {}  # a frozen layer saves its own weight alone
    model = make_contender(PATCHED, patched, base, draw(base, ["0"], 2)).model
    with saved(model) as sizes:
        output = model(x)
    assert sorted(sizes.values()) == [4 * 7 * 2, 4 * 7 * 3]  # h and x
    with saved(nn.Module()) as sizes:
        kept = output.sin(), output[1:].cos(), output.mT.exp()
    # one storage, of all views, and exp's result
    assert sorted(sizes.values()) == [4 * 7 * 5, 4 * 7 * 5] and kept


def test_operators():
    x, weight = torch.randn(7, 3, requires_grad=True), torch.randn(5, 3)
    with Operators() as operators:
        y = F.linear(x, weight)[:, 1:].mT
        torch.empty_like(y).fill_(2).add_(1)
        (y * 2).sum().backward()
    # Forward: mm, fill_, add_, mul, sum. Backward: ones_like, mul, the slice's zeros and copy, mm.
    assert operators.counts == {"mm": 2, "fill_": 1, "add_": 1, "mul": 2, "sum": 1, "ones_like": 1,
                                "slice_backward": 1}
    assert operators.total == 9


def test_held_bytes():
    def call():
        first = torch.empty(1000)
        second = torch.cat([first, first])
        del first
        return second.view(2, -1).clone().neg_()

    assert held_bytes(call, CPU) == (4 * 2000, 4 * (2000 + 2000))
    assert held_bytes(lambda: torch.empty(10).neg_(), CPU) == (40, 40)
    x = torch.randn(10, requires_grad=True)
    assert held_bytes(lambda: x.exp().sin().sum(), CPU) == (4 * 10 + 4, 4 * 20 + 4)


def test_rounds():
    seen = []

    def call(name):
        seen.append(name)
        return float(len(seen))

    times = interleaved({name: lambda name=name: call(name) for name in "abc"}, 6)
    assert "".join(seen) == "abc" "cba" "bca" "bac" "cab" "acb"
    assert times["a"] == [1, 6, 9, 11, 14, 16]


def test_statistics():
    base = [1.0, 2.0, 4.0, 1.0, 2.0, 4.0]
    assert ratio(base, base) == (1, 1, 1)
    assert ratio([3 * time for time in base], base) == (3, 3, 3)
    middle, low, high = ratio([1.0, 2.2, 5.0, 1.3, 2.2, 4.0], base)
    assert middle == pytest.approx(1.1) and 1 <= low < middle < high <= 1.3
    assert share(
        [1.2 * time for time in base], [1.4 * time for time in base], base
    ) == pytest.approx([0.5] * 3)


def test_the_cells():
    grid = step_cells.grid()
    assert {cell.model for cell in grid} == {name for name in MODELS if not name.startswith("tiny")}
    assert {cell.batch * cell.length for cell in grid} == {128, 512, 2048, 4096}
    assert len(set(grid)) == len(grid)
    assert {cell.rank for cell in grid} == {4, 16, 64}
    assert {cell.targets for cell in grid} == {"square", "linear"}
    assert {(cell.dtype, cell.compiled) for cell in grid} == {
        (dtype, graph) for dtype in (torch.float32, torch.bfloat16) for graph in (False, True)}
    assert all(cell.dtype in TOLERANCE for cell in (*grid, *step_cells.DEFAULT))
    assert (
        step_cells.DEFAULT[0].label == "MiniMind 26M, 2,048 tokens, rank 16, linear, float32, eager"
    )
    sizes = {
        name: sum(
            parameter.numel()
            for parameter in family.build(family.width, family.layers).parameters()
        )
        for name, family in MODELS.items() if name.startswith("MiniMind")
    }
    assert {name: round(size / 1e6) for name, size in sizes.items()} == {
        "MiniMind 26M": 26,
        "MiniMind 104M": 104,
    }


def test_step(tmp_path, capsys):
    paths = tmp_path / "out" / "step.json", tmp_path / "out" / "step.png"
    found = step.main(
        ["--tiny", "--backend", "aot_eager", "--json", str(paths[0]), "--png", str(paths[1])]
    )
    written = json.loads(paths[0].read_text())
    assert written["machine"].keys() >= {
        "date",
        "torch",
        "peft",
        "lorafx",
        "processor",
        "cores",
        "threads",
        "device",
    }
    assert [cell["label"] for cell in written["cells"]] == [cell.label for cell in step_cells.TINY]
    for cell, made in zip(step_cells.TINY, written["cells"]):
        assert list(made["rows"]) == names_for(cell.dtype)
        assert len(made["shares"]) == (4 if cell.dtype == torch.bfloat16 else 2)
        counted = COUNTED | (
            {"compile_seconds", "graphs", "breaks"} if cell.compiled else {"operators", "forward"}
        )
        assert all(row.keys() == counted and not row["void"] for row in made["rows"].values())
        assert all(
            len(row["step"]["times"]) == 3 == len(row["step"]["ratio"])
            for row in made["rows"].values()
        )
    assert paths[1].read_bytes().startswith(b"\x89PNG") and len(found["cells"]) == 3
    printed = capsys.readouterr().out
    assert "lorafx, dtype of the base adds " in printed and step_report.LEGEND in printed


def test_merge_and_the_readme(tmp_path, capsys):
    merged = tmp_path / "out" / "merge.json"
    found = merge.main(["--tiny", "--json", str(merged)])
    assert not any(row.get("void") for case in found["rows"] for row in case["rows"].values())
    narrow = found["rows"][1]["rows"][merge_run.LORAFX]
    assert narrow["error"] < 2 ** -8 and narrow["not_nearest"] == 0
    stepped = tmp_path / "step.json"
    cells = [measure(EAGER, CPU, methods={**CONTENDERS, PATCHED: raises}), measure(NARROW, CPU)]
    stepped.write_text(json.dumps({"machine": found["machine"], "seconds": 1.0, "cells": cells}))
    capsys.readouterr()
    assert step.main(["--readme", str(stepped), str(merged)]) is None
    printed = capsys.readouterr().out
    for part in (
        EAGER.label,
        "void",
        merge_report.tables(found["rows"]),
        merge_report.LEGEND,
        PEFT_WIDE,
        found["machine"]["date"],
    ):
        assert part in printed
    assert step.main(["--readme", str(stepped)]) is None
    assert merge_report.LEGEND not in capsys.readouterr().out


def test_a_wrong_merge_is_void():
    base = nn.Sequential(nn.Linear(30, 20))
    adapters = draw(base, ["0"], 4)
    assert (
        "a merged weight has a relative error of" in merge_run.judge(base, base, adapters)["void"]
    )
    A, B = adapters.values["0"]
    with torch.no_grad():
        right = nn.Sequential(nn.Linear(30, 20))
        right[0].weight.copy_(base[0].weight + 2 * B @ A)
    assert not merge_run.judge(right, base, adapters)["void"]


def test_the_rule(monkeypatch):
    monkeypatch.setattr(step_rule, "SIZES", (10, 12))
    monkeypatch.setattr(step_rule, "RANKS", (4,))
    kept = internal("merge_from"), internal("small_below")
    text = step_rule.table(step_rule.Timing(rounds=2, sample=0), shapes=((16, 24),))
    assert text.count("in 16, out 24") == len(step_rule.RANKS) * 4
    assert (internal("merge_from"), internal("small_below")) == kept


def test_compiled_options(monkeypatch):
    """lorafx is compiled with its own options, and the others with none."""
    given, seen = step_cells.task(COMPILED, CPU), {}
    monkeypatch.setattr(
        torch, "compile", lambda model, **options: seen.setdefault(name, options) and model
    )
    for name in (PEFT, LORAFX):
        compiled(
            make_contender(name, CONTENDERS[name], given.base, given.adapters), CPU, "inductor"
        )
    assert seen[PEFT]["options"] == {}
    assert seen[LORAFX]["options"].keys() == lorafx.compile_options().keys()
