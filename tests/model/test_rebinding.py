"""A new W that is made of W + s B A is refused as it is registered, and no other W is."""

import pytest
import torch
from torch import Tensor, nn

import lorafx
from tests.support.oracle import randomise


def adapted(width: int = 64):
    return randomise(lorafx.inject(nn.Sequential(nn.Linear(width, width))))[0]


def rounded(weight: Tensor) -> Tensor:
    """To 8 bits, with a scale for each row."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round() * scale


MADE_OF = {
    "itself": lambda weight: weight.detach() + 0,
    "half": lambda weight: (weight + 0).half(),
    "pruned": lambda weight: weight * (weight.abs() > weight.abs().median()),
    "scaled": lambda weight: weight / weight.norm(dim=1, keepdim=True),
    "rounded": rounded,
    "integers": lambda weight: (weight / weight.abs().amax(1, keepdim=True) * 127).round(),
    "noisy": lambda weight: weight + 0.01 * torch.randn(weight.shape),
}
REGISTERED = {
    "setattr": lambda layer, weight: setattr(layer, "weight", weight),
    "register_parameter": lambda layer, weight: layer.register_parameter("weight", weight),
    "_parameters": lambda layer, weight: layer._parameters.__setitem__("weight", weight),
}


@pytest.mark.parametrize("register", REGISTERED.values(), ids=REGISTERED)
@pytest.mark.parametrize("make", MADE_OF.values(), ids=MADE_OF)
def test_made_of_the_sum_or_of_w(make, register):
    layer = adapted()
    old = layer.frozen_weight
    with pytest.raises(lorafx.AdaptedWeightError, match="'tests.model.test_rebinding' registers.*"
                                                        "twice: read frozen_weight"):
        register(layer, nn.Parameter(make(layer.weight).detach(), requires_grad=False))
    assert layer.frozen_weight is old
    new = nn.Parameter(make(old).detach(), requires_grad=False)
    register(layer, new)
    assert layer.frozen_weight is new


def test_what_says_nothing_of_an_adapter_is_registered():
    layer = adapted()
    for new in (torch.zeros(64, 64), torch.randn(64, 64), torch.randn(8, 64),
                torch.empty(64, 64, device="meta")):
        layer.weight = nn.Parameter(new)
        assert layer.frozen_weight.shape == new.shape
    fresh = lorafx.inject(nn.Linear(64, 64))  # B is zero: W + s B A is W
    fresh.weight = nn.Parameter((fresh.weight + 0).detach())


def test_a_merged_checkpoint_is_loaded_and_weights_are_cast():
    """What is loaded, or cast as it is registered, was not read from the module."""
    layer = adapted()
    summed = (layer.weight + 0).detach()
    layer.load_state_dict({"weight": summed}, strict=False, assign=True)
    assert torch.equal(layer.frozen_weight, summed)
    assert layer.double().frozen_weight.dtype is torch.float64


def test_disabled_adapters_are_not_in_what_is_read():
    model = randomise(lorafx.inject(nn.Linear(64, 64)))
    with lorafx.disabled(model):
        new = (model.weight + 0).detach()
        model.weight = nn.Parameter(new)
    assert torch.equal(model.frozen_weight, new)


def test_neither_a_turned_sign_nor_a_layout_nor_a_single_column_is_taken_for_an_adapter():
    for _ in range(10):
        layer = adapted()
        layer.weight = nn.Parameter(-layer.frozen_weight.detach())
    layer.weight = nn.Parameter(layer.frozen_weight.detach().to_sparse(), requires_grad=False)
    for _ in range(100):
        column = randomise(lorafx.inject(nn.Sequential(nn.Linear(1, 64)), targets="linear"))[0]
        column.weight = nn.Parameter(torch.randn(64, 1))
    layer = adapted()
    with pytest.raises(lorafx.AdaptedWeightError, match="twice"):
        layer.weight = nn.Parameter(-(layer.weight + 0).detach())
