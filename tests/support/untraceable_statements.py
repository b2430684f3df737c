"""Forwards with statements, signatures or containers that a graph has no place for."""

import contextlib

import torch
import torch.nn.functional as F

from tests.support.untraceable import rows, untraceable


@untraceable("stores an attribute")
def stores_state(self, x):
    self.aux = x.sum()
    return F.linear(x, self.w)


@untraceable("stores an item")
def stores_an_item(self, x):
    y = F.linear(x, self.w)
    y[..., 0] = 0
    return y


@untraceable("with")
def no_grad_block(self, x):
    with torch.no_grad():
        y = F.linear(x, self.w)
    return self.fc(y)


@untraceable("variadic")
@torch.no_grad()
def no_grad_decorator(self, x):
    return F.linear(x, self.w)


@untraceable("with")
def autocast_block(self, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.linear(x.float(), self.w.float())


@untraceable("try")
def catches(self, x):
    try:
        return F.linear(x.view(4, 2, 3), self.w)
    except RuntimeError:
        return F.linear(x, self.w) * 2


@untraceable("place", (rows(2),))
def augmented_assignment(self, x):
    y = F.linear(x, self.w)
    y += x
    return y


@untraceable("variadic", (rows(2),), (rows(2), 2.0))
def variadic(self, x, *scales):
    return F.linear(x, self.w) * sum(scales, 1.0)


@untraceable("keyword-only")
def keyword_only(self, x, *, scale=2.0):
    return F.linear(x, self.w) * scale


@untraceable("imports")
def imports(self, x):
    import math
    return F.linear(x, self.w) * math.pi


@untraceable("defines a function")
def closure(self, x):
    scale = 2.0
    return F.linear(x, self.w) * (lambda: scale)()


@untraceable("`with` block")
def suppresses(self, x):
    with contextlib.suppress(RuntimeError):
        return F.linear(x, self.w)


@untraceable("`with` block")
def warns(self, x):
    import warnings
    with warnings.catch_warnings(action="ignore"):
        warnings.warn("called", stacklevel=1)
    return F.linear(x, self.w)


@untraceable("returns a generator")
def generates(self, x):
    yield F.linear(x, self.w)


@untraceable("a list or dict to a callee that could change it")
def list_read_after_a_child(self, x):
    kept = [x.sum()]
    y = self.accumulate(F.linear(x, self.w), kept)
    return y * kept[-1]


@untraceable("one list twice")
def list_returned_twice(self, x):
    both = [F.linear(x, self.w), x]
    return torch.cat(both), both


@untraceable("a list or dict to a callee that could change it")
def list_filled_by_a_child(self, x):
    kept = []
    y = self.accumulate(F.linear(x, self.w), kept)
    return y, kept


@untraceable("its class or of a child's class")
def method_of_a_child(self, x):
    return self.project.project(F.linear(x, self.w))


@untraceable("argument 'input_1' has a name", (rows(2), rows(2)))
def renamed_arguments(self, input, input_1):
    return F.linear(input, self.w) - input_1


@untraceable("argument 'torch' has a name", (rows(2), 2.0))
def argument_called_torch(self, x, torch):
    return F.linear(x, self.w) * torch


@untraceable("takes no self|variadic")
def no_self(*args):
    return F.linear(args[1], args[0].w)


@untraceable("does not hand on its argument 'weight'", (rows(2), rows(2)))
def argument_that_torch_drops(self, x, y):
    return F.l1_loss(F.linear(x, self.w), y, weight=y)
