"""Roles are found in dataflow, of hand-made modules; `test_roles_by_hand` has architectures."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.attention.flex_attention import flex_attention

import lorafx
from lorafx._model.program import read_program
from lorafx._model.roles import roles
from tests.zoo.rows import X

Q, K, V, OUT = (f"attention.{part}" for part in ("query", "key", "value", "output"))
KV, MLP, HEAD = f"{K}+{V}", "mlp", "head"


class Crossed(nn.Module):
    """Attention with k @ q^T, a cache, in-place sums, and values whose names say the contrary."""

    def __init__(self):
        super().__init__()
        self.value, self.query, self.key = (nn.Linear(8, 8) for _ in range(3))
        self.mlp, self.router, self.up = nn.Linear(8, 8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head, self.last = nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("cache", torch.zeros(2, 9, 8))

    def forward(self, x):
        q, k = self.value(x), self.query(x)  # (batch, length, 8)
        self.cache[:, :5] = k
        scores = self.cache[:, :5] @ q.mT  # (batch, keys, queries)
        weights = F.pad(scores, (0, 0, 0, 1), value=-9.0).softmax(1)[:, :5]
        x = x + self.mlp((weights.mT @ self.key(x)).contiguous())
        h = self.router(x).relu_()
        x += self.up(h)
        return torch.tanh(self.last(x) / 3) * 3, torch.tanh(self.head(x))


CROSSED = {"value": Q, "query": K, "key": V, "mlp": OUT, "router": MLP, "up": MLP, "head": None,
           "last": HEAD}


@pytest.mark.parametrize("grad", [True, False])
def test_names_decide_nothing(grad):
    model = Crossed().double()
    with torch.set_grad_enabled(grad):
        assert roles(read_program(model), {"x": X}) == CROSSED
    assert not model.cache.any() and model.training


def test_inject_adapts_the_sites_of_a_role_and_draws_as_for_their_names():
    model = Crossed().double()
    x = X.clone()
    torch.manual_seed(0)
    expected = lorafx.inject(model, targets=["query", "up", "router"])
    torch.manual_seed(0)
    adapted = lorafx.inject(
        model, targets=["attention", "role:mlp"], exclude=["attention.output", "key", "*value"],
        example_inputs=(x,))
    assert torch.equal(x, X)
    pairs = dict(lorafx.named_parameters(adapted))
    assert pairs.keys() == dict(lorafx.named_parameters(expected)).keys()
    for name, parameter in lorafx.named_parameters(expected):
        assert torch.equal(pairs[name], parameter)
    with torch.no_grad():
        for parameter in lorafx.parameters(adapted):
            parameter.fill_(1)
    lorafx.add(adapted, "other", targets="attention.value", example_inputs=(x,))
    assert list(lorafx.summary(adapted).sites[-1].ranks) == ["default"]
    assert {row.name for row in lorafx.summary(adapted).sites if "other" in row.ranks} == {"key"}


def test_a_name_goes_before_a_role_until_there_are_example_inputs():
    model = Crossed().double()
    assert [site.name for site in lorafx.sites(model, ["mlp", "head"])] == ["mlp", "head"]
    with pytest.raises(lorafx.ConfigError, match=r"of 'head' and the role of 'last'.*'\*head'"):
        lorafx.sites(model, "head", example_inputs=(X,))
    found = lorafx.sites(model, ["*head", "role:head"], example_inputs=(X,))
    assert [site.name for site in found] == ["head", "last"]
    for word in ("attention", "role:mlp"):
        with pytest.raises(lorafx.NoSiteError, match=f"'{word}' is a role.* pass example_inputs="):
            lorafx.sites(model, word)


class Slots(nn.Module):
    """A softmax over queries, keys of positions too, and a sum that is no residual connection."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.e, self.f = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x, places):
        q = self.a(x)
        weights = (q @ self.b(x).mT + q @ self.d(places).mT).softmax(-2)
        weights = weights / weights.sum(-1, keepdim=True)
        return weights @ self.c(x) + self.f(self.e(places).relu())


def test_keys_are_along_what_the_product_with_values_contracts():
    expected = {"a": Q, "b": K, "c": V, "d": None, "e": None, "f": None}
    assert roles(read_program(Slots().double()), (X, X + 1)) == expected


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.e, self.f, self.g = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = x + self.d(F.scaled_dot_product_attention(self.a(x), self.b(x), self.c(x)))
        return self.g(x + self.f(self.e(x).relu()))


def shape_propagated(model, x):
    graph = torch.fx.symbolic_trace(model)
    ShapeProp(graph).propagate(x)
    return graph


