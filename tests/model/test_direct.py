"""Calls of which no gradient is asked: two products an adapter, of A and B as they are then."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lorafx
from tests.support.direct_calls import X, Calls, Gated, close, injected, renew, truth


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch)


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
    base = Gated().eval().requires_grad_(False)  # torch multiplies by what trains in another way
    model = lorafx.inject(base, rank=3, targets="linear").eval()
    for x in X.values():
        with torch.no_grad():
            assert torch.equal(model(x), base(x))


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
