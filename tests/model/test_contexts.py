"""Calls from outside, by contexts, transforms, hooks, compilers: a model acts like the original."""

import copy

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import lorafx
from tests.support.oracle import Oracle, factors_of, fingerprint, frozen, randomise

X = torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Break(nn.Module):
    """Python that decides, and reads a weight past its layer."""

    def __init__(self):
        super().__init__()
        self.up, self.w, self.factor = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8) / 3), 1.0

    def forward(self, x):
        if self.factor:
            x = x * self.factor
        return nn.functional.linear(self.up(x).tanh(), self.w) + x @ self.up.weight


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]  # with its weights: torch differentiates that twice


BUILDS = {
    "regions": lambda: nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 8)),
    "break": Break,
    "attention": Attention,
}


@pytest.fixture(params=BUILDS)
def base(request):
    return BUILDS[request.param]().double().train()


def both(base):
    """An injected model, adapters not zero, and the original with W + s B A in W's place."""
    model = randomise(lorafx.inject(base, rank=2, targets="linear"))
    return model, Oracle(
        base, lorafx.sites(base), factors_of(model, {"default": 1.0})
    ).model.requires_grad_(False)


CONTEXTS = {
    "grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16)}


@pytest.mark.parametrize("context", CONTEXTS)
def test_contexts(base, context):
    dtype = torch.float32 if context == "autocast" else torch.float64
    base, x = base.to(dtype), X.to(dtype)
    model, (adapted, twin) = lorafx.inject(base, targets="linear"), both(base)
    with CONTEXTS[context]():
        assert torch.equal(model(x), frozen(base)(x))
        tight = dict(rtol=0.05, atol=0.1) if context == "autocast" else dict(rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(adapted(x), twin(x), **tight)


TRANSFORMS = {
    "vmap": lambda m: vmap(m)(X[:, None]),
    "grad": lambda m: grad(lambda x: m(x).square().sum())(X),
    "jvp": lambda m: jvp(m, (X,), (X.cos(),))[1],
    "vjp": lambda m: vjp(m, X)[1](X.sin())[0],
    "vmap of grad": lambda m: vmap(grad(lambda x: m(x[None]).square().sum()))(X),
    "double backward": lambda m: second(m),
    "checkpoint": lambda m: checkpoint(m, X, use_reentrant=False),
    "reentrant": lambda m: checkpoint(m, X.clone().requires_grad_(), use_reentrant=True),
    "empty": lambda m: m(X[:0]),
    "strided": lambda m: m(X.mT.contiguous().mT[::2]),
    "expanded": lambda m: m(X[:1].expand(4, 5, 8)),
}


def second(model):
    x = X.clone().requires_grad_()
    first, = torch.autograd.grad(model(x).pow(3).sum(), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)[0]


@pytest.mark.filterwarnings(
    "ignore:There is a performance drop because we have not yet implemented the batching rule"
)
@pytest.mark.parametrize("way", TRANSFORMS)
def test_transforms(base, way):
    model, twin = both(base)
    torch.testing.assert_close(TRANSFORMS[way](model), TRANSFORMS[way](twin), rtol=1e-9, atol=1e-9)


def test_gradients_of_adapters_by_functional_call(base):
    """Adapters as arguments of a function, as ensembles and hypernetworks have them."""
    model, _ = both(base)
    adapters = dict(lorafx.named_parameters(model))
    model(X).square().sum().backward()

    def loss(tensors):
        return functional_call(model, tensors, (X,)).square().sum()

    for name, gradient in grad(loss)({name: p.detach() for name, p in adapters.items()}).items():
        torch.testing.assert_close(gradient, adapters[name].grad, rtol=1e-9, atol=1e-9)


def test_checkpoint_sequential():
    model, twin = both(nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))).double())
    x = X.clone().requires_grad_()
    torch.testing.assert_close(checkpoint_sequential(model, 2, x, use_reentrant=False), twin(x))


HOOKS = {
    "register_forward_pre_hook": lambda module, args: (args[0] * 2,),
    "register_forward_hook": lambda module, args, output: output + args[0].sum(),
    "register_full_backward_pre_hook": lambda module, gradients: (gradients[0] * 3,),
    "register_full_backward_hook": lambda module, inputs, outputs: (inputs[0] * 5,)}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks(kind, when):
    """On a linear layer: earlier ones carry over, later ones see the adapted layer."""
    base = nn.Sequential(nn.Tanh(), nn.Linear(8, 8), nn.Tanh()).double()
    if when == "before":
        getattr(base[1], kind)(HOOKS[kind])
    model, twin = both(base)
    if when == "after":
        getattr(model[1], kind)(HOOKS[kind]), getattr(twin[1], kind)(HOOKS[kind])
    results = []
    for m in (model, twin):
        x = X.clone().requires_grad_()
        y = m(x)
        results += [(y, torch.autograd.grad(y.square().sum(), x)[0])]
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_attributes_changed_after_injection():
    model, twin = both(Break().double())
    for factor in (2.0, 0.0, -1.0):
        model.factor = twin.factor = factor
        torch.testing.assert_close(model(X), twin(X), rtol=1e-9, atol=1e-9)
    model.up.register_parameter("bias", None), twin.up.register_parameter("bias", None)
    torch.testing.assert_close(model(X), twin(X), rtol=1e-9, atol=1e-9)


def test_casts_and_moves(base):
    model, twin = both(base)
    narrow, wide = copy.deepcopy(model).float(), twin.float()
    torch.testing.assert_close(narrow(X.float()), wide(X.float()), rtol=1e-4, atol=1e-4)
    assert copy.deepcopy(model).to("meta")(X.to("meta")).shape == X.shape


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_layers_compiled_one_by_one():
    """No more graphs than the layers have without adapters."""
    def graphs(model):
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounter()
        for layer in model:
            layer.compile(backend=counter)
        model(X)
        return counter.frame_count

    base = nn.Sequential(*(Attention() for _ in range(6))).double()
    assert graphs(randomise(lorafx.inject(base, targets="linear"))) <= graphs(base)


def test_inference_mode_does_not_reach_the_adapters():
    base = nn.Linear(3, 3)
    before = fingerprint(base)
    with torch.inference_mode():
        model = lorafx.inject(base)
        lorafx.add(model, "b")
    lorafx.activate(model, ["default", "b"])
    model(torch.randn(2, 3)).sum().backward()
    assert all(p.grad is not None for p in lorafx.parameters(model)) and fingerprint(base) == before
