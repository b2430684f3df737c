"""What changes between two calls of which no gradient is asked: the second one sees it."""

import concurrent.futures
import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import lorafx
from tests.support.direct_calls import WIDTHS, X, Calls, close, injected, renew, truth


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch)


def step(model):
    optimizer = torch.optim.SGD(lorafx.parameters(model), lr=0.1)
    model(X["rows"]).square().sum().backward()
    optimizer.step()


def load(model):
    state = model.state_dict()
    drawn = {name: torch.randn_like(value) / 3 for name, value in state.items()
             if not name.endswith(".s")}
    model.load_state_dict({**state, **drawn})


def assign(model):
    for module in (model.gate, model.up, model.down):
        factors = module.lora.default
        factors.A = nn.Parameter(torch.randn_like(factors.A) / 3)
        factors.B.data = torch.randn_like(factors.B) / 3


def of_another_rank(model):
    factors = model.gate.lora.default
    factors.A.data, factors.B.data = torch.randn(5, WIDTHS[0]), torch.randn(WIDTHS[1], 5)


def other_factors(model, put):
    factors = copy.deepcopy(model.gate.lora.default)
    factors.scale = 3.0
    with torch.no_grad():
        model(X["one row"])
    put(model.gate.lora, factors)


CHANGES = {
    ".data of another rank": of_another_rank,
    "another W": lambda model: setattr(
        model.down, "weight", nn.Parameter(torch.randn(WIDTHS), requires_grad=False)),
    "other factors": lambda model: other_factors(
        model, lambda branch, factors: setattr(branch, "default", factors)),
    "other factors, added": lambda model: other_factors(
        model, lambda branch, factors: branch.add_module("default", factors)),
    "a state": lambda model: model.gate.lora.default.__setstate__({"scale": 5.0}),
    "a scale, in a compiled program": lambda model: torch.compile(
        lambda: setattr(model.gate.lora.default, "scale", 5.0), backend="eager", fullgraph=True)(),
    "an optimizer's step": step,
    "data.copy_": lambda model: renew(model, 2),
    "load_state_dict": load,
    "load_state_dict(assign=True)": lambda model: model.load_state_dict(
        copy.deepcopy(injected().state_dict()), assign=True),
    "other Parameters": assign,
    "a scale": lambda model: setattr(model.gate.lora.default, "scale", 5.0),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_is_seen(change, calls):
    model, x = injected(), X["one row"]
    with torch.no_grad():
        before = model(x)
    change(model)
    with torch.no_grad():
        found, count = calls.since(lambda: model(x))
    assert count == 3
    close(found, truth(model, x))
    assert change is CHANGES["load_state_dict(assign=True)"] or not torch.allclose(found, before)


def test_adapters_are_chosen(calls):
    model, x = injected(), X["one row"]
    lorafx.add(model, "b", rank=2, targets="linear")
    for weights in ({"default": 0.5, "b": 2.0}, {"b": 1.0}, {}, {"default": 1.0}):
        lorafx.activate(model, weights)
        renew(model)
        with torch.no_grad():
            found, count = calls.since(lambda: model(x))
        assert count == 3
        close(found, truth(model, x, weights or {"b": 0.0}))
    with torch.no_grad(), lorafx.disabled(model):
        close(model(x), truth(model, x, {"b": 0.0}))
    for twin in (copy.deepcopy(model), lorafx.merge(model), model.double()):
        with torch.no_grad():
            close(twin(x.to(twin.down.bias.dtype)), truth(model, x))


def test_what_holds_here_is_used(tmp_path, calls):
    """Between calls, in a context, and once an adapter is replaced or gone."""
    model, x = injected(), X["one row"]
    lorafx.add(model, "b", rank=2, targets="linear")
    renew(model)
    lorafx.save(model, tmp_path / "b.safetensors", adapter="b")

    def check(weights, direct=3):
        with torch.no_grad():
            found, count = calls.since(lambda: model(x))
        assert count == direct
        close(found, truth(model, x, weights))

    for _ in range(2):
        check({"default": 1.0})
        with lorafx.using(model, {"b": 2.0}):
            check({"b": 2.0})
            with lorafx.rows(model, ["b"]):
                check({"b": 1.0}, 0)
        with lorafx.disabled(model):
            check({"default": 0.0})
    lorafx.activate(model, ["default", "b"])
    check({"default": 1.0, "b": 1.0})
    renew(model, 2)
    before, held = copy.deepcopy(model), [*map(weakref.ref, lorafx.parameters(model, "b"))]
    with lorafx.using(model, "b"), torch.no_grad():
        lorafx.load(model, tmp_path / "b.safetensors", adapter="b", replace=True)
        close(model(x), truth(before, x, {"b": 1.0}))
    gc.collect()
    assert [reference() for reference in held] == [None] * 6
    check({"default": 1.0, "b": 1.0})
    held = [*map(weakref.ref, lorafx.parameters(model, "b"))]
    lorafx.remove(model, "b")
    gc.collect()
    assert [reference() for reference in held] == [None] * 6
    check({"default": 1.0})


def test_threads_use_what_they_chose():
    model, x = injected(), X["one row"]
    lorafx.add(model, "b", rank=2, targets="linear")
    renew(model)

    @torch.no_grad()
    def run(name):
        expected = truth(model, x, {name: 1.0})
        with lorafx.using(model, name):
            for _ in range(100):
                model.gate.lora.default.scale = 2.0  # as it is: others ask anew
                close(model(x), expected)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        for done in [pool.submit(run, name) for name in ("default", "b") * 2]:
            done.result()


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    assert b"Products" not in file.getvalue()
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_ask_for_themselves(copied, calls):
    model, x = injected(), X["one row"]
    twin = copied(model)
    twin.gate.lora.default.scale = 5.0
    twin.down.lora.default.A.data.add_(1)
    for each in (model, twin, copied(twin)):
        with torch.no_grad():
            found, count = calls.since(lambda: each(x))
        assert count == 3
        close(found, truth(each, x))


class Doubled(nn.Module):
    def forward(self, tensor):
        return 2 * tensor


def test_what_stands_in_for_factors(calls):
    model, x = injected(), X["one row"]
    swapped = {"gate.lora.default.A": torch.randn(3, 13), "down.weight": torch.randn(WIDTHS)}
    with torch.no_grad():
        found = torch.func.functional_call(model, swapped, (x,))
    twin = copy.deepcopy(model)
    twin.gate.lora.default.A.data.copy_(swapped["gate.lora.default.A"])
    twin.down.frozen_weight.data.copy_(swapped["down.weight"])
    close(found, truth(twin, x))
    nn.utils.parametrize.register_parametrization(model.gate.lora.default, "A", Doubled())
    with torch.no_grad():
        found, count = calls.since(lambda: model(x))
        assert count == 1
        close(found, truth(model, x))
        nn.utils.parametrize.remove_parametrizations(model.gate.lora.default, "A")
        close(model(x), truth(model, x))


def test_compiled_programs_do_not_ask():
    """Nothing is compiled again for what eager calls found out, or lost."""
    model, x = injected(), X["rows"]
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for step in range(4):
        with torch.no_grad():
            close(compiled(x), truth(model, x))
            close(model(x), truth(model, x))
            if step % 2:
                model.gate.lora.default.scale = 2.0  # as it is
    assert counter.frame_count == 1


def hooked(module, see):
    return module.register_forward_hook(lambda *_: see()).remove


def hooked_before(module, see):
    return module.register_forward_pre_hook(lambda *_: see()).remove


def patched(module, see):
    forward = module.forward
    module.forward = lambda *args, **kwargs: see() or forward(*args, **kwargs)
    return lambda: delattr(module, "forward")


@pytest.mark.parametrize("path, direct", [
    ("gate.lora", 2), ("gate.lora.default", 1), ("gate", 3), ("up.lora", 2), ("down.lora", 2)])
@pytest.mark.parametrize("touch", [hooked, hooked_before, patched])
def test_what_is_hooked_is_called(path, direct, touch, calls):
    model, x = injected(), X["one row"]
    seen = []
    undo = touch(model.get_submodule(path), lambda: seen.append(path))
    with torch.no_grad():
        found, count = calls.since(lambda: model(x))
        assert seen == [path] and count == direct
        close(found, truth(model, x))
        undo()
        found, count = calls.since(lambda: model(x))
        assert seen == [path] and count == 3
        close(found, truth(model, x))


def test_nothing_is_kept():
    model, x = injected(), X["one row"]
    with torch.no_grad():
        model(x)
    held = [weakref.ref(tensor) for tensor in (*lorafx.parameters(model), model.gate.frozen_weight)]
    assign(model)
    model.gate.register_parameter("weight", nn.Parameter(torch.randn(*WIDTHS[::-1])))
    for tensor in lorafx.parameters(model):
        tensor.data = tensor.data.clone()
    gc.collect()
    alive = [reference() is not None for reference in held]
    assert alive == [False, True, False, True, False, True, False]
    with torch.no_grad():
        model(x)
        del model.up.lora.default
        gc.collect()
        assert held[3]() is None
        assert torch.equal(model.up(x), x @ model.up.frozen_weight.T)
