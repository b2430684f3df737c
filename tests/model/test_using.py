"""What a thread or a task uses of a model's adapters, and rows of a batch."""

import asyncio
import contextlib
import contextvars
import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lorafx
from tests.support.oracle import randomise

X = torch.randn(4, 5, 8, dtype=torch.float64)  # (N, tokens, in)
SPECS = ["a", "b", {"a": 0.7, "b": -0.3}, None]


@pytest.fixture
def model():
    base = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).double()
    made = lorafx.inject(base, rank=2, adapter="a", dtype=torch.float64)
    lorafx.add(made, "b", rank=3, alpha=9)
    lorafx.add(made, "c", rank=1)
    return randomise(made)


def of(model, spec, x=X):
    """What the model gives once it is told to use these, and nothing else, by `activate`."""
    twin = copy.deepcopy(model)
    lorafx.activate(twin, [] if spec is None else spec)
    return twin(x).detach()


def steps(model, spec):
    with lorafx.using(model, spec):
        yield model(X)
        yield model(X)


def test_generators_by_turns_are_an_error_and_leave_nothing_behind(model):
    before = model(X)
    one, other = steps(model, "b"), steps(model, "c")
    for generator in (one, other, one, other):
        next(generator)
    with pytest.raises(lorafx.AdapterError, match="anew for each step"):
        next(one)
    assert next(other, None) is None
    assert torch.equal(model(X), before)
    lorafx.remove(model, "b")


def test_a_context_that_is_left_elsewhere_is_an_error_and_leaves_nothing_behind(model):
    before, generator = model(X), steps(model, "b")
    for _ in range(2):
        contextvars.copy_context().run(next, generator)
    with pytest.raises(lorafx.AdapterError, match="in another order, thread or task"):
        contextvars.copy_context().run(next, generator)
    assert torch.equal(model(X), before)
    lorafx.remove(model, "b")


@pytest.mark.parametrize("spec", SPECS)
def test_using(model, spec):
    with lorafx.using(model, "c"):
        with lorafx.using(model, spec):
            assert torch.equal(model(X), of(model, spec))
        assert torch.equal(model(X), of(model, "c"))
    assert torch.equal(model(X), of(model, "a"))
    with pytest.raises(lorafx.AdapterError, match="no adapter 'd'"):
        with lorafx.using(model, "d"):
            pass


@pytest.mark.parametrize("spec", SPECS)
def test_what_is_made_in_a_context_is_of_what_is_used_there(model, spec):
    lorafx.activate(model, "c")
    with lorafx.using(model, spec):
        used = lorafx.summary(model)
        torch.testing.assert_close(lorafx.merge(model)(X), model(X))
        errors = lorafx.merge_error(model, dtype=torch.bfloat16)
    lorafx.activate(model, [] if spec is None else spec)
    wanted = lorafx.summary(model)
    assert used.active == wanted.active and used.rows() == wanted.rows()
    assert errors == lorafx.merge_error(model, dtype=torch.bfloat16)


def test_what_is_saved_in_a_context_is_used_there(model, tmp_path):
    with lorafx.using(model, "b"):
        lorafx.save(model, tmp_path / "b.safetensors")
    loaded = lorafx.load(lorafx.eject(model), tmp_path / "b.safetensors")
    torch.testing.assert_close(loaded(X), of(model, "b"))
    with lorafx.disabled(model), pytest.raises(lorafx.AdapterError, match="but 0 are active"):
        lorafx.save(model, tmp_path / "none.safetensors")


@pytest.mark.parametrize("make", [
    lorafx.merge, lorafx.merge_error, lorafx.summary, lambda model: lorafx.save(model, "a.pth")])
def test_what_cannot_be_made_in_a_context(model, make):
    with lorafx.rows(model, ["a", "b"]), pytest.raises(lorafx.AdapterError, match="in lorafx.row"):
        make(model)


