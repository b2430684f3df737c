"""Forwards in which Python decides something, at least one of each kind.

Each makes a linear call of its own, so that a tracer that accepted it would write a branch into it,
and comes with argument lists to call it with, chosen to change what Python decides.
"""

import contextlib
import copy
import enum
import random
import types
import typing
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

UNTRACEABLE: list[Any] = []
SCALE = 2.0
TABLE = {"a": 1.0}


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Settings:
    scale = 3.0

    def __init__(self) -> None:
        self.act = torch.tanh

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        self.act = torch.relu
        return x


class Pair(typing.NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return -gradient


def rows(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, 3, dtype=dtype, generator=torch.Generator().manual_seed(len(shape)))


def untraceable(
    reason: str, *calls: Any, change: Callable[[nn.Module], Any] | None = None
) -> Callable[[Any], Any]:
    """Register a forward with the reason why it must be refused, and argument lists for calls."""
    def register(forward: Any) -> Any:
        arguments = calls or [(rows(2),), (rows(4, 2),)]
        UNTRACEABLE.append(pytest.param(forward, reason, arguments, change, id=forward.__name__))
        return forward
    return register


def build(forward: Any) -> nn.Module:
    own = {"forward": forward, "helped": lambda self, x, scale: x * scale, "__module__": __name__,
           "computed": property(lambda self: self.scale if self.training else 3.0)}
    model = type("Untraceable", (nn.Module,), own)()
    model.fc = nn.Linear(3, 3)
    model.w = nn.Parameter(torch.randn(3, 3))
    model.register_buffer("counter", torch.zeros(()))
    model.settings, model.scale, model.calls, model.aux = Settings(), 2.0, [], None
    model.accumulate, model.project = Accumulating(), Project()
    return model.double()


@untraceable("branches")
def reads_the_mode(self, x):
    return F.linear(x, self.w) if self.training else self.fc(x)


@untraceable("branches", (rows(2),), (rows(2), rows(2)))
def optional_input(self, x, mask=None):
    x = F.linear(x, self.w)
    return x if mask is None else x * mask


@untraceable("identities", (rows(2),), (rows(2), rows(2)))
def identity_as_a_value(self, x, mask=None):
    return F.linear(x, self.w) * (mask is None)


@untraceable("loops", (rows(2), 1), (rows(2), 3))
def loops_over_an_input(self, x, n):
    for _ in range(n):
        x = F.linear(x, self.w)
    return x


@untraceable("branches", (rows(2),), ((rows(2), rows(2)),))
def type_of_an_input(self, x):
    return F.linear(x[0] if isinstance(x, tuple) else x, self.w)


@untraceable("isinstance", (rows(2), 1.0), (rows(2), 1))
def isinstance_as_a_value(self, x, n):
    return F.linear(x, self.w) * isinstance(n, int)


@untraceable("global `type`", (rows(2), 1.0), (rows(2), 1))
def type_as_a_value(self, x, n):
    return F.linear(x, self.w) * (type(n) == int)  # noqa: E721


@untraceable("hasattr", (rows(2), 1.0), (rows(2), 1))
def hasattr_as_a_value(self, x, n):
    return F.linear(x, self.w) * hasattr(n, "numerator") * hasattr(n, "hex")


@untraceable("__class__", (rows(2), 1.0), (rows(2), 1))
def class_attribute_as_a_value(self, x, n):
    return F.linear(x, self.w) * (n.__class__ == int)


@untraceable("builds a set")
def dtype_in_a_set(self, x):
    return F.linear(x, self.w) * (x.dtype in {torch.float32, torch.float16})


@untraceable("global `str`")
def text_of_the_device(self, x):
    return F.linear(x, self.w) * (str(x.device) == "cpu")


@untraceable("formats text")
def formats_a_value(self, x):
    return F.linear(x, self.w) * (f"{x.device}" == "cpu")


@untraceable("stores an attribute")
def stores_state(self, x):
    self.aux = x.sum()
    return F.linear(x, self.w)


@untraceable("stores an item")
def stores_an_item(self, x):
    y = F.linear(x, self.w)
    y[..., 0] = 0
    return y


@untraceable("iterates")
def rank_of_the_input(self, x):
    return F.linear(x, self.w).reshape(*x.shape, 1)


@untraceable("arange")
def constant_tensor(self, x):
    return F.linear(x, self.w) + torch.arange(3)


@untraceable("rand")
def random_call(self, x):
    return F.linear(x, self.w) + torch.rand(3)


@untraceable("is_grad_enabled")
def ambient_state(self, x):
    return F.linear(x, self.w) * torch.is_grad_enabled()


@untraceable("is_grad_enabled")
def ambient_state_returned(self, x):
    return F.linear(x, self.w), torch.is_grad_enabled()


@untraceable("print")
def prints(self, x):
    print("called")
    return F.linear(x, self.w)


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


@untraceable("global `Reverse.apply`")
def autograd_function(self, x):
    return Reverse.apply(F.linear(x, self.w))


@untraceable("try")
def catches(self, x):
    try:
        return F.linear(x.view(4, 2, 3), self.w)
    except RuntimeError:
        return F.linear(x, self.w) * 2


@untraceable("global `TABLE`", change=lambda model: TABLE.update(a=5.0))
def global_table(self, x):
    return F.linear(x, self.w) * TABLE["a"]


@untraceable("global `SCALE`")
def global_number(self, x):
    return F.linear(x, self.w) * SCALE


@untraceable("global `Settings.scale`")
def global_class_attribute(self, x):
    return F.linear(x, self.w) * Settings.scale


@untraceable("truth, text, length or hash", (rows(2), "a"), (rows(2), "b"))
def lookup_by_a_value(self, x, key):
    return F.linear(x, self.w) * {"a": 1.0, "b": 2.0}[key]


@untraceable("place", (rows(2),))
def augmented_assignment(self, x):
    y = F.linear(x, self.w)
    y += x
    return y


@untraceable("place", (rows(2), 4), (rows(2), 5))
def augmented_number(self, x, n):
    m = n
    m += 1
    return F.linear(x, self.w) * m * n


@untraceable("global `Pair`")
def named_tuple_output(self, x):
    return Pair(F.linear(x, self.w), x)


@untraceable("len")
def length(self, x):
    return F.linear(x, self.w) * len(x)


@untraceable("global `float`")
def item_as_a_number(self, x):
    return F.linear(x, self.w) * float(self.counter.item())


@untraceable("variadic", (rows(2),), (rows(2), 2.0))
def variadic(self, x, *scales):
    return F.linear(x, self.w) * sum(scales, 1.0)


@untraceable("keyword-only")
def keyword_only(self, x, *, scale=2.0):
    return F.linear(x, self.w) * scale


@untraceable("default")
def default_object(self, x, colour=Colour.RED):
    return F.linear(x, self.w) * colour.value


@untraceable("imports")
def imports(self, x):
    import math
    return F.linear(x, self.w) * math.pi


@untraceable("defines a function")
def closure(self, x):
    scale = 2.0
    return F.linear(x, self.w) * (lambda: scale)()


@untraceable("UNARY_NOT")
def negates(self, x):
    return F.linear(x, self.w) * (not self.training)


@untraceable("unpacks with a star")
def unpacks_with_a_star(self, x):
    _, *rest = x.shape
    return F.linear(x, self.w).reshape(-1, *rest)


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


@untraceable("does not become a node")
def deep_copies(self, x):
    return copy.copy(F.linear(x, self.w))


@untraceable("returns a generator")
def generates(self, x):
    yield F.linear(x, self.w)


def noted(x):
    return torch.relu(x)


noted.scale = 2.0
settings_module = types.ModuleType("settings_module")
settings_module.scale = 2.0
log = [].append


def enclosed(scale):
    def forward(self, x):
        return F.linear(x, self.w) * scale
    return forward


class Accumulating(nn.Module):
    def forward(self, x, into):
        into.append(x.sum())
        return x * 2


class Project(nn.Module):
    def project(self, x):
        return x * 3


@untraceable("compares or asks something of a module")
def compares_children(self, x):
    return F.linear(x, self.w) * (self.project == self.accumulate)


@untraceable(
    "global `settings_module`", change=lambda model: setattr(settings_module, "scale", 5.0)
)
def module_alias(self, x):
    alias = settings_module
    return F.linear(x, self.w) * alias.scale


@untraceable("global `noted.scale`", change=lambda model: setattr(noted, "scale", 5.0))
def function_attribute(self, x):
    return F.linear(x, self.w) * noted.scale


@untraceable("has_torch_function")
def asks_for_overrides(self, x):
    return F.linear(x, self.w) * torch.overrides.has_torch_function((x,))


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


@untraceable("does not become a node")
def global_bound_method(self, x):
    log(x)
    return F.linear(x, self.w)


@untraceable("does not hand on its argument 'weight'", (rows(2), rows(2)))
def argument_that_torch_drops(self, x, y):
    return F.l1_loss(F.linear(x, self.w), y, weight=y)


@untraceable("random")
def python_random(self, x):
    random.seed(3)
    return F.linear(x, self.w) * random.random()


@untraceable("a tuple is a key")
def tuple_as_a_key(self, x):
    return {(1, 2): F.linear(x, self.w)}


enclosing = untraceable("`scale` of an enclosing function")(enclosed(2.0))
