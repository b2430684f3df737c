"""A region's forward has the signature of the user's, and code that asks for it reads no weight."""

import inspect
from inspect import signature

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorafx
from tests.support.oracle import frozen


class Asks(nn.Module):
    """A graph break that hands a layer what its forward takes; subclasses ask in other ways."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4)

    def names(self) -> set[str]:
        return set(inspect.signature(getattr(self.net, "forward", None)).parameters)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        names = self.names()
        return self.net(**{name: value for name, value in features.items() if name in names})


class AsksTheMethod(Asks):
    def names(self):
        return set(inspect.signature(self.net.forward).parameters.keys())


class AsksLater(Asks):
    def names(self):
        found = signature(self.net.forward)
        return {name for name in found.parameters}


def parameters_of(function):
    return signature(function).parameters


class AsksAHelper(Asks):
    def names(self):
        return {*parameters_of(self.net.forward)}


@pytest.mark.parametrize("cls", [Asks, AsksTheMethod, AsksLater, AsksAHelper])
def test_asking_for_a_signature_reads_no_weight(cls: type[Asks]) -> None:
    base, features = cls(), {"input": torch.randn(2, 4), "labels": torch.zeros(2)}
    model = lorafx.inject(base, targets=["net"])
    assert isinstance(model.net, torch.fx.GraphModule)
    torch.testing.assert_close(model(features), frozen(base)(features), rtol=0, atol=0)


class Fetches(Asks):
    def forward(self, features):
        weights = dict(self.net.named_parameters()) if features else None
        return F.linear(features["input"], weights["weight"])


class FetchesByAName(Asks):
    def forward(self, features):
        fetch = self.net.parameters if features else None
        return F.linear(features["input"], next(fetch()))


@pytest.mark.parametrize("cls", [Fetches, FetchesByAName])
def test_fetching_weights_is_still_refused(cls: type[Asks]) -> None:
    with pytest.raises(lorafx.NoSiteError, match="fetches its weight past its owner"):
        lorafx.inject(cls(), targets=["net"])


class Names(nn.Module):
    """Arguments that fx gives other names in a graph, and defaults."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, input, type=None, max=2.0, sum=True, x_1="text"):
        return F.linear(input, self.weight) * max


def test_a_region_has_the_users_signature() -> None:
    base = nn.Sequential(Names(), nn.Linear(4, 4))
    model, x = lorafx.inject(base, targets="linear"), torch.randn(2, 4)
    for path in ("0", "1"):
        region = model.get_submodule(path)
        assert isinstance(region, torch.fx.GraphModule)
        theirs = inspect.signature(type(base.get_submodule(path)).forward).parameters.values()
        ours = inspect.signature(type(region).forward).parameters.values()
        assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]
    torch.testing.assert_close(model(x), frozen(base)(x), rtol=0, atol=0)
