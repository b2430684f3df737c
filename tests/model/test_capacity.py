"""Room for later adapters: a compiled model is not compiled again where it was declared."""

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


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("targets", ["q", ()])
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
