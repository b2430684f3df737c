"""Calls of which no gradient is asked: two products an adapter, of A and B as they are then."""

import concurrent.futures
import copy
import gc
import io
import weakref
from collections import Counter

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lorafx
from lorafx._model import direct as direct_calls, lower

WIDTHS = (13, 7)


class Gated(nn.Module):
    """Two linear calls of x, which are joined, and one of what they give."""

    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(*WIDTHS), nn.Linear(*WIDTHS, bias=False)
        self.down = nn.Linear(*WIDTHS[::-1])

    def forward(self, x):
        return self.down(self.gate(x).tanh() * self.up(x))


def injected(base_dtype=torch.float32, **options):
    """A model that was called, so that what is asked once has been asked."""
    torch.manual_seed(0)
    model = lorafx.inject(Gated().to(base_dtype), rank=3, alpha=6, targets="linear", **options)
    renew(model)
    model.eval()
    with torch.no_grad():
        model(X["one row"].to(base_dtype))
    return model


def renew(model, seed=1):
    """Other values, written past every version."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in lorafx.parameters(model):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 3)


def truth(model, x, weights=None):
    """The result of W + sum w s B A in float64, without lorafx."""
    found = Gated().double()
    for name, layer in found.named_children():
        adapted = model.get_submodule(name)
        total = adapted.frozen_weight.double()
        for adapter, weight in (weights or {"default": 1.0}).items():
            factors = adapted.lora.get_submodule(adapter)
            total = total + weight * factors.scale * factors.B.double() @ factors.A.double()
        layer.weight.data.copy_(total)
        if layer.bias is not None:
            layer.bias.data.copy_(adapted.bias)
    with torch.no_grad():
        return found(x.double())


torch.manual_seed(0)
X = {
    "one row": torch.randn(1, 1, 13),
    "a vector": torch.randn(13),
    "rows": torch.randn(2, 5, 13),
    "a matrix": torch.randn(4, 13),
    "transposed rows": torch.randn(2, 13, 5).transpose(1, 2),
    "none": torch.randn(0, 13),
}


class Calls:
    """Counts the calls that were direct."""

    def __init__(self, monkeypatch):
        self.count = 0

        directly = direct_calls.directly

        def counted(*operands):
            result = directly(*operands)
            self.count += len(result)
            return result

        for module in (direct_calls, lower):
            monkeypatch.setattr(module, "directly", counted)

    def since(self, compute):
        before = self.count
        result = compute()
        return result, self.count - before


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch)


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("x", X.values(), ids=X)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_is_what_the_sum_gives(x, dtype, calls):
    model, x = injected(dtype), x.to(dtype)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            found, count = calls.since(lambda: model(x))
        assert count == 3 * (x.numel() > 0) and found.dtype == dtype
        close(found, truth(model, x), 2e-6 if dtype == torch.float32 else 1e-12)
    assert calls.since(lambda: model(x))[1] == 0  # a gradient may be asked for


@pytest.mark.parametrize("rank", [3, 16, 40])
def test_ranks(rank):
    model = lorafx.inject(nn.Linear(64, 48), rank=rank, alpha=rank, targets="linear")
    renew(model)
    for x in (torch.randn(1, 64), torch.randn(9, 64)):
        expected = model(x)
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_two_bytes_are_rounded_once(dtype, calls):
    """Of float32 factors beside one row; of those in x's dtype, and of more rows, as ever."""
    for options, one, rows in (({}, 3, 0), ({"dtype": dtype}, 3, 3)):
        model = injected(dtype, **options)
        for name, count in (("one row", one), ("rows", rows)):
            x = X[name].to(dtype)
            expected = model(x)
            with torch.no_grad():
                found, direct = calls.since(lambda: model(x))
            assert direct == count and found.dtype == dtype
            torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    layer = lorafx.inject(nn.Linear(64, 48).to(dtype), rank=3, targets="linear")
    layer.requires_grad_(False)
    renew(layer)
    x = torch.randn(1, 64).to(dtype)
    y, delta = nn.functional.linear(x, layer.frozen_weight, layer.bias), layer.lora.default
    added = (x.float() @ delta.A.T @ delta.B.T) * delta.scale
    with torch.no_grad():
        assert (layer(x) == (y.float() + added).to(dtype)).float().mean() > 0.9