def test_an_error_ends_it(model):
    with pytest.raises(ZeroDivisionError), lorafx.using(model, "b"):
        raise ZeroDivisionError
    assert torch.equal(model(X), of(model, "a"))


@pytest.mark.parametrize("go", [lorafx.remove, lambda model, name: lorafx.rename(model, name, "d")])
def test_what_is_used_stays(model, go):
    with lorafx.using(model, {"b": 2.0}), pytest.raises(lorafx.AdapterError, match="'b' is used"):
        go(model, "b")
    with lorafx.rows(model, ["a", "b"]), pytest.raises(lorafx.AdapterError, match="'b' is used"):
        go(model, "b")
    go(model, "b")


def test_disabled_and_using_nest(model):
    base, other = of(model, None), of(model, "c")
    with lorafx.using(model, "b"), lorafx.disabled(model):
        assert torch.equal(model(X), base)
        with lorafx.using(model, "c"):
            assert torch.equal(model(X), other)


def test_threads(model):
    wanted = {str(spec): of(model, spec) for spec in SPECS}
    right = []

    def serve(spec):
        for _ in range(50):
            with lorafx.using(model, spec), torch.no_grad():
                right.append(torch.allclose(model(X), wanted[str(spec)], atol=1e-12))

    threads = [threading.Thread(target=serve, args=(spec,)) for spec in SPECS * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 400


@pytest.mark.parametrize("compiled", [False, True])
def test_tasks(model, compiled):
    call = torch.compile(model, backend="eager", fullgraph=True) if compiled else model

    async def serve(spec):
        found = []
        with lorafx.using(model, spec):
            for _ in range(3):
                await asyncio.sleep(0)
                found.append(call(X).detach())
        return found

    async def serve_all():
        return await asyncio.gather(*map(serve, SPECS))

    for spec, found in zip(SPECS, asyncio.run(serve_all())):
        for y in found:
            torch.testing.assert_close(y, of(model, spec))


def test_copies_know_nothing_of_a_context(model):
    with lorafx.using(model, "b"):
        twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for twin in twins:
        assert torch.equal(twin(X), of(model, "a"))
        with lorafx.using(twin, "b"):
            assert torch.equal(twin(X), of(model, "b"))
            assert torch.equal(model(X), of(model, "a"))


def gradients(model, y):
    named = dict(lorafx.named_parameters(model))
    found = torch.autograd.grad(y.square().sum(), list(named.values()), allow_unused=True)
    return dict(zip(named, found))


@pytest.mark.parametrize("use", [lorafx.using, lambda model, _: lorafx.rows(model, SPECS)])
def test_what_runs_again_in_the_backward_pass_uses_the_same(model, use):
    lorafx.activate(model, ["a", "b"])
    wanted, found = [], []
    for x in (X, X.clone().requires_grad_()):
        with use(model, {"a": 0.5}):
            y = model(x) if x is X else checkpoint(model, x, use_reentrant=False)
        (wanted if x is X else found).append(gradients(model, y))
    torch.testing.assert_close(found, wanted)


def test_a_context_within_a_checkpointed_function(model):
    lorafx.activate(model, ["a", "b"])

    def both(x):
        y = model(x)
        with lorafx.using(model, "b"):
            return y + model(x)

    with lorafx.using(model, "a"):
        wanted = gradients(model, both(X))
        y = checkpoint(both, X.clone().requires_grad_(), use_reentrant=False)
    with lorafx.using(model, None):
        torch.testing.assert_close(gradients(model, y), wanted)


def test_a_forward_that_is_not_known_is_an_error(model):
    with lorafx.using(model, "b"):
        y = checkpoint(model, X.clone().requires_grad_(), use_reentrant=True)
    with pytest.raises(lorafx.AdapterError, match="use_reentrant=False"):
        y.sum().backward()


@pytest.mark.parametrize("x", [X, X[:, 0], X[:, :1], X.repeat_interleave(3, 0)])
def test_rows(model, x):
    lorafx.activate(model, ["a", "b"])
    with lorafx.rows(model, SPECS):
        found = model(x)
    times = len(x) // 4
    for row, spec in enumerate(SPECS):
        part = slice(row * times, (row + 1) * times)
        torch.testing.assert_close(found[part], of(model, spec, x[part]))


def test_rows_train_their_own_adapters(model):
    lorafx.activate(model, ["a", "b", "c"])
    wanted = {name: 0 for name, _ in lorafx.named_parameters(model)}
    for row, spec in enumerate(SPECS):
        with lorafx.using(model, spec):
            y = model(X[row:row + 1])
        if y.requires_grad:
            for name, gradient in gradients(model, y).items():
                wanted[name] = wanted[name] + (0 if gradient is None else gradient)
    with lorafx.rows(model, SPECS):
        found = gradients(model, model(X))
    for name, gradient in found.items():
        if ".c." in name:
            assert gradient is None
        else:
            torch.testing.assert_close(gradient, wanted[name])


def test_rows_train_by_who_writes_past_versions(model):
    lorafx.activate(model, ["a", "b", "c"])
    for _ in range(3):
        with lorafx.rows(model, SPECS):
            found = model(X)
        wanted = [of(model, spec, X[row:row + 1]) for row, spec in enumerate(SPECS)]
        torch.testing.assert_close(found, torch.cat(wanted))
        for parameter in lorafx.parameters(model):
            parameter.data.mul_(1.5)


@pytest.mark.parametrize("compiled", [False, True])
def test_values_of_other_memory_are_seen(compiled):
    """Also where the allocator gives new values the address of old ones."""
    model, x = lorafx.inject(nn.Linear(64, 64), rank=2, adapter="a"), torch.randn(2, 3, 64)
    lorafx.add(model, "b")
    lorafx.activate(randomise(model), ["a", "b"])
    call = torch.compile(model, backend="eager") if compiled else model
    use = contextlib.nullcontext() if compiled else lorafx.rows(model, ["a", "b"])
    a, b = model.lora.a, model.lora.b
    with torch.no_grad(), use:
        for _ in range(5):
            call(x)
            for _ in range(2):
                a.A.data = torch.randn(2, 64)
            added = x @ a.A.T @ a.B.T, x @ b.A.T @ b.B.T
            added = sum(added) if compiled else torch.stack([added[0][0], added[1][1]])
            expected = x @ model.frozen_weight.T + model.bias + added
            torch.testing.assert_close(call(x), expected, rtol=1e-4, atol=1e-3)


def test_rows_drop_out_by_adapter():
    model = lorafx.inject(nn.Linear(64, 64), rank=2, adapter="a", dropout=0.5)
    lorafx.add(model, "b", rank=2)
    randomise(model)
    lorafx.activate(model, ["a", "b"])
    x = torch.randn(2, 64)
    with lorafx.rows(model, ["a", "b"]):
        one, other = model(x), model(x)
    assert not torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.parametrize("x", [X[:3], X.transpose(0, 1)[:4], X.transpose(0, 1), X[0, 0]])
def test_what_cannot_be_told_by_rows_is_an_error(model, x):
    with lorafx.rows(model, SPECS), pytest.raises(ValueError, match="names adapters for 4 rows"):
        model(x)


@pytest.mark.parametrize("specs", ["a", [], {"a": 1.0}, None])
def test_rows_are_a_list(model, specs):
    with pytest.raises(lorafx.AdapterError, match="Rows are given as a list"):
        with lorafx.rows(model, specs):
            pass


def test_rows_share_what_is_trained_whole():
    base = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    model = lorafx.inject(base, adapter="a", trainable="1")
    with pytest.raises(lorafx.AdapterError, match="'a' trains '1.*' whole"):
        with lorafx.rows(model, ["a", None]):
            pass
