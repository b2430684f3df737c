"""Linear calls on one value are computed together in what the compiler captures."""

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F

import lorafx
from lorafx._kernels.compiled import HALF
from lorafx._model import inductor
from tests.support.grouped_models import X, Attention, Gated, Python, in_place_on_x
from tests.support.internals import replace_internal
from tests.support.oracle import randomise


class Captured:
    """A backend that shows what the pass made of a graph, and runs it."""

    def __init__(self):
        self.targets = []

    def __call__(self, graph_module, inputs):
        inductor.JoinBranches()(graph_module.graph)
        graph_module.graph.lint()
        graph_module.recompile()
        self.targets += [
            node.target for node in graph_module.graph.nodes if node.op == "call_function"
        ]
        return graph_module.forward


@pytest.mark.parametrize(
    "build, dtype, dropout, merge_from, counts",
    [
        (
            Python, torch.float64, 0.0, float("inf"),
            {F.linear: 8, HALF: 2, torch.cat: 1, inductor.merged_linears: 0}
        ),
        (
            Python, torch.float64, 0.0, 0.0,
            {F.linear: 0, HALF: 0, torch.cat: 0, inductor.merged_linears: 2}
        ),
        (
            Attention, torch.float64, 0.0, float("inf"),
            {F.linear: 8, HALF: 2, torch.cat: 1, inductor.merged_linears: 0}
        ),
        (
            Attention, torch.float64, 0.0, 0.0,
            {F.linear: 0, HALF: 0, torch.cat: 0, inductor.merged_linears: 2}
        ),
        (
            Python, torch.bfloat16, 0.0, 0.0,
            {F.linear: 8, HALF: 2, torch.cat: 1, inductor.merged_linears: 0}
        ),
        (
            Python, torch.float64, 0.5, 0.0,
            {F.linear: 8, HALF: 4, torch.cat: 0, inductor.merged_linears: 0}
        ),
    ]
)
def test_the_compiler_joins_what_python_calls(
    build, dtype, dropout, merge_from, counts, monkeypatch
):
    replace_internal(monkeypatch, "merge_from", merge_from)
    torch._dynamo.reset()
    base = build().to(dtype)
    model = randomise(lorafx.inject(base, rank=2, targets="linear", dropout=dropout, alpha=3.0))
    x, captured = X.to(dtype, copy=True).requires_grad_(), Captured()
    compiled = torch.compile(model, backend=captured, fullgraph=True)
    y = compiled(x)
    assert {target: captured.targets.count(target) for target in counts} == counts
    if not dropout:
        tolerance = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(y, model(x), **tolerance)
        both = [
            torch.autograd.grad(z.square().sum(), [x, *lorafx.parameters(model)])
            for z in (y, model(x))
        ]
        for got, wanted in zip(*both):
            assert (got - wanted).norm() <= (
                0.1 if dtype == torch.bfloat16 else 1e-10
            ) * wanted.norm()
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), **tolerance)


def test_the_pass_leaves_alone_what_changes_in_between(monkeypatch):
    torch._dynamo.reset()
    base = type("Changing", (Gated,), {"forward": in_place_on_x})().double()
    model, captured = randomise(lorafx.inject(base, rank=2, targets="linear")), Captured()
    torch.testing.assert_close(torch.compile(model, backend=captured)(X), model(X))
    assert torch.cat not in captured.targets


def no_grad_in_between(self, x):
    with torch.no_grad():
        gate = self.gate(x)
    return self.down(gate * self.up(x))


def schema_in_between(self, x):
    x = x * 1
    gate = self.gate(x)
    torch.ops.aten.sigmoid_.default(x)
    return self.down(gate * self.up(x))


@pytest.mark.parametrize("forward", [no_grad_in_between, schema_in_between])
@pytest.mark.parametrize("merge_from", [0.0, float("inf")])
def test_the_pass_knows_modes_and_schemas(forward, merge_from, monkeypatch):
    replace_internal(monkeypatch, "merge_from", merge_from)
    torch._dynamo.reset()
    base = type("Changing", (Gated,), {"forward": forward})().double()
    model = randomise(lorafx.inject(base, rank=2, targets="linear"))
    compiled = torch.compile(model, backend=Captured())
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), model(X))
    if forward is no_grad_in_between:
        gradients = [
            torch.autograd.grad(
                f(X).square().sum(), list(lorafx.parameters(model)), allow_unused=True
            )
            for f in (compiled, model)
        ]
        assert [g is None for g in gradients[0]] == [True, True, False, False, False, False]
        torch.testing.assert_close(*([g for g in found if g is not None] for found in gradients))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("merge_from", [0.0, float("inf")])
def test_what_trains_beside_and_any_shape(dynamic, merge_from, monkeypatch):
    replace_internal(monkeypatch, "merge_from", merge_from)
    torch._dynamo.reset()
    model = randomise(lorafx.inject(Attention().double(), rank=2, targets="linear", alpha=5.0))
    model.q.bias.requires_grad_(True)
    inputs = [model.q.bias, *lorafx.parameters(model)]
    compiled = torch.compile(model, backend=Captured(), dynamic=dynamic)
    for x in (X[0], X, torch.cat([X, X])):
        both = [torch.autograd.grad(f(x).square().sum(), inputs) for f in (compiled, model)]
        torch.testing.assert_close(*both)


def test_the_options_are_the_same_every_time():
    first, second = (lorafx.compile_options()["pre_grad_custom_pass"] for _ in range(2))
    assert first.uuid() == second.uuid() and len(first.uuid()) == 32


def test_with_the_compiler_itself():
    torch._dynamo.reset()
    base = Python().double()
    model = randomise(lorafx.inject(base, rank=2, targets="linear", alpha=5.0))
    compiled = torch.compile(model, options=lorafx.compile_options(), fullgraph=True)
    for x in (X, X[0], torch.cat([X] * 80)):  # factored twice, then merged
        x = x.clone().requires_grad_()
        y = compiled(x)
        torch.testing.assert_close(y, model(x))
        both = [
            torch.autograd.grad(z.square().sum(), list(lorafx.parameters(model)))
            for z in (y, model(x))
        ]
        torch.testing.assert_close(*both)
