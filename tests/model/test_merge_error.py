"""What merging loses, foretold: against a merge that is really done, compared in float64."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lorafx
from tests.quantised.test_formats import case
from tests.support.checkpoints import Turned
from tests.support.internals import replace_internal, watch_memory
from tests.support.oracle import randomise
from tests.support.quantised import FORMATS

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


class Model(nn.Module):
    """Each kind of weight, in unequal sizes; `second` is `first` under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.turned = nn.Linear(7, 3 * 11), Turned(11, 13)
        self.experts = nn.Parameter(torch.randn(3, 17, 13))
        self.back, self.baked = nn.Linear(17, 7), parametrizations.weight_norm(nn.Linear(7, 5))
        self.first = self.second = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        x = torch.bmm(self.turned(q * k + v), self.experts.mT)
        return self.second(self.first(self.baked(self.back(x))))


TARGETS = ["qkv[q]", "qkv[20:30]", "turned", "experts", "back", "baked", "first"]


def of_sites(model: nn.Module) -> dict[str, Tensor]:
    """The part of a weight that is each site's, in float64."""
    whole = {name: getattr(module, "weight", None) for name, module in model.named_modules()}
    parts = {name: whole[name] for name in ("turned", "back", "baked", "first")}
    qkv, parts["experts"] = whole["qkv"], dict(model.named_parameters())["experts"]
    parts |= {"qkv[q]": qkv[:11], "qkv[20:30]": qkv[20:30], "qkv[5:25]": qkv[5:25]}
    return {name: tensor.detach().double() for name, tensor in parts.items()}


def injected(dtype: torch.dtype, size: float, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """A base of this dtype, and its model with two adapters, of which B are this large."""
    torch.manual_seed(seed)
    base = Model().to(dtype)
    model = lorafx.inject(base, rank=2, targets=TARGETS)
    lorafx.add(model, "other", rank=3, targets=["qkv[5:25]", "turned", "back"])
    with torch.no_grad():
        for name, factor in randomise(model).named_parameters():
            if name.endswith(".B"):
                factor.mul_(size)
    return base, model


def added(model: nn.Module, adapters: dict[str, float]) -> dict[str, Tensor]:
    """D of each site: what merging changes in float64."""
    exact = copy.deepcopy(model).double().eval()
    merged, W = of_sites(lorafx.merge(exact, adapters)), of_sites(lorafx.eject(exact))
    return {site: merged[site] - W[site] for site in W}


def truth(base: nn.Module, merged: nn.Module, D: dict[str, Tensor]) -> dict[str, float]:
    """|merged - (W + D)| / |D|."""
    W, stored = of_sites(base.eval()), of_sites(merged)
    return {site: float((stored[site] - W[site] - D[site]).norm() / D[site].norm()) for site in D}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-7])
