"""x is computed again once for all that share it, and held no longer than it is needed."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

from lorafx._kernels import rows
from lorafx._kernels.linears import linears
from tests.support.linear_calls import factors
from tests.support.recomputed import leaf, produced, site


pytestmark = pytest.mark.usefixtures("recomputed_both_ways")


@pytest.fixture
def computed(monkeypatch):
    """What silu's row computed, as weak references."""
    made, row = [], rows.ROWS["SiluBackward0"]

    def silu(z):
        value = F.silu(z)
        made.append(weakref.ref(value))
        return value

    monkeypatch.setitem(rows.ROWS, "SiluBackward0", row._replace(function=silu))
    return made


def three(z, sites):
    x = produced(z)
    return [linears(x, [lean])[0].sin().sum() for lean, _ in sites]


def test_sites_that_share_x_compute_it_once(computed):
    sites, z = [site(seed) for seed in range(3)], leaf()
    three(z, sites)  # proves
    computed.clear()
    outputs, later = three(z, sites), []
    z.register_hook(lambda _: later.append(computed[-1]()))  # in the backward pass, not after it
    sum(outputs).backward(retain_graph=True)
    assert len(computed) == 1 and later == [None]
    sum(outputs).backward()
    assert len(computed) == 2 and computed[1]() is None


def test_what_was_computed_for_sites_that_are_not_run_is_freed(computed):
    sites, z = [site(seed) for seed in range(3)], leaf()
    three(z, sites)
    computed.clear()
    outputs = three(z, sites)
    (outputs[0] + outputs[1]).backward(retain_graph=True)
    assert len(computed) == 1 and computed[0]() is None
    torch.autograd.grad(outputs[2], factors([sites[2][0]]))
    assert len(computed) == 2 and computed[1]() is None


def test_nothing_is_held_when_it_is_not_needed():
    """Not x after the forward pass, nothing after the backward pass, and no cycles."""
    lean, _ = site()
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            inside = leaf() * 1
            x = F.silu(inside)
            held = [weakref.ref(tensor.untyped_storage()) for tensor in (x, inside)]
            y = linears(x, [lean])[0].sum()
            del x
            assert held[0]() is None
            del inside
            y.backward()
            assert held[1]() is None
            x = produced(leaf())
            held = [weakref.ref(x)]
            y = linears(x, [lean])[0].sum()
            del x, y
            assert held[0]() is None
    finally:
        gc.enable()
