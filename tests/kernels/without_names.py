"""Computes with lorafx in many ways, once for each private name of torch, which it finds missing.

It does when it is imported; then the name is there again, for torch itself. Prints {name: what
lorafx says} as JSON, of the names that it cannot do without.
"""

import contextlib
import importlib
import json
import pkgutil
import sys

import torch
import torch.utils.checkpoint
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx


class Missing:
    """What a class has in the place of an attribute that it lacks."""

    def __get__(self, *_):
        raise AttributeError


@contextlib.contextmanager
def lacking(name):
    """torch without this name, `module:path`."""
    module, _, path = name.partition(":")
    *owners, last = path.split(".")
    if owners[:1] == ["ops"]:  # an overload is looked up again; an operator is kept
        last = owners.pop()
    owner = pkgutil.resolve_name(f"{module}:{'.'.join(owners)}" if owners else module)
    kept = vars(owner).get(last)
    if kept is not None and not isinstance(owner, type) and owners[:1] != ["ops"]:
        delattr(owner, last)
    else:
        setattr(owner, last, Missing())
    try:
        yield
    finally:
        if kept is None:  # a class of C has it
            delattr(owner, last)
        else:
            setattr(owner, last, kept)


class Reading(nn.Linear):
    """Python that reads its weight."""

    def forward(self, x):
        if x.ndim:
            return x @ self.weight.T
        return x


def fill(model, lorafx):
    for number, factor in enumerate(lorafx.parameters(model)):
        values = torch.arange(factor.numel(), dtype=torch.float64)
        factor.data = (values + number).sin().view(factor.shape).to(factor.dtype)
    return model


def results(lorafx):
    """What lorafx computes in many ways, by name."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    model, x = fill(lorafx.inject(base, targets="linear"), lorafx), torch.randn(3, 2, 6).double()

    def function(x):
        return model(x).sin().sum()

    loss = function(x)
    gradients = torch.autograd.grad(loss, list(lorafx.parameters(model)), create_graph=True)
    found = {"loss": loss, "gradients": gradients[0], "merged": lorafx.merge(model)(x)}
    found["second"] = torch.autograd.grad(gradients[0].square().sum(), model[0].lora.default.B)[0]
    found["jvp"] = torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]
    found["vmap"] = torch.vmap(model)(x)
    batch = torch.eye(24).view(24, 3, 2, 4).double()
    given = x.clone().requires_grad_()
    found["batched"] = torch.autograd.grad(model(given), given, batch, is_grads_batched=True)[0]
    keep = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    checkpoints = torch.utils.checkpoint.create_selective_checkpoint_contexts
    given = x.clone().requires_grad_()
    kept = torch.utils.checkpoint.checkpoint(
        model, given, use_reentrant=False, context_fn=lambda: checkpoints(keep))
    found["checkpoint"] = torch.autograd.grad(kept.pow(3).sum(), given)[0]
    with torch.autocast("cpu", torch.bfloat16):
        small = nn.Sequential(nn.Linear(6, 4)).float()
        single = fill(lorafx.inject(small, targets="linear"), lorafx)
        found["autocast"] = single(x.float()).float()
    if lorafx.summary(model).breaks:  # Python reads weights there, and calls no branch
        return {name: value.detach() for name, value in found.items()}
    found["traced"] = torch.jit.trace(model, x, check_trace=False)(2 * x)
    found["make_fx"] = make_fx(model)(x)(2 * x)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, result: result + 1 if type(module).__name__ == "Branch" else None)
    found["hooked"] = model(x)
    handle.remove()
    return {name: value.detach() for name, value in found.items()}


def reading(lorafx):
    """What Python computes with an adapted weight."""
    torch.manual_seed(0)
    model = fill(lorafx.inject(Reading(4, 3).double(), targets="linear"), lorafx)
    x = torch.randn(2, 4).double()
    return {"read": model(x).detach(), "whole": (model.weight * 2).detach()}


def fresh():
    """lorafx, imported again."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "lorafx"]:
        del sys.modules[name]
    importlib.import_module("lorafx._kernels.private")
    return importlib.import_module("lorafx")


def check(got, wanted):
    for key, value in got.items():
        # other operators round bfloat16 at other places
        close = {"rtol": 0.1, "atol": 0.05} if key == "autocast" else {}
        torch.testing.assert_close(value, wanted[key], msg=lambda text: f"{key}: {text}", **close)


def main():
    lorafx = fresh()
    names = list(sys.modules["lorafx._kernels.private"].AVAILABLE)
    wanted, wanted_reading = results(lorafx), reading(lorafx)
    said = {}
    for name in names:
        with lacking(name):
            lorafx = fresh()
        found = sys.modules["lorafx._kernels.private"].AVAILABLE
        assert [key for key in found if not found[key]] == [name], found
        try:
            check(results(lorafx), wanted)
            check(reading(lorafx), wanted_reading)
        except NotImplementedError as error:
            said[name] = str(error)
    print(json.dumps(said))


if __name__ == "__main__":
    main()
