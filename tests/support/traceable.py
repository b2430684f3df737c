"""Forwards in which Python has nothing to decide, and which must become regions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.untraceable import rows

TRACEABLE: list[Any] = []


def traceable(
    *calls: Any, change: Callable[[nn.Module], Any] | None = None
) -> Callable[[Any], Any]:
    """Register a forward that has nothing to decide and must become a region."""
    def register(forward: Any) -> Any:
        TRACEABLE.append(
            pytest.param(forward, calls or [(rows(2),), (rows(4, 2),)], change, id=forward.__name__)
        )
        return forward
    return register


@traceable()
def mode_as_an_argument(self, x):
    return F.dropout(F.linear(x, self.w), 0.5, self.training) + F.dropout(x, training=self.training)


@traceable(change=lambda model: setattr(model, "scale", 7.0))
def attribute_read_live(self, x):
    return F.linear(x, self.w) * self.scale


@traceable(change=lambda model: setattr(model.settings, "scale", 7.0))
def object_read_live(self, x):
    return F.linear(x, self.w) * self.settings.scale


@traceable(change=lambda model: setattr(model, "scale", 7.0))
def property_read_live(self, x):
    return F.linear(x, self.w) * self.computed


@traceable()
def list_appended_to(self, x):
    self.calls.append(x.sum())
    return F.linear(x, self.w) * self.calls[-1]


@traceable()
def buffer_counted(self, x):
    self.counter.add_(1)
    return F.linear(x, self.w) * self.counter


@traceable((rows(2, 3),), (rows(1, 3),))
def sizes(self, x):
    b, t, c = x.shape
    return F.linear(x.view(b * t, c), self.w).view(b, t, -1) * x.size(0)


@traceable((rows(2),))
def shape_read_before_it_changes(self, x):
    y = F.linear(x, self.w)
    shape = y.shape
    y.unsqueeze_(0)
    return y.view(shape)


@traceable((rows(2),))
def in_place_method(self, x):
    y = F.linear(x, self.w)
    y.mul_(2)
    return {"y": y, "list": [y + 1, (x, None, 2.0)]}


def helper(x, factor=2.0):
    return torch.relu(x) * factor


@traceable()
def calls_a_helper(self, x, scale=1.5):
    return helper(F.linear(x, self.w), factor=3.0) * scale + helper(self.fc(x))


@traceable()
def random_like(self, x):
    return F.linear(x, self.w) + torch.rand_like(x)


@traceable((torch.randn(2, 3, 3, dtype=torch.float64),))
def unpacks_a_tensor(self, x):
    first, second = F.linear(x, self.w)
    return first - second


@traceable((rows(2),))
def method_looked_up_before_its_arguments(self, x):
    return self.settings.act(self.settings.turn(F.linear(x, self.w)))


@traceable((rows(2),), (rows(2), 3.0))
def own_method(self, x, scale=1.5):
    return self.helped(F.linear(x, self.w), scale)
