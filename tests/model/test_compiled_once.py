"""A compiled model takes any adapters without being compiled again."""

import collections
import contextlib
import copy
import sys
import threading

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import lorafx
from lorafx._model import branches as branches_module
from lorafx._model import record
from lorafx._model.choice import Choice
from lorafx._model.stacks import stack_of
from tests.support.oracle import randomise

X = torch.randn(4, 5, 8)
ROWS = ["a", "b", {"a": 0.7, "b": -0.3}, None]


@pytest.fixture(autouse=True)
def none_compiled_before():
    """What is compiled counts against the limit of a forward, which the models here share."""
    torch.compiler.reset()


def made():
    base = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    model = lorafx.inject(base, rank=2, adapter="a")
    lorafx.add(model, "b", rank=5)
    return randomise(model)


def uses(model):
    """Every way to change what is active, one after another."""
    yield "a", lambda: lorafx.activate(model, "a")
    yield "rank 5", lambda: lorafx.activate(model, "b")
    for weight in range(1, 10):
        weights = {"a": weight / 10, "b": 1 - weight / 10}
        yield weights, lambda: lorafx.activate(model, weights)
    yield "an equal one", lambda: lorafx.activate(model, ["a", "b"])
    for rank in (1, 3, 8):  # 8 is the width, and 4 and 5 are sizes of x
        yield f"new, of rank {rank}", lambda: lorafx.add(model, f"r{rank}", rank=rank)
        yield f"rank {rank}", lambda: lorafx.activate(model, f"r{rank}")
    yield "removed", lambda: lorafx.remove(model, "r8")
    yield "none", lambda: lorafx.activate(model, [])
    yield "composed", lambda: lorafx.compose(model, {"a": 0.2, "b": 2.0}, "c")
    yield "the composed", lambda: lorafx.activate(model, "c")


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("layers", [False, True])
def test_whatever_is_active(layers, trains):
    model = made()
    counter = CompileCounter()
    if layers:
        for layer in model[::2]:
            layer.compile(backend=counter, fullgraph=True)
    call = model if layers else torch.compile(model, backend=counter, fullgraph=True)
    x = X.clone().requires_grad_()
    frames = None
    for name, change in uses(model):
        change()
        randomise(model, seed=len(lorafx.adapters(model)))
        with torch.set_grad_enabled(trains):
            found = call(x)
            wanted = eager(model, x)
        torch.testing.assert_close(found, wanted, msg=str(name))
        if trains and found.requires_grad:
            ours = list(lorafx.parameters(model))
            if ours:
                torch.testing.assert_close(
                    torch.autograd.grad(found.sum(), ours), torch.autograd.grad(wanted.sum(), ours))
        with lorafx.using(model, "b"), torch.set_grad_enabled(trains):
            torch.testing.assert_close(call(x), eager(model, x))
        with lorafx.disabled(model), torch.set_grad_enabled(trains):
            torch.testing.assert_close(call(x), eager(model, x))
        frames = frames or counter.frame_count
        assert counter.frame_count == frames, name


def eager(model, x):
    with torch.compiler.set_stance("force_eager"):
        return model(x)


def test_rows_change():
    model = made()
    counter = CompileCounter()
    call = torch.compile(model, backend=counter, fullgraph=True)
    for specs in (ROWS, ROWS[::-1], ["a"] * 4, [None, "b", "b", "a"], [{"a": 1, "b": 2}] * 4):
        with lorafx.rows(model, specs), torch.no_grad():
            torch.testing.assert_close(call(X), eager(model, X))
    assert counter.frame_count == 1


def test_threads_that_look_for_one_program(monkeypatch):
    """One looks at the first of two programs, which its first read of a stack tells it not to run,
    while another, at its second read, finds the second program.
    """
    model, counter, read = made(), CompileCounter(), Choice.read
    call = torch.compile(model, backend=counter, fullgraph=True)
    reads = collections.Counter()
    waits = {"first": (1, threading.Event(), threading.Event()),
             "second": (2, threading.Event(), threading.Event())}

    def waiting(choice):
        name = threading.current_thread().name
        reads[name] += 1
        if name in waits and reads[name] == waits[name][0]:
            waits[name][1].set()
            assert waits[name][2].wait(60)
        return read(choice)

    def plain():
        with lorafx.using(model, "a"), torch.no_grad():
            call(X)

    def by_rows():
        with lorafx.rows(model, ROWS), torch.no_grad():
            call(X)

    plain()
    by_rows()
    plain()
    monkeypatch.setattr(Choice, "read", waiting)
    threads = {name: threading.Thread(target=by_rows, name=name) for name in waits}
    for name in ("second", "first"):
        threads[name].start()
        assert waits[name][1].wait(60)
    for name in ("second", "first"):
        waits[name][2].set()
        threads[name].join()
    assert counter.frame_count == 2


