"""No silent site: a weight that Python uses past its owner's forward is left alone and named, however it gets there."""

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import by_another_file
from torch import nn

import lorafx

X = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))


class Operations:
    def run(self, x, layer):
        return F.linear(x, layer.weight)


class Given(nn.Module):
    def forward(self, x, layer):
        return F.linear(x, layer.weight)


class Projecting(nn.Linear):
    def project(self, x):
        return F.linear(x, self.weight)


def decorated(function):
    def wrapper(self, *args):
        return function(self, *args)
    return wrapper


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.child, self.given, self.other = nn.Linear(3, 3), Projecting(3, 3), Given(), nn.Linear(3, 3)
        self.operations = Operations()
        self.list = nn.ParameterList([self.fc.weight])
        self.prepare()

    def prepare(self) -> None:
        pass

    @functools.cached_property
    def matrix(self):
        return self.fc.weight


def using(expression: str, site: str = "fc", prepare: Any = None) -> Any:
    """A class whose forward computes an expression in a loop, and the site that it uses past its owner."""
    names: dict[str, Any] = {"F": F, "nn": nn, "by_another_file": by_another_file}
    exec(f"def forward(self, x):\n    for _ in range(2): x = {expression}\n    return x", names)
    extra = {} if prepare is None else {"prepare": prepare}
    model = type("Using", (Base,), {"forward": names["forward"], "__module__": __name__, **extra})
    return pytest.param(model, site, id=expression)


class Wrapped(Base):
    @decorated
    def forward(self, x):
        return F.linear(x, self.fc.weight)


def keep_bound(self):
    self.kept = self.fc.forward


def keep_nested(self):
    self.kept = {"w": [self.fc.weight]}


class Holder:
    def __init__(self, weight):
        self.weight = weight

    def run(self, x):
        return F.linear(x, self.weight)


def keep_in_an_object(self):
    self.kept = Holder(self.fc.weight)


def keep_partial(self):
    self.kept = functools.partial(F.linear, weight=self.fc.weight)


@pytest.mark.parametrize("model, site", [
    using("F.linear(x, self.fc.weight)"),
    using("by_another_file(x, self.fc)"),
    using("self.operations.run(x, self.fc)"),
    using("self.given(x, self.fc)"),
    using("self.child.project(x)", "child"),
    using("F.linear(x, self.matrix)"),
    using("F.linear(x, getattr(self.fc, 'weight'))"),
    using("F.linear(x, self.fc._parameters['weight'])"),
    using("F.linear(x, self.get_parameter('fc.weight'))"),
    using("F.linear(x, next(self.fc.parameters()))"),
    using("F.linear(x, dict(self.named_parameters())['fc.weight'])"),
    using("F.linear(x, self.fc.state_dict()['weight'])"),
    using("F.linear(x, self.list[0])"),
    using("nn.Linear.forward(self.fc, x)"),
    using("(lambda: F.linear(x, self.fc.weight))()"),
    using("[F.linear(x, layer.weight) for layer in [self.fc]][0]"),
    using("[self.child][0].project(x)", "child"),
    using("self.kept(x)", prepare=keep_bound),
    using("F.linear(x, self.kept['w'][0])", prepare=keep_nested),
    using("self.kept.run(x)", prepare=keep_in_an_object),
    using("self.kept(x)", prepare=keep_partial),
    pytest.param(Wrapped, "fc", id="decorator"),
])
def test_left_alone_and_named(model, site):
    with pytest.raises(lorafx.NoSiteError, match=f"'{site}' cannot be adapted: the Python of .* may use its weight"):
        lorafx.inject(model(), targets=site)
    model().forward(X)


@pytest.mark.parametrize("model, site", [
    using("self.fc(x)"),
    using("self.fc(x).to(self.fc.weight.dtype)"),
    using("self.fc(x) if isinstance(self.fc.weight, nn.Parameter) else x"),
    using("self.fc(x) if self.fc is not None else x"),
    using("self.fc(*[x])"),
    using("self.fc(x.to(next(self.parameters()).dtype))"),
    using("self.fc.forward(x)"),
])
def test_innocent_python_is_not_suspected(model, site):
    base = model()
    injected = lorafx.inject(base, targets=site)
    before = injected(X)
    torch.nn.init.ones_(injected.fc.lora.default.B)
    assert not torch.equal(injected(X), before)


def test_a_call_whose_result_is_lost_is_no_site():
    class Lost(Base):
        def forward(self, x):
            self.fc(x)
            F.linear(x, self.other.weight)
            return F.linear(x, self.child.weight)

    assert [site.name for site in lorafx.sites(torch.fx.symbolic_trace(Lost()), "linear")] == ["child"]
