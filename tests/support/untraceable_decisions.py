"""Forwards in which Python branches, loops or computes by what it knows of a value."""

import torch
import torch.nn.functional as F

from tests.support.untraceable import rows, untraceable


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


@untraceable("iterates")
def rank_of_the_input(self, x):
    return F.linear(x, self.w).reshape(*x.shape, 1)


@untraceable("truth, text, length or hash", (rows(2), "a"), (rows(2), "b"))
def lookup_by_a_value(self, x, key):
    return F.linear(x, self.w) * {"a": 1.0, "b": 2.0}[key]


@untraceable("place", (rows(2), 4), (rows(2), 5))
def augmented_number(self, x, n):
    m = n
    m += 1
    return F.linear(x, self.w) * m * n


@untraceable("len")
def length(self, x):
    return F.linear(x, self.w) * len(x)


@untraceable("global `float`")
def item_as_a_number(self, x):
    return F.linear(x, self.w) * float(self.counter.item())


@untraceable("UNARY_NOT")
def negates(self, x):
    return F.linear(x, self.w) * (not self.training)


@untraceable("unpacks with a star")
def unpacks_with_a_star(self, x):
    _, *rest = x.shape
    return F.linear(x, self.w).reshape(-1, *rest)


@untraceable("compares or asks something of a module")
def compares_children(self, x):
    return F.linear(x, self.w) * (self.project == self.accumulate)


@untraceable("has_torch_function")
def asks_for_overrides(self, x):
    return F.linear(x, self.w) * torch.overrides.has_torch_function((x,))


@untraceable("a tuple is a key")
def tuple_as_a_key(self, x):
    return {(1, 2): F.linear(x, self.w)}
