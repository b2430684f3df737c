"""One adapter of several: exact, or the nearest of a rank, against dense sums in float64."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lorafx
from tests.support.oracle import factors_of, frozen, randomise
from tests.support.saved_files import Unusual, filled

X = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
WEIGHTS = [
    {"a": 1.0, "b": 1.0, "c": 1.0},
    {"a": -0.7, "b": 0.0, "c": 3},
    {"a": 1e-30, "b": -3e-31, "c": 2e-30},
    {"a": 1e6, "b": 1e-6, "c": -1.0},
    {"b": 0.25},
]


def adapted(dtype: torch.dtype | None = None) -> nn.Module:
    """Three adapters on rows, a weight stored as (in, out) and experts; no two on the same sites.
    """
    base, more = filled(Unusual()), {"rslora": True, "dtype": dtype}
    model = lorafx.inject(base, 3, targets=["qkv[q]", "experts"], adapter="a", alpha=5, **more)
    lorafx.add(model, "b", 1, targets=["qkv[7:12]", "conv", "experts"], alpha=0.5, **more)
    lorafx.add(model, "c", 64, targets=["conv", "experts"], alpha=16, **more)
    return randomise(model)


def deltas(model: nn.Module, weights: dict[str, float]) -> dict[str, Tensor]:
    """{site: sum w s B A}, dense and in float64."""
    found = {}
    for site, held in factors_of(model, weights).items():
        found[site] = sum(scale * B.detach().double() @ A.detach().double() for A, B, scale in held)
    return found


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative, or 0 for what is the same, which may be zeros."""
    gap = (found - expected).detach().norm()
    return float(gap / expected.detach().norm()) if gap else 0.0


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize(
    "dtype, bound", [(None, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)])
def test_a_composition_is_exact(weights, dtype, bound):
    model = adapted(dtype)
    errors = lorafx.compose(model, weights, "sum")
    expected, found = deltas(model, weights), deltas(model, {"sum": 1.0})
    assert found.keys() == expected.keys() == errors.keys() and set(errors.values()) == {0.0}
    for site, delta in expected.items():
        assert distance(found[site], delta) < bound
    lorafx.activate(model, weights)
    summed = model(X)
    lorafx.activate(model, "sum")
    assert distance(model(X), summed) < bound


def test_many_adapters_of_all_ranks():
    base, weights = nn.Linear(70, 90).double(), {}
    model = lorafx.inject(base, 1, targets="linear", adapter="rank1", alpha=2)
    for rank in range(2, 65):
        lorafx.add(model, f"rank{rank}", rank, alpha=2, rslora=rank % 2 == 0)
    for rank in range(1, 65):
        weights[f"rank{rank}"] = (-1) ** rank / rank
    randomise(model)
    lorafx.compose(model, weights, "sum")
    assert model.lora.get_submodule("sum").A.shape == (sum(range(1, 65)), 70)
    assert distance(deltas(model, {"sum": 1.0})[""], deltas(model, weights)[""]) < 1e-13