def exported(model, x):
    free = {"x": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    return torch.export.export(model, (x,), dynamic_shapes=free).module()


@pytest.mark.parametrize("made", [shape_propagated, exported])
def test_a_graph_that_knows_its_shapes_needs_no_inputs(made):
    graph, state = made(Block(), X.float()), torch.get_rng_state()
    expected = {"a": Q, "b": K, "c": V, "d": OUT, "e": MLP, "f": MLP, "g": HEAD}
    assert roles(read_program(graph), None) == expected
    assert [site.name for site in lorafx.sites(graph, ["mlp", "head"])] == ["e", "f", "g"]
    assert torch.equal(torch.get_rng_state(), state)


class Chosen(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.other = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, other=False):
        return x + (self.other(x) if other else self.down(self.up(x).relu()))


def test_what_the_run_does_not_reach_is_undecided_unless_excluded():
    model = Chosen()
    x = torch.ones(2, 8)
    before = dict(model.named_modules())
    with pytest.raises(lorafx.NoSiteError, match="'other' is 'mlp' cannot be decided: .* not call"):
        lorafx.inject(model, targets="mlp", example_inputs=(x,))
    assert dict(model.named_modules()) == before
    adapted = lorafx.inject(model, targets="mlp", exclude="other", example_inputs=(x,))
    assert [row.name for row in lorafx.summary(adapted).sites] == ["up", "down"]
    with pytest.raises(lorafx.NoSiteError, match="No linear call .* 'attention.query'.* are 'mlp'"):
        lorafx.inject(model, targets="attention.query", exclude="other", example_inputs=(x,))


class Latent(nn.Module):
    """Experts in a narrow width, which a router chooses, and a pooler."""

    def __init__(self):
        super().__init__()
        self.router, self.into, self.out = nn.Linear(8, 2), nn.Linear(8, 4), nn.Linear(4, 8)
        self.up, self.down = (nn.ModuleList(nn.Linear(4, 4) for _ in range(2)) for _ in range(2))
        self.pooler = nn.Linear(8, 8)

    def forward(self, x):
        weights, h = self.router(x).softmax(-1), self.into(x)
        experts = [down(up(h).relu()) for up, down in zip(self.up, self.down)]
        y = sum(weights[..., i, None] * y for i, y in enumerate(experts))
        return self.pooler((x + self.out(y))[:, 0]).tanh()


def test_a_summary_tells_roles_and_why_a_word_left_out_the_others():
    x = torch.ones(2, 3, 8)
    model = lorafx.inject(Latent(), targets="mlp", example_inputs=(x,))
    found = lorafx.summary(model)
    assert {row.name for row in found.sites} == {"into", "out", "up.0", "up.1", "down.0", "down.1"}
    assert found.columns()[:2] == ("site", "role") and {row[1] for row in found.rows()} == {"mlp"}
    assert found.skipped["router"].startswith("it has no role: its result chooses among others")
    assert found.skipped["pooler"].startswith("it has no role: it is in no attention, in no block")
    lorafx.add(model, "other", targets=["router", "up.*"], example_inputs=(x,))
    found = lorafx.summary(model)
    assert list(found.skipped) == ["pooler"] and found.sites[0].role is None
    assert "role" not in lorafx.summary(lorafx.inject(Latent(), targets="up.*")).columns()
    fused = lorafx.inject(Cached(), targets="b", example_inputs=(x, Past(torch.ones(2, 3, 8))))
    assert lorafx.summary(fused).rows()[0][:2] == ("b", "attention.key+value")


class Both(nn.Module):
    """One weight, once in a feed-forward block and once for queries."""

    def __init__(self):
        super().__init__()
        self.both, self.key = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = x + self.key(self.both(x).relu())
        return F.scaled_dot_product_attention(self.both(x), self.key(x), x)


def test_a_weight_of_two_roles_is_undecided():
    with pytest.raises(lorafx.NoSiteError, match="'both' and 1 more is 'mlp' .* calls differ: "
                                                 "attention.query and mlp"):
        lorafx.sites(Both(), "mlp", example_inputs=(torch.ones(2, 3, 8),))


@pytest.mark.parametrize("given, says", [
    (torch.ones(2, 8), "takes a tuple .*, not Tensor"),
    ((torch.ones(2, 7),), "cannot be run on example_inputs: RuntimeError: .*shapes"),
    ({"y": 1}, "cannot be run on example_inputs: TypeError: .*unexpected keyword argument 'y'"),
])
def test_example_inputs_that_fit_no_forward_are_an_error(given, says):
    with pytest.raises(lorafx.ConfigError, match=says):
        lorafx.sites(Chosen(), "mlp", example_inputs=given)


def test_a_run_leaves_random_numbers_and_the_model():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    [site] = lorafx.sites(model, "head", example_inputs=(torch.ones(4, 8),))
    assert site.name == "3" and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Past:
    """A cache whose tensor autograd made."""

    def __init__(self, x):
        self.keys = x.requires_grad_() * 1


class Cached(Block):
    def forward(self, x, past):
        past.keys = torch.cat([past.keys, self.b(x)], 1)
        return self.d(F.scaled_dot_product_attention(self.a(x), past.keys, self.c(past.keys)))


def test_a_cache_among_the_inputs_is_left_as_it_is():
    past = Past(torch.ones(2, 3, 8))
    found = roles(read_program(Cached()), (X.float(), past))
    assert found["b"] == KV and found["d"] == OUT and past.keys.shape == (2, 3, 8)


class Flexible(nn.Module):
    """torch's attention that is an operator of a higher order, for which torch compiles."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (2, 4)).mT for layer in (self.b, self.c, self.a))
        y = flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: score - 0.1 * (i - j))
        return x + self.d(y.mT.flatten(-2))


@pytest.mark.parametrize("compiled", [False, True])
def test_attention_of_a_higher_order(compiled, monkeypatch):
    if compiled:
        monkeypatch.setitem(globals(), "flex_attention", torch.compile(flex_attention))
    found = roles(read_program(Flexible()), (torch.randn(2, 5, 8),))
    assert found == {"a": V, "b": Q, "c": K, "d": OUT}


def test_what_is_computed_within_another_operator_is_not_guessed():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.b(torch.cond(x.sum() > 0, torch.sin, torch.cos, (self.a(x),)))

    with pytest.raises(lorafx.ConfigError, match="not followed into torch's operator cond"):
        lorafx.sites(Branching(), "head", example_inputs=(torch.randn(3, 8),))