class Reads(nn.Module):
    """Python reads its weight, since the loop is none of a graph's."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        for function in (torch.tanh,):
            x = function(x)
        return nn.functional.linear(x, self.w)


def test_rows_where_python_reads_a_weight():
    model = lorafx.inject(Reads(), targets="w", adapter="a")
    lorafx.add(model, "b")
    randomise(model)
    compiled, x = torch.compile(model, backend="eager"), torch.randn(3, 5, 8)
    with lorafx.rows(model, ["a", None, "b"]):
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)


def test_where_python_reads_a_narrow_weight():
    model = lorafx.inject(Reads().bfloat16(), targets="w", rank=2, adapter="a")
    lorafx.add(model, "b", targets="w", rank=3)
    randomise(model)
    counter, x = CompileCounter(), torch.randn(3, 5, 8, dtype=torch.bfloat16)
    call, frames = torch.compile(model, backend=counter), []
    for use in ("a", "b", {"a": 0.5, "b": 2.0}, []):
        lorafx.activate(model, use)
        torch.testing.assert_close(call(x), eager(model, x), rtol=0, atol=0)
        frames.append(counter.frame_count)
    assert frames == [frames[0]] * 4
    with pytest.raises(torch._dynamo.exc.Unsupported, match="narrow dtype.* fullgraph=True"):
        torch.export.export(model, (x,), strict=True)


def test_a_narrow_weight_that_python_reads_is_exported():
    model = randomise(lorafx.inject(Reads().bfloat16(), targets="w"))
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x), rtol=0, atol=0)


def test_dropout_is_of_training():
    model = randomise(lorafx.inject(nn.Linear(64, 64), rank=2, dropout=0.5))
    call = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(3, 64)
    for _ in range(2):
        assert not torch.equal(call(x), call(x))
        model.eval()
        torch.testing.assert_close(call(x), eager(model, x))
        assert torch.equal(call(x), call(x))
        model.train()


RATES = {"a": 0.5, "b": 0.2, "c": 0}
RANKS = {"a": 64, "b": 48, "c": 1}
SIZES = {"a": 1.0, "b": 16.0, "c": 256.0}  # of what each adds, so that a sum tells of each


def of_known_masks():
    """With x = 1, adapter n adds to output i whether its mask kept element i, / (1 - p), s_n."""
    model = lorafx.inject(nn.Linear(64, 64), rank=64, adapter="a", dropout=RATES["a"])
    for name in "bc":
        lorafx.add(model, name, rank=RANKS[name], dropout=RATES[name])
    with torch.no_grad():
        for name, size in SIZES.items():
            model.lora.get_submodule(name).A.copy_(torch.eye(RANKS[name], 64))
            model.lora.get_submodule(name).B.copy_(size * torch.eye(64, RANKS[name]))
    return model


def check_masks(model, added, used):
    """One row: the sum of masks of these {adapter: weight}, each of its own, of its own rate."""
    for name in sorted(used, key=SIZES.get, reverse=True):
        kept = used[name] * SIZES[name] / (1 - RATES[name])
        mask = added > kept / 2
        added = added - kept * mask
        share = mask[:, :RANKS[name]].double().mean()
        assert not mask[:, RANKS[name]:].any()
        wanted, count = 1 - RATES[name], mask[:, :RANKS[name]].numel()
        assert abs(share - wanted) <= 5 * (wanted * (1 - wanted) / count) ** 0.5
    torch.testing.assert_close(added, torch.zeros_like(added), rtol=0, atol=1e-3)


def test_each_drops_out_for_itself():
    """One program for single adapters, one for several at once, one for rows, one in eval.

    A probability may be an integer, 0, as that of the adapter c is.
    """
    model, x = of_known_masks(), torch.ones(90, 64)
    counter = CompileCounter()
    call = torch.compile(model, backend=counter, fullgraph=True)
    base = model.frozen_weight.sum(1) + model.bias
    frames = []
    several = [["a", "b"], {"c": 1, "a": 0.5}, ["a", "b", "c"], {"b": 2, "a": 1}]
    for uses in (["a", "b", "c", []], several):
        for use in uses:
            lorafx.activate(model, use)
            used = use if isinstance(use, dict) else dict.fromkeys(use, 1.0)
            model.zero_grad()
            added = call(x) - base
            check_masks(model, added.detach(), used)
            if used:
                added.sum().backward()
                gradients = [(p.grad * p).sum() for n, p in lorafx.named_parameters(model)
                             if n.endswith("B")]
                torch.testing.assert_close(sum(gradients), added.sum(), rtol=1e-4, atol=0)
        frames.append(counter.frame_count)
    for specs in (["a", None, {"b": 1, "c": 1}], [{"a": 1, "b": 1}, "c", "a"], ["b"] * 3):
        with lorafx.rows(model, specs):
            added = call(x.view(3, 30, 64)) - base
        for row, spec in zip(added, specs):
            used = spec if isinstance(spec, dict) else dict.fromkeys(spec or [], 1.0)
            check_masks(model, row.detach(), used)
    frames.append(counter.frame_count)
    model.eval()
    for use in ("a", ["a", "b", "c"]):
        lorafx.activate(model, use)
        torch.testing.assert_close(call(x), eager(model, x))
    assert [*frames, counter.frame_count] == [1, 2, 3, 4]


def test_dropout_with_the_compiler_itself():
    model, x = of_known_masks(), torch.ones(90, 64)
    call, base = torch.compile(model, fullgraph=True), model.frozen_weight.sum(1) + model.bias
    lorafx.activate(model, ["a", "b"])
    call(x).sum().backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for used in ({"b": 1.0, "a": 3.0}, dict.fromkeys("abc", 1.0)):
            lorafx.activate(model, used)
            added = call(x) - base
            check_masks(model, added.detach(), used)
            added.sum().backward()


def test_training_goes_on():
    model = made()
    twin = copy.deepcopy(model)
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    for trained, forward in ((model, call), (twin, twin)):
        optimizer = torch.optim.AdamW(lorafx.parameters(trained), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            forward(X).square().mean().backward()
            optimizer.step()
    for found, wanted in zip(lorafx.parameters(model), lorafx.parameters(twin)):
        torch.testing.assert_close(found, wanted)


def test_with_the_compiler_itself():
    model = made()
    call = torch.compile(model, fullgraph=True)
    call(X).sum().backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for weights in ("b", {"a": 0.5, "b": 0.25}, []):
            lorafx.activate(model, weights)
            y = call(X)
            torch.testing.assert_close(y, eager(model, X))
            y.sum().backward()


def test_a_branch_is_looked_up_once_a_call(monkeypatch):
    model, found = made(), []

    def counted(branch, *args, **kwargs):
        found.append(branch)
        return stack_of(branch, *args, **kwargs)

    call = torch.compile(model, backend="eager", fullgraph=True)
    call(X)
    monkeypatch.setattr(branches_module, "stack_of", counted)
    for context in (contextlib.nullcontext(), lorafx.using(model, "b"), lorafx.disabled(model)):
        with context:
            call(X)
        assert len(found) == len({*found}) == 2
        found.clear()


def test_no_guard_compares_two_ways_to_an_object():
    """Each is evaluated in Python at each call; those of modules' globals do not grow in number."""
    model, kinds = made(), []

    def note(guards):
        kinds.extend([guard.guard_type for guard in guards if not guard.is_global])
        return [True] * len(guards)

    torch.compiler.reset()
    torch.compile(model, backend="eager", fullgraph=True, options={"guard_filter_fn": note})(X)
    assert "TENSOR_MATCH" in kinds and "DUPLICATE_INPUT" not in kinds