def test_what_is_foretold_is_what_merging_does(
    dtype: torch.dtype, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_internal(monkeypatch, "summed_at_a_time", 26)  # so that a matrix is many blocks of rows
    base, model = injected(dtype, size)
    before = copy.deepcopy(model.state_dict())
    adapters = {"default": 0.7, "other": -1.3}
    found = lorafx.merge_error(model, adapters)
    expected = truth(base, lorafx.merge(model, adapters), added(model, adapters))
    assert found == pytest.approx(expected, rel=0.01)
    assert sorted(found) == sorted([*TARGETS, "qkv[5:25]"])
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert type(model.baked) is not nn.Linear  # a parametrization is still there


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_far_below_the_steps_of_a_dtype_is_lost_whole(dtype: torch.dtype) -> None:
    _, model = injected(dtype, 1e-24)
    found = lorafx.merge_error(model)
    assert found == pytest.approx(dict.fromkeys(TARGETS, 1.0))


def test_adapters_are_chosen_as_in_merge() -> None:
    _, model = injected(torch.bfloat16, 1e-2)
    assert lorafx.merge_error(model) == lorafx.merge_error(model, "default")
    assert sorted(lorafx.merge_error(model, "other")) == ["back", "qkv[5:25]", "turned"]
    assert set(lorafx.merge_error(model, {"default": 0}).values()) == {0.0}
    lorafx.activate(model, [])
    assert lorafx.merge_error(model) == {}


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_of_a_base_that_was_cast(dtype: torch.dtype) -> None:
    _, wide = injected(torch.float32, 1e-3)
    base, narrow = injected(dtype, 1e-3)
    found = lorafx.merge_error(wide, dtype=dtype)
    assert found["back"] > 0.1 > 1e-3 > lorafx.merge_error(wide)["back"]
    del found["baked"]  # whose parts are cast, not what they give
    expected = lorafx.merge_error(narrow)
    assert found == pytest.approx({site: expected[site] for site in found}, rel=1e-6)


def test_a_tensor_that_is_trained_whole_is_what_is_added_to() -> None:
    base = nn.Sequential(nn.Linear(64, 64)).bfloat16()
    model = lorafx.inject(base, rank=2, trainable="0[0:20]", targets="0")
    assert lorafx.merge_error(model) == {"0": 0.0}
    randomise(model)
    [trained] = [p for name, p in lorafx.named_parameters(model) if "trained" in name]
    W = base[0].weight.detach().clone()
    W[:20] = trained.detach()
    W = W.double()
    A, B = (model[0].lora.default.get_parameter(name).detach().double() for name in "AB")
    stored = lorafx.merge(model)[0].weight.detach().double()
    expected = float((stored - W - B @ A).norm() / (B @ A).norm())
    assert lorafx.merge_error(model) == {"0": pytest.approx(expected, rel=0.01)}


@pytest.mark.parametrize("requantize", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_quantised_weights(name: str, requantize: bool) -> None:
    base, model, _ = case(name)
    if requantize and name in ("gptq", "awq"):
        with pytest.raises(lorafx.UnsupportedModelError, match="does not know how it packs"):
            lorafx.merge_error(model, requantize=True)
        return
    found = lorafx.merge_error(model, requantize=requantize)
    merged: Any = lorafx.merge(model, requantize=requantize)
    dequantised: Any = lorafx.merge(model, {"default": 0})
    factors = [factor.detach().double() for factor in lorafx.parameters(model)]
    for at, A, B in ((0, *factors[:2]), (2, *factors[2:])):
        W, D = dequantised[at].weight.detach(), B @ A
        if FORMATS[name].dtype != torch.float32:
            W = FORMATS[name].dense(base[at])
        stored = FORMATS[name].dense(merged[at]) if requantize else merged[at].weight
        expected = float((stored.detach().double() - W.double() - D).norm() / D.norm())
        assert found[str(at)] == pytest.approx(expected, rel=0.01)
    if requantize:
        assert found == pytest.approx(merged.requantize_error, rel=0.01)


def test_what_a_cast_base_makes_of_a_quantised_weight() -> None:
    _, model, _ = case("nf4")
    found = lorafx.merge_error(model, dtype=torch.bfloat16)["0"]
    assert 1e-3 < found < 1 and lorafx.merge_error(model)["0"] < 1e-5
    A, B = (model[0].lora.default.get_parameter(name).detach().double() for name in "AB")
    W, D = FORMATS["nf4"].dense(model[0]).double(), B @ A
    expected = float(((W + D).bfloat16().double() - W - D).norm() / D.norm())
    assert found == pytest.approx(expected, rel=0.01)


def test_merge_refuses_and_names_the_worst_first() -> None:
    _, model = injected(torch.bfloat16, 1e-2)
    errors = lorafx.merge_error(model)
    (worst, largest), (second, next_largest), *_, (best, _) = sorted(
        errors.items(), key=lambda item: -item[1])
    assert lorafx.merge(model, max_error=largest) is not model
    with pytest.raises(lorafx.AdaptedWeightError) as raised:
        lorafx.merge(model, max_error=next_largest)
    assert f"at 1 of 7 sites: {largest:.3g} at '{worst}'. Nothing is merged" in str(raised.value)
    assert second not in str(raised.value)
    with pytest.raises(lorafx.AdaptedWeightError) as raised:
        lorafx.MergeLoRA(max_error=0).call(model)
    text = str(raised.value)
    assert "0 of s B A at 7 of 7 sites" in text and "and 2 more" in text and best not in text
    assert text.index(worst) < text.index(second)


def test_a_sum_beyond_float16_is_refused() -> None:
    base = nn.Sequential(nn.Linear(5, 5)).half()
    model = randomise(lorafx.inject(base, rank=2))
    with torch.no_grad():
        model[0].lora.default.B.mul_(1e6)
    assert lorafx.merge_error(model) == {"0": float("inf")}
    with pytest.raises(lorafx.AdaptedWeightError, match="inf at '0'"):
        lorafx.merge(model, max_error=1e9)
    with torch.no_grad():
        model[0].lora.default.B.fill_(float("nan"))
    with pytest.raises(lorafx.AdaptedWeightError, match=r"nan at '0' \(not finite where W or"):
        lorafx.merge(model, max_error=1e9)


def test_requantising_is_bounded_too() -> None:
    _, model, _ = case("nf4")
    lorafx.merge(model, max_error=1e-5)
    with pytest.raises(lorafx.AdaptedWeightError, match="at 2 of 2 sites"):
        lorafx.merge(model, requantize=True, max_error=1e-5)


@pytest.mark.parametrize("bound", [-0.1, float("nan"), True, "much"])
def test_a_bound_is_a_number(bound: Any) -> None:
    model = lorafx.inject(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(lorafx.ConfigError, match="max_error must be a finite number"):
        lorafx.merge(model, max_error=bound)


@pytest.mark.parametrize("dtype", [torch.int8, "bfloat16"])
def test_a_dtype_is_one_of_floats(dtype: Any) -> None:
    model = lorafx.inject(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(lorafx.ConfigError, match="dtype must be float16, bfloat16"):
        lorafx.merge_error(model, dtype=dtype)


def test_little_memory_is_needed_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some rows are in memory at a time, in all dtypes together."""
    sizes = watch_memory(monkeypatch)
    replace_internal(monkeypatch, "summed_at_a_time", 64)
    model = randomise(lorafx.inject(nn.Sequential(nn.Linear(32, 1000)).bfloat16(), targets="0"))
    assert 0 < lorafx.merge_error(model)["0"] < 0.1
    assert max(sizes) <= 16 * 64