def test_identity_at_initialisation():
    torch.manual_seed(0)
    base = Gated().eval().requires_grad_(False)
    model = lorafx.inject(base, rank=3, targets="linear").eval()
    for x in X.values():
        with torch.no_grad():
            assert torch.equal(model(x), base(x))


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
    assert b"Known" not in file.getvalue()
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


def test_a_bias_that_is_trained_whole(calls):
    model, x = injected(trainable=["gate.bias"]), X["one row"]
    with torch.no_grad():
        for parameter in lorafx.parameters(model):
            parameter.add_(1)
        found, count = calls.since(lambda: model(x))
    assert count == 1  # of down: gate, and up with it, are as ever
    torch.testing.assert_close(found, model(x), rtol=1e-5, atol=1e-5)


def test_dropout_is_as_ever(calls):
    model, x = injected(dropout=0.5), X["rows"]
    with torch.no_grad():
        close(model(x), truth(model, x))
    model.train()
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    with torch.no_grad():
        found, count = calls.since(lambda: model(x))
    assert count == 0 and torch.equal(found, expected)


def test_autocast_and_transforms_are_as_ever(calls):
    model, x = injected(), X["rows"]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, count = calls.since(lambda: model(x))
        assert count == 0 and found.dtype == torch.bfloat16
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            found, count = calls.since(lambda: model(fake.from_tensor(x)))
        assert count == 0 and found.shape == x.shape
        found, count = calls.since(lambda: torch.func.vmap(model)(x))
        assert count == 0
        close(found, truth(model, x))
        found, count = calls.since(lambda: torch.fx.experimental.proxy_tensor.make_fx(model)(x)(x))
        assert count == 0
        close(found, truth(model, x))
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        found, count = calls.since(lambda: compiled(x))
        assert count == 0
        close(found, truth(model, x))


def test_reentrant_checkpointing(calls):
    model, x = injected(), X["rows"]
    model(x.clone().requires_grad_()).square().sum().backward()
    expected = [parameter.grad for parameter in lorafx.parameters(model)]
    model.zero_grad()
    y, count = calls.since(
        lambda: checkpoint(model, x.clone().requires_grad_(), use_reentrant=True))
    y.square().sum().backward()
    assert count == 3
    for parameter, gradient in zip(lorafx.parameters(model), expected):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-5)


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


def test_a_hook_on_all_modules_sees_branches():
    model, seen = injected(), []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append(type(module).__name__))
    with torch.no_grad():
        found = model(X["one row"])
    handle.remove()
    assert seen.count("Branch") == seen.count("Factors") == 3
    close(found, truth(model, X["one row"]))


def test_factors_without_values_are_refused():
    model = injected()
    factors = model.down.lora.default
    factors.A.data.fill_(torch.nan)
    factors.missing = True
    with torch.no_grad(), pytest.raises(lorafx.AdapterError, match="have no values"):
        model(X["one row"])


def test_rows_of_a_weight(calls):
    """A block of rows is added by itself, as ever; the other block's branch is there too."""
    model = lorafx.inject(nn.Sequential(nn.Linear(8, 12)), rank=2, targets=["0[0:4]", "0[4:12]"])
    renew(model)
    x = torch.randn(1, 3, 8)
    expected = model(x)
    with torch.no_grad():
        found, count = calls.since(lambda: model(x))
    assert count == 0
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_many_rows_form_the_weight(calls):
    model = lorafx.inject(nn.Linear(8, 8), rank=2)
    renew(model)
    for rows, direct in ((19, 1), (20, 0)):  # MERGE_FROM = 2.5: rows (in + out) >= 5 in out
        with torch.no_grad():
            assert calls.since(lambda: model(torch.randn(rows, 8)))[1] == direct


class Operators(TorchDispatchMode):
    """Counts operators that are no views."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not any(result.alias_info is not None and not result.alias_info.is_write
                   for result in func._schema.returns):
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("x, first, second", [
    (X["one row"], "mv", "addmv_"), (X["rows"], "mm", "addmm_")], ids=["one row", "rows"])
def test_operators(x, first, second):
    """Two for a site, joined or not, beside those of the base."""
    model = injected()
    with torch.no_grad(), Operators() as base, lorafx.disabled(model):
        model(x)
    with torch.no_grad(), Operators() as adapted:
        model(x)
    assert adapted.counts - base.counts == {first: 3, second: 3}
    assert not base.counts - adapted.counts


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