@pytest.mark.parametrize("active", ["a", ["a", "b"]])
def test_what_is_written_within_a_call_is_seen(active):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.between = nn.Linear(8, 8), nn.Identity()

        def forward(self, x):
            return self.layer(self.between(self.layer(x)))

    model = lorafx.inject(Twice(), rank=2, adapter="a")
    lorafx.add(model, "b", rank=2)
    lorafx.activate(randomise(model), active)
    model.layer.compile(backend="eager", fullgraph=True)

    @torch.no_grad()
    def write(*_):
        for parameter in lorafx.parameters(model, "a"):
            parameter.mul_(2)

    A, B = [parameter.clone() for parameter in lorafx.parameters(model, "a")]
    first = model.layer(X)
    write()
    wanted = model.layer(first)
    with torch.no_grad():
        for parameter, before in zip(lorafx.parameters(model, "a"), (A, B)):
            parameter.copy_(before)
    model.between.register_forward_hook(write)
    torch.testing.assert_close(model(X), wanted)


def test_what_trains_without_being_active():
    model = made()
    lorafx.activate(model, [])
    call = torch.compile(model, backend="eager", fullgraph=True)
    ours = [parameter.requires_grad_() for parameter in lorafx.parameters(model, "b")]
    with lorafx.using(model, "b"):
        for y in (call(X), eager(model, X)):
            y.sum().backward()
    assert all(torch.count_nonzero(parameter.grad) for parameter in ours)


@pytest.mark.parametrize("uses", [
    lambda model: lorafx.using(model, "b"), lorafx.disabled,
    lambda model: lorafx.rows(model, ROWS),
    lambda model: contextlib.nullcontext(lorafx.activate(model, "b"))])
def test_what_chooses_ends_a_program(uses, monkeypatch):
    model = made()
    monkeypatch.setattr(record, "settle", lambda model: sys._getframe())  # none can trace that

    def chosen(x):
        with uses(model):
            return model(x)

    wanted = chosen(X)
    lorafx.activate(model, "a")
    whole = torch.compile(chosen, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="are active when it begins: comp"):
        whole(X)
    assert lorafx.summary(model).headline() == lorafx.summary(made()).headline()
    torch.testing.assert_close(torch.compile(chosen, backend="eager")(X), wanted)


def test_layers_of_a_graph_module():
    """Torch takes what hangs below modules of its own for constant in shape, unless told not to."""
    model = lorafx.inject(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8))), rank=2)
    lorafx.add(model, "b", rank=5)
    randomise(model)
    counter = CompileCounter()
    call = torch.compile(model, backend=counter, fullgraph=True)
    with torch._dynamo.config.patch(force_nn_module_property_static_shapes=False):
        for use in ("default", "b", ["default", "b"], []):
            lorafx.activate(model, use)
            torch.testing.assert_close(call(X), eager(model, X))
    assert counter.frame_count == 1