@pytest.mark.parametrize("rank", [1, 2, 4, 40])
@pytest.mark.parametrize("dtype, bound", [(None, 1e-12), (torch.bfloat16, 1e-6)])
def test_of_a_rank_it_is_the_nearest(rank, dtype, bound):
    """At each site the dense sum's first singular values are left, and the others are the error."""
    model, weights = adapted(dtype), {"a": 0.7, "b": -2.0, "c": 0.3}
    errors = lorafx.compose(model, weights, "near", rank=rank)
    expected, found = deltas(model, weights), deltas(model, {"near": 1.0})
    assert errors.keys() == expected.keys()
    for site, delta in expected.items():
        U, values, V = torch.linalg.svd(delta, full_matrices=False)
        nearest = (U[..., :rank] * values[..., None, :rank]) @ V[..., :rank, :]
        assert distance(found[site], nearest) < bound
        assert abs(errors[site] - distance(nearest, delta)) < bound
    ranks = {site: A.shape[-2] for site, [(A, _, _)] in factors_of(model, {"near": 1.0}).items()}
    full = {"qkv[q]": 3, "qkv[7:12]": 1, "conv": 5, "experts": 3}
    assert ranks == {site: min(rank, most) for site, most in full.items()}
    inexact = {1: {"qkv[q]", "conv", "experts"}, 2: {"qkv[q]", "conv", "experts"}, 4: {"conv"}}
    assert {site for site, error in errors.items() if error > 1e-9} == inexact.get(rank, set())


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that is made."""

    size = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **kwargs or {})
        sizes = [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
        self.size = max(self.size, *sizes, 0)
        return made


def test_the_sum_is_never_made():
    model = lorafx.inject(nn.Linear(90, 70), 3, targets="linear", adapter="a")
    lorafx.add(model, "b", 4)
    randomise(model)
    with Largest() as made:
        lorafx.compose(model, {"a": 1, "b": 1}, "near", rank=5)
    assert made.size == 90 * 7


def test_nothing_but_zeros():
    model = adapted()
    errors = lorafx.compose(model, {"a": 0, "b": 0.0}, "none", rank=1)
    assert set(errors.values()) == {0.0}
    lorafx.activate(model, "none")
    torch.testing.assert_close(model(X), lorafx.eject(model)(X), rtol=0, atol=0)


def test_what_it_trains_beside(tmp_path):
    """Copies of trained tensors; and files and optimizers take it as any other adapter."""
    base = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).eval()
    model = lorafx.inject(base, 2, targets=["0", "2"], adapter="a", trainable="1")
    lorafx.add(model, "b", 3, targets="0")
    randomise(model)
    lorafx.compose(model, {"a": 2.0, "b": 0.5}, "near", rank=4)
    lorafx.activate(model, {"a": 2.0, "b": 0.5})
    x = X.float()
    near = model(x)
    lorafx.activate(model, "near")
    for path in (tmp_path / "near.safetensors", tmp_path / "peft"):
        lorafx.save(model, path)
        torch.testing.assert_close(lorafx.load(base, path)(x), model(x), rtol=0, atol=0)
    assert distance(model(x), near) < 0.5 and not torch.equal(model(x), frozen(base)(x))
    beside = model.get_submodule("1.trained")
    assert beside.near.weight is not beside.a.weight
    assert torch.equal(beside.near.weight, beside.a.weight)
    assert list(beside.near._buffers) == list(beside.a._buffers)


def with_value(value: float) -> nn.Module:
    model = adapted()
    with torch.no_grad():
        model.conv.lora.c.B[1, 2] = value
    return model


def with_another_forward() -> nn.Module:
    """What says that q is a third of the rows is gone."""
    model = adapted()
    model.forward = lambda x: model.qkv(x)
    return model


ERRORS = {
    "rank 0": (lambda: lorafx.compose(adapted(), {"a": 1}, "x", rank=0),
               "rank must be an integer of at least 1, not 0"),
    "rank True": (lambda: lorafx.compose(adapted(), {"a": 1}, "x", rank=True), "not True"),
    "rank 2.0": (lambda: lorafx.compose(adapted(), {"a": 1}, "x", rank=2.0), "not 2.0"),
    "unknown": (lambda: lorafx.compose(adapted(), {"a": 1, "z": 1}, "x", rank=2),
                "no adapter 'z'; it has 'a', 'b', 'c'"),
    "empty": (lambda: lorafx.compose(adapted(), {}, "x", rank=2), "nothing to compose"),
    "no site now": (lambda: lorafx.compose(with_another_forward(), {"a": 1}, "x"),
                    "Adapter 'x' has a pair for 'qkv[q]', which is no site of this model now"),
    "weight": (lambda: lorafx.compose(adapted(), {"a": float("nan")}, "x"), "not nan"),
    "NaN": (lambda: lorafx.compose(with_value(torch.nan), {"a": 1, "c": 1}, "x", rank=2),
            "'conv.lora.B' has NaN or infinite values, so that adapter 'c' cannot be composed"),
    "infinite": (lambda: lorafx.compose(with_value(-torch.inf), {"c": 1}, "x"),
                 "'conv.lora.B' has NaN or infinite values"),
    "overflow": (lambda: lorafx.compose(adapted(torch.float32), {"a": 1e38}, "x"),
                 "at 'experts' has values beyond those of torch.float32: compose them with"),
}


@pytest.mark.parametrize("call, message", ERRORS.values(), ids=ERRORS)
def test_errors(call, message):
    with pytest.raises(lorafx.LorafxError, match=re.escape(message)):
        call()


def test_an_error_changes_nothing():
    model = with_value(torch.nan)
    before, active = list(model.state_dict()), list(lorafx.parameters(model))
    with pytest.raises(lorafx.ConfigError, match="cannot be composed"):
        lorafx.compose(model, {"a": 1, "c": 1}, "x", rank=2)
    assert list(model.state_dict()) == before and lorafx.adapters(model) == ["a", "b", "c"]
    assert all(map(torch.Tensor.is_set_to, lorafx.parameters(model), active))


@pytest.mark.parametrize("also", [True, False])
def test_rounding_is_accepted_where_all_accept_it(also):
    model = lorafx.inject(nn.Linear(4, 4).bfloat16(), 2, adapter="a", rounding=True)
    lorafx.add(model, "b", rounding=also)
    lorafx.compose(model, {"a": 1, "b": 1}, "x")
    assert model.lora.x.rounding is also
