"""Forwards that use what is outside of the model: globals, modes, random numbers, the screen."""

import copy
import enum
import random
import types
import typing
from typing import Any

import torch
import torch.nn.functional as F

from tests.support.untraceable import Settings, untraceable

SCALE = 2.0
TABLE = {"a": 1.0}


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


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


@untraceable("global `Reverse.apply`")
def autograd_function(self, x):
    return Reverse.apply(F.linear(x, self.w))


@untraceable("global `TABLE`", change=lambda model: TABLE.update(a=5.0))
def global_table(self, x):
    return F.linear(x, self.w) * TABLE["a"]


@untraceable("global `SCALE`")
def global_number(self, x):
    return F.linear(x, self.w) * SCALE


@untraceable("global `Settings.scale`")
def global_class_attribute(self, x):
    return F.linear(x, self.w) * Settings.scale


@untraceable("global `Pair`")
def named_tuple_output(self, x):
    return Pair(F.linear(x, self.w), x)


@untraceable("default")
def default_object(self, x, colour=Colour.RED):
    return F.linear(x, self.w) * colour.value


@untraceable("does not become a node")
def deep_copies(self, x):
    return copy.copy(F.linear(x, self.w))


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


@untraceable(
    "global `settings_module`", change=lambda model: setattr(settings_module, "scale", 5.0)
)
def module_alias(self, x):
    alias = settings_module
    return F.linear(x, self.w) * alias.scale


@untraceable("global `noted.scale`", change=lambda model: setattr(noted, "scale", 5.0))
def function_attribute(self, x):
    return F.linear(x, self.w) * noted.scale


@untraceable("does not become a node")
def global_bound_method(self, x):
    log(x)
    return F.linear(x, self.w)


@untraceable("random")
def python_random(self, x):
    random.seed(3)
    return F.linear(x, self.w) * random.random()


enclosing = untraceable("`scale` of an enclosing function")(enclosed(2.0))
