"""Room for later adapters: a compiled model is not compiled again where it was declared."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import lorafx
from tests.support.oracle import randomise

X = torch.randn(4, 5, 8)


class Net(nn.Module):
    """Calls that are joined, a stack of two experts that Python reads, a layer of another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.up = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 6)
        self.experts = nn.Parameter(torch.randn(2, 6, 6))

    def forward(self, x):
        x = self.up(self.q(x) * self.k(x).tanh())
        return torch.bmm(torch.stack([x.flatten(0, 1)] * 2), self.experts).sum(0)


SITES = ["q", "k", "up", "experts"]


def net():
    torch.manual_seed(0)
    return Net()


def with_room(**config):
    config = {"targets": "q", "capacity": "linear"} | config
    return randomise(lorafx.inject(net(), rank=2, **config))


def eager(model, x):
    with torch.compiler.set_stance("force_eager"):
        return model(x)


@pytest.mark.parametrize("targets, trains", [("q", True), ((), False)])
def test_adapters_at_other_sites(tmp_path, targets, trains):
    model = with_room(targets=targets)
    other = randomise(lorafx.inject(net(), rank=3, targets=["k", "experts"]))
    lorafx.save(other, tmp_path / "other.safetensors")
    counter = CompileCounter()
    call = torch.compile(model, backend=counter, fullgraph=True)

    def check():
        with torch.set_grad_enabled(trains):
            torch.testing.assert_close(call(X), eager(model, X))

    check()
    frames = counter.frame_count
    lorafx.load(model, tmp_path / "other.safetensors", adapter="other")
    check()
    for site in SITES:
        lorafx.add(model, f"at {site}", rank=2, targets=site)
    randomise(model)
    uses = ["other", *[f"at {site}" for site in SITES], ["other", "at up"], []]
    for adapters in uses:
        lorafx.activate(model, adapters)
        check()
        with lorafx.using(model, "at up"):
            check()
    lorafx.remove(model, "at up")
    check()
    assert counter.frame_count == frames


def test_a_place_without_room_is_announced(tmp_path):
    model = with_room(capacity="k", targets="q")
    lorafx.save(randomise(lorafx.inject(net(), targets=["up", "k"])), tmp_path / "a.safetensors")
    lorafx.add(model, "before", targets="up")  # nothing was compiled yet
    counter = CompileCounter()
    call = torch.compile(model, backend=counter, fullgraph=True)
    call(X)
    lorafx.add(model, "b", targets=["up", "k"])
    with pytest.raises(UserWarning, match="comes to 1 place where none could be, such as 'exp"):
        lorafx.add(model, "c", targets="experts")
    assert lorafx.adapters(model) == ["default", "before", "b"]  # all or nothing
    with pytest.warns(UserWarning, match="inject.*capacity="):
        lorafx.add(model, "c", targets=["experts", "q"])
    lorafx.load(model, tmp_path / "a.safetensors", adapter="d")
    for adapter in ("c", "d", "default", "before"):
        lorafx.activate(model, adapter)
        torch.testing.assert_close(call(X), eager(model, X))
    assert counter.frame_count == 2


def test_room_is_all_that_it_is():
    """No key, no parameter, no site of an adapter, no listing knows of it."""
    model, plain = with_room(), with_room(capacity=None)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [*model.named_buffers()] == [*plain.named_buffers()] == []
    assert lorafx.summary(model).rows() == lorafx.summary(plain).rows()
    assert lorafx.summary(model).headline() == lorafx.summary(plain).headline()
    assert torch.equal(model(X), plain(X))
    lorafx.add(model, "more", rank=3)
    lorafx.add(model, "apart", targets="k")
    assert [site.ranks for site in lorafx.summary(model).sites] == [
        {"default": 2, "more": 3}, {"apart": 8}]
    for adapter in lorafx.adapters(model):
        lorafx.remove(model, adapter)
    assert [*lorafx.named_parameters(model)] == [] == lorafx.summary(model).sites
    assert lorafx.eject(model).state_dict().keys() == net().state_dict().keys()


@pytest.mark.parametrize("after", [
    lorafx.merge, lorafx.eject, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("targets", ["q", ()])
def test_what_models_go_through(after, targets):
    model = with_room(targets=targets)
    found, wanted = after(model), model
    if after is lorafx.eject:
        with lorafx.disabled(model):
            torch.testing.assert_close(found(X), wanted(X))
    else:
        torch.testing.assert_close(found(X), wanted(X))


def test_none_matches():
    with pytest.raises(lorafx.NoSiteError, match="No linear call matches capacity='kk'"):
        with_room(capacity="kk")
    with pytest.raises(lorafx.NoSiteError, match=r"left to adapt: targets=\(\)"):
        lorafx.inject(net(), targets=())
