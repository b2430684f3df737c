"""No silent site: Python past the owner's forward sees a weight adapted, or it is named."""

import functools
import linecache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lorafx
from tests.support.models import by_another_file
from tests.support.oracle import factors_of, frozen, oracle, randomise

X = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


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
        self.fc, self.child, self.given, self.other = (
            nn.Linear(3, 3), Projecting(3, 3), Given(), nn.Linear(3, 3)
        )
        self.operations = Operations()
        self.layers = nn.ModuleList([nn.Linear(3, 3)])
        self.w, self.stack = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(2, 3, 3))
        self.list = nn.ParameterList([nn.Parameter(torch.randn(3, 3))])
        self.prepare()

    def prepare(self) -> None:
        pass

    @property
    def matrix(self):
        return self.fc.weight


def with_forward(body: str, site: str, name: str, prepare: Any) -> Any:
    """A class whose forward has these lines, its source readable, and the site that it uses."""
    names: dict[str, Any] = {
        "F": F, "nn": nn, "torch": torch, "by_another_file": by_another_file, "__name__": __name__
    }
    source = (
        "def forward(self, x):\n"
        + "".join(f"    {line}\n" for line in body.splitlines())
        + "    return x\n"
    )
    filename = f"<silent {abs(hash(source))}>"
    linecache.cache[filename] = len(source), None, source.splitlines(keepends=True), filename
    exec(compile(source, filename, "exec"), names)
    extra = {} if prepare is None else {"prepare": prepare}
    model = type("Using", (Base,), {"forward": names["forward"], "__module__": __name__, **extra})
    return pytest.param(model, site, id=name)


def using(expression: str, site: str = "fc", prepare: Any = None) -> Any:
    """A forward that computes an expression in a loop."""
    return with_forward(f"for _ in range(2): x = {expression}", site, expression, prepare)


def looping(statement: str, site: str = "layers.0") -> Any:
    """A forward with a statement."""
    return with_forward(f"if self.training: x = x * 1\n{statement}", site, statement, None)


class Wrapped(Base):
    @decorated
    def forward(self, x):
        return F.linear(x, self.fc.weight)


def keep_in_a_list(self):
    self.list = nn.ParameterList([self.fc.weight])


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


# Python that uses a weight past the layer that owns it, however it gets there.
USES = [
    using("F.linear(x, self.fc.weight)"), using("torch.addmm(self.fc.bias, x, self.fc.weight.t())"),
    using("torch.einsum('bi,oi->bo', x, self.fc.weight)"), using("(self.fc.weight @ x.T).T"),
    using("F.linear(x, self.fc.weight * 2 + 1)"),
    using("F.linear(x, self.fc.weight.clone().detach())"), using("x @ self.w", "w"),
    using("torch.matmul(x, self.w.T)", "w"), using("F.linear(x, self.stack[1])", "stack"),
    using("torch.bmm(x.unsqueeze(0).expand(2, -1, -1), self.stack).sum(0)", "stack"),
    using("F.linear(x, self.list[0])", "list.0"),
    using("F.linear(x, self.list[0])", "fc", prepare=keep_in_a_list),
    using("by_another_file(x, self.fc)"), using("self.operations.run(x, self.fc)"),
    using("self.given(x, self.fc)"), using("self.child.project(x)", "child"),
    using("F.linear(x, self.matrix)"), using("F.linear(x, getattr(self.fc, 'weight'))"),
    using("F.linear(x, self.get_submodule('fc').weight)"),
    using("by_another_file(x, next(self.children()))"),
    using("by_another_file(x, dict(self.named_modules())['layers.0'])", "layers.0"),
    using("nn.Linear.forward(self.fc, x)"), using("(lambda: F.linear(x, self.fc.weight))()"),
    using("[F.linear(x, layer.weight) for layer in [self.fc]][0]"),
    using("[self.child][0].project(x)", "child"),
    looping("for layer in self.layers: x = by_another_file(x, layer)"),
    looping("for i, layer in enumerate(self.layers): x = by_another_file(x, layer)"),
    looping("for layer in reversed(self.layers): x = F.linear(x, layer.weight)"),
    looping("x = by_another_file(x, self.layers[0])"),
    looping("me = self; same = me.layers; x = by_another_file(x, same[0])"),
    using("self.kept(x)", prepare=keep_bound), pytest.param(Wrapped, "fc", id="decorator"),
    using("self.fc(x)"), using("self.fc(x).to(self.fc.weight.dtype)"),
    using("self.fc(x) if self.fc is not None else x"), using("self.fc(*[x])"),
    using("self.fc(x.to(next(self.parameters()).dtype))"), using("self.fc.forward(x)"),
    looping("layer = self.fc; x = layer(x)", "fc"),
    looping("layer = self.fc if self.training else self.other; x = layer(x)", "fc"),
    looping("for layer in self.layers: x = layer(x)"),
    looping("for layer, scale in zip(self.layers, (1, 2)): x = layer(x) * scale"),
    looping("kept = []; kept.append(self.layers[0](x)); kept.insert(0, x); x = kept.pop()")
]


@pytest.mark.parametrize("model, site", USES)
def test_python_reads_adapted_weights(model, site):
    """What Python does with a weight, it does with W + s B A: outputs and gradients agree."""
    base = model().double()
    injected = lorafx.inject(base, rank=2, targets=site)
    found = lorafx.sites(base, site)
    assert torch.equal(injected(X), frozen(base)(X)) and len(found) == 1
    randomise(injected)
    factors = factors_of(injected, {"default": 1.0})
    result, expected = injected(X), oracle(base, found, factors, X)
    assert not torch.equal(result, base(X))
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(lorafx.merge(injected)(X), result, rtol=1e-10, atol=1e-12)
    tensors = [tensor for parts in factors.values() for part in parts for tensor in part[:2]]
    if "detach" not in str(model.forward.__code__.co_names):
        for got, wanted in zip(torch.autograd.grad(result.square().sum(), tensors),
                               torch.autograd.grad(expected.square().sum(), tensors)):
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_an_adapted_weight_is_still_a_parameter_to_python():
    weight = lorafx.inject(nn.Linear(3, 4), targets="linear").weight
    assert isinstance(weight, nn.Parameter)
    assert isinstance(weight, torch.Tensor)
    assert weight.shape == (4, 3)
    assert weight.dtype == torch.float32
    assert not weight.requires_grad
    assert weight.new_zeros(2).shape == (2,)


@pytest.mark.parametrize("model, site", [
    using("F.linear(x, self.fc._parameters['weight'])"),
    using("F.linear(x, next(self.fc.parameters()))"),
    using("F.linear(x, dict(self.named_parameters())['fc.weight'])"),
    using("F.linear(x, self.fc.state_dict()['weight'])"),
    using("F.linear(x, self.kept['w'][0])", prepare=keep_nested),
    using("self.kept.run(x)", prepare=keep_in_an_object),
    using("self.kept(x)", prepare=keep_partial),
])
def test_a_weight_fetched_past_its_owner_is_left_alone_and_named(model, site):
    with pytest.raises(
        lorafx.NoSiteError, match=f"'{site}' cannot be adapted: the Python of .* past its owner"
    ):
        lorafx.inject(model(), targets=site)
    model()(X.float())


def test_a_call_whose_result_is_lost_is_no_site():
    class Lost(Base):
        def forward(self, x):
            self.fc(x)
            F.linear(x, self.other.weight)
            return F.linear(x, self.child.weight)

    assert [site.name for site in lorafx.sites(torch.fx.symbolic_trace(Lost()), "linear")] == [
        "child"
    ]
