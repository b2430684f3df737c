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
        self.layers = nn.ModuleList([nn.Linear(3, 3)])
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


def looping(statement: str, site: str = "layers.0") -> Any:
    """The same with a statement."""
    names: dict[str, Any] = {"F": F, "by_another_file": by_another_file}
    exec(f"def forward(self, x):\n    if self.training: x = x * 1\n    {statement}\n    return x", names)
    model = type("Looping", (Base,), {"forward": names["forward"], "__module__": __name__})
    return pytest.param(model, site, id=statement)


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
    looping("for layer in self.layers: x = by_another_file(x, layer)"),
    looping("for i, layer in enumerate(self.layers): x = by_another_file(x, layer)"),
    looping("for layer in reversed(self.layers): x = F.linear(x, layer.weight)"),
    looping("x = by_another_file(x, self.layers[0])"),
    looping("me = self; same = me.layers; x = by_another_file(x, same[0])"),
    looping("layer = self.layers[0]; x = by_another_file(x, layer)"),
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
    looping("layer = self.fc; x = layer(x)", "fc"),
    looping("layer = self.fc if self.training else self.other; x = layer(x)", "fc"),
    looping("for layer in self.layers: x = layer(x)"),
    looping("for i, layer in enumerate(self.layers): x = layer(x) * (i + 1)"),
    looping("for layer, scale in zip(self.layers, (1, 2)): x = layer(x) * scale"),
    looping("x = self.layers[0](x) * len(self.layers)"),
    looping("kept = []; kept.append(self.layers[0](x)); kept.insert(0, x); x = kept.pop()"),
])
def test_innocent_python_is_not_suspected(model, site):
    base = model()
    injected = lorafx.inject(base, targets=site)
    before = injected(X)
    torch.nn.init.ones_(injected.get_submodule(site).lora.default.B)
    assert not torch.equal(injected(X), before)


def test_a_call_whose_result_is_lost_is_no_site():
    class Lost(Base):
        def forward(self, x):
            self.fc(x)
            F.linear(x, self.other.weight)
            return F.linear(x, self.child.weight)

    assert [site.name for site in lorafx.sites(torch.fx.symbolic_trace(Lost()), "linear")] == ["child"]
