"""Weights that enter a forward in unusual ways, beside their own linear call or in its place."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import fx, nn
from torch.func import functional_call

import lorafx
from tests.support.oracle import Oracle, factors_of, frozen, oracle, randomise

X = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TOKENS = torch.tensor([0, 3, 0, 3, 7])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.w, self.v = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))
        self.e = nn.Parameter(torch.randn(4, 2, 8))
        self.embedding = nn.Embedding(10, 8, padding_idx=0, scale_grad_by_freq=True)


def net(function):
    return type("Net", (Net,), {"forward": function, "__module__": __name__})


def addend(self, x):
    if x.ndim:
        return torch.addmm(self.w, F.pad(x, (0, 0, 0, 3)), self.w) + torch.addmm(
            self.v, self.w, self.v.T
        )


def masked_experts(self, x):
    if x.ndim:
        rows = self.e[torch.tensor([[True, False], [True, True], [False, False], [False, True]])]
        return F.linear(x, rows) + F.linear(x, self.e[1])[:, :1]


def padded_embedding(self, x):
    if x.ndim:
        return F.linear(self.embedding(TOKENS) + x, self.embedding.weight)


def heads(self, x):
    if x.ndim:
        return x @ self.w + torch.einsum("bi,hdi->bhd", x, self.w.unflatten(0, (2, 4))).flatten(1)


def keywords(self, x):
    if x.ndim:
        swapped = torch.transpose(input=self.w, dim0=0, dim1=1)
        return x @ swapped + F.linear(x, torch.chunk(input=self.w, chunks=2)[0]).repeat(1, 2)


def some_rows(self, x):
    if x.ndim:
        return F.linear(x, self.v[:3])


@pytest.mark.parametrize(
    "forward", [addend, masked_experts, padded_embedding, heads, keywords, some_rows]
)
def test_outputs_and_gradients(forward):
    base = net(forward)().double()
    model = randomise(lorafx.inject(base, rank=2, targets="linear"))
    sites, factors = lorafx.sites(base), factors_of(model, {"default": 1.0})
    twin = Oracle(base, sites, factors)
    torch.testing.assert_close(model(X), twin.model(X), rtol=1e-9, atol=1e-9)
    for m in (model, twin.model):
        m(X).square().sum().backward()
    tensors = [tensor for site in sites for part in factors[site.name] for tensor in part[:2]]
    got = [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors]
    torch.testing.assert_close(got, twin.gradients(), rtol=1e-8, atol=1e-8)


def clamps_a_view(self, x):
    if x.ndim:
        with torch.no_grad():
            self.fc.weight.view(-1).clamp_(-0.05, 0.05)
        return self.fc(x)


def zeroes_a_row(self, x):
    if x.ndim:
        self.fc.weight.data[0].zero_()
        return self.fc(x)


@pytest.mark.parametrize("forward", [clamps_a_view, zeroes_a_row])
def test_writing_into_a_view_is_refused(forward):
    with pytest.raises(lorafx.AdaptedWeightError, match="writes into a view of a weight"):
        lorafx.inject(net(forward)().double(), targets="fc")(X)


def substitutes(self, x):
    if x.ndim:
        return functional_call(self.fc, {"weight": self.fc.weight / 2}, (x,))


def by_text(self, x):
    if x.ndim:
        return self.fc(x) @ vars(self.fc)["_parameters"]["weight"]


@pytest.mark.parametrize("forward", [substitutes, by_text])
def test_what_would_miss_the_branch_is_left_alone(forward):
    with pytest.raises(
        lorafx.NoSiteError,
        match="'fc' cannot be adapted: the Python of the model .* past its owner",
    ):
        lorafx.inject(net(forward)().double(), targets="fc")


def scaled_by_weight(self, x):
    return self.fc(x) * self.fc.weight.abs().sum()


class Holder(nn.Module):
    """Python beside a GraphModule, which uses that module's layers too."""

    def __init__(self):
        super().__init__()
        self.graph = fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))

    def forward(self, x):
        layer = getattr(self.graph, "0")
        return self.graph(x) + layer(x) + x @ layer.weight if x.ndim else x


@pytest.mark.parametrize(
    "build", [lambda: fx.symbolic_trace(net(scaled_by_weight)()), Holder], ids=["own", "held"]
)
def test_a_graph_modules_layer_that_is_used_otherwise_too(build):
    base = build().double()
    model = randomise(lorafx.inject(base, targets="linear"))
    assert not torch.allclose(model(X), base(X))
    torch.testing.assert_close(lorafx.merge(model)(X), model(X), rtol=1e-9, atol=1e-9)


def test_tangents_of_forward_mode():
    def forward(self, x):
        return x @ self.w.softmax(-1) + x @ self.w if x.ndim else x

    model = randomise(lorafx.inject(net(forward)().double(), rank=2, targets="w"))
    adapters = {name: tensor.detach() for name, tensor in lorafx.named_parameters(model)}
    tangents = {name: torch.ones_like(tensor) for name, tensor in adapters.items()}
    wanted = torch.func.jvp(
        lambda tensors: functional_call(model, tensors, (X,)), (adapters,), (tangents,)
    )[1]
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(adapters[name], tangents[name]) for name in adapters}
        got = forward_ad.unpack_dual(functional_call(model, dual, (X,))).tangent
    torch.testing.assert_close(got, wanted)


def test_tying_after_injection_is_refused():
    model = lorafx.inject(Net(), targets=["fc"])
    for context in (torch.enable_grad, torch.no_grad):
        with pytest.raises(
            lorafx.AdaptedWeightError, match="cannot be another module's Parameter"
        ), context():
            model.other.weight = model.fc.weight
    weight = model.fc._parameters["weight"]
    del model.fc.weight
    model.fc.weight = weight.detach() * 1
    del model.fc.weight
    model.fc.weight = weight
    assert torch.equal(model.fc(X.float()), frozen(model).fc(X.float()))


def test_one_parameter_under_two_attributes():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))
            self.b = self.a

        def forward(self, x):
            return F.linear(F.linear(x, self.b), self.a)

    base = Two()
    model, x = randomise(lorafx.inject(base)), torch.randn(2, 3, dtype=torch.float64)
    [site] = lorafx.sites(base)
    assert site.names == ("a", "b")
    torch.testing.assert_close(
        model(x), oracle(frozen(base), [site], factors_of(model, {"default": 1.0}), x)
    )
    torch.testing.assert_close(lorafx.merge(model)(x), model(x))
    assert lorafx.merge(model).a is not None and str(lorafx.summary(model))
