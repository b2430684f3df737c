"""An adapter replaced while the model runs: each forward has the old one or the new, never both."""

import copy
import sys
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lorafx
from lorafx._model import replacing
from tests.support.oracle import randomise

X = torch.randn(3, 8, dtype=torch.float64)


class Tower(nn.Module):
    """Python that calls one layer after another; `between` is called in the middle."""

    def __init__(self, depth=6):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))
        self.norm = nn.LayerNorm(8)
        self.between = nn.Identity()

    def forward(self, x):
        for number, layer in enumerate(self.layers):
            x = torch.tanh(layer(x))
            if number == 2:
                x = self.between(x)
        return self.norm(x)


OTHERS = {
    "as it was": dict(rank=2),
    "another rank": dict(rank=5, alpha=9),
    "other sites": dict(rank=3, targets=["layers.0", "layers.5"]),
    "more": dict(rank=1, trainable=["norm", "layers.4.bias"]),
    "nothing but a module": dict(rank=1, targets=["layers.1"], trainable="norm"),
}


def made(depth=6, **config):
    torch.manual_seed(0)
    model = lorafx.inject(Tower(depth).double(), adapter="a", dtype=torch.float64,
                          **({"rank": 2} | config))
    lorafx.add(model, "b", rank=1, dtype=torch.float64)
    return randomise(model, seed=1)


@pytest.fixture(params=OTHERS)
def files(request, tmp_path):
    """Two files with an adapter "a", of the second of which others may be the sites and ranks."""
    paths = []
    for seed, config in enumerate(({}, OTHERS[request.param])):
        model = randomise(made(**config), seed=seed)
        paths.append(tmp_path / f"{seed}.safetensors")
        lorafx.save(model, paths[-1])
    return paths


def elsewhere(do):
    """What it gives in another thread."""
    found = []
    thread = threading.Thread(target=lambda: found.append(do()))
    thread.start()
    thread.join()
    return found[0]


def of(path):
    """What a model gives that never had another adapter."""
    return lorafx.load(lorafx.eject(made()), path)(X).detach()


def meanwhile(model, do):
    """What a forward gives in the middle of which something is done in another thread."""
    handle = model.between.register_forward_hook(lambda *_: elsewhere(do) and None)
    try:
        return model(X)
    finally:
        handle.remove()


def load(model, path, **more):
    lorafx.load(model, path, adapter="a", replace=True, **more)


def test_replaced(files):
    """Whatever the ranks, sites and modules trained whole: nothing of the old one is left."""
    model = lorafx.load(lorafx.eject(made()), files[0])
    lorafx.add(model, "b", dtype=torch.float64)
    lorafx.activate(model, {"a": 1.0, "b": 0.5})
    for path in (*files[::-1], files[1]):
        load(model, path)
        alone = lorafx.load(lorafx.eject(made()), path)
        assert torch.equal(model(X), of(path))
        assert lorafx.adapters(model) == ["a", "b"]
        ours = dict(lorafx.named_parameters(model, "a"))
        for name, tensor in lorafx.named_parameters(alone):
            assert torch.equal(ours.pop(name), tensor) and tensor.requires_grad
        assert not ours
        assert [*model.state_dict()].sort() == [*alone.state_dict()].sort()


def test_what_is_active_stays(files):
    model = made()
    lorafx.activate(model, "b")
    expected = model(X)
    load(model, files[1])
    assert torch.equal(model(X), expected)
    assert not any(p.requires_grad for p in lorafx.parameters(model, "a"))
    lorafx.activate(model, "a")
    assert torch.equal(model(X), of(files[1]))


@pytest.mark.parametrize("verb", [
    load,
    lambda model, _: lorafx.activate(model, {"a": 0.5, "b": 2.0}),
    lambda model, _: lorafx.remove(model, "a"),
    lambda model, _: lorafx.rename(model, "a", "c"),
])
def test_a_forward_uses_to_its_end_what_it_began_with(files, verb):
    model = lorafx.load(lorafx.eject(made()), files[0])
    lorafx.add(model, "b", dtype=torch.float64)
    found = meanwhile(model, lambda: verb(model, files[1]))
    assert torch.equal(found, of(files[0]))
    found.sum().backward()
    if verb is load:
        assert torch.equal(model(X), of(files[1]))


def test_a_context_uses_to_its_end_what_it_began_with(files):
    model = lorafx.load(lorafx.eject(made()), files[0])
    with lorafx.using(model, "a"):
        load(model, files[1])
        assert torch.equal(model(X), of(files[0]))
        assert torch.equal(elsewhere(lambda: model(X).detach()), of(files[1]))
        with lorafx.using(model, "a"):
            assert torch.equal(model(X), of(files[1]))
            load(model, files[0])
            assert torch.equal(model(X), of(files[1]))
        assert torch.equal(model(X), of(files[0]))
    assert torch.equal(model(X), of(files[0]))


def test_at_each_line_of_the_swap(files):
    """Another thread's forward, wherever the one that swaps may be interrupted."""
    model = lorafx.load(lorafx.eject(made()), files[0])
    wanted, seen = [of(path) for path in files], []

    def look(frame, event, _):
        if frame.f_code.co_filename == replacing.__file__:
            if event == "line":
                seen.append(elsewhere(lambda: model(X).detach()))
            return look

    sys.settrace(look)
    try:
        load(model, files[1])
    finally:
        sys.settrace(None)
    which = [[torch.equal(y, old_or_new) for old_or_new in wanted].index(True) for y in seen]
    assert which == sorted(which) and {*which} == {0, 1} and len(which) > 30


def test_gradients_are_of_what_was_used(files):
    """Also in what runs again in the backward pass."""
    for again in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=False)):
        model = lorafx.load(lorafx.eject(made()), files[0])
        old = dict(lorafx.named_parameters(model))
        wanted = torch.autograd.grad(model(X).square().sum(), [*old.values()])
        y = again(model, X.clone().requires_grad_())
        load(model, files[1])
        y.square().sum().backward()
        for parameter, gradient in zip(old.values(), wanted):
            torch.testing.assert_close(parameter.grad, gradient)
        assert all(parameter.grad is None for parameter in lorafx.parameters(model))
