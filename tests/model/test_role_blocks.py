"""What is near a feed-forward block: mixers before, within and after it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lorafx
from lorafx._model.program import read_program
from lorafx._model.roles import roles
from tests.model.test_roles import HEAD, MLP, OUT, Q, V


def attended(a, x, c):
    return F.scaled_dot_product_attention(a, x, c)


def summed(a, x, c):
    return (a * c).cumsum(1)


class Outer(nn.Module):
    """A feed-forward block after a mixer, with one residual connection around both."""

    def __init__(self, mix, residual=True):
        super().__init__()
        self.a, self.c, self.out = (nn.Linear(8, 8) for _ in range(3))
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)
        self.mix, self.residual = mix, residual

    def forward(self, x):
        y = self.out(self.mix(self.a(x), x, self.c(x)))
        y = self.down(self.up(y).relu())
        return self.head(x + y) if self.residual else self.head(y)


def test_what_is_like_a_block_but_has_another_residual_connection_may_be_undecided():
    given = (torch.ones(2, 3, 8),)
    with pytest.raises(lorafx.NoSiteError, match="'out' and 2 more is 'mlp' .*: its block's"):
        lorafx.sites(Outer(summed), "mlp", example_inputs=given)
    with pytest.raises(lorafx.NoSiteError, match="No linear call of this model is 'mlp'"):
        lorafx.sites(Outer(attended, False), "mlp", example_inputs=given)  # layers in a row
    found = {site.name: site.role for site in lorafx.sites(Outer(summed), example_inputs=given)}
    assert found == {"a": None, "c": None, "out": None, "up": None, "down": None, "head": HEAD}
    found = {site.name: site.role for site in lorafx.sites(Outer(attended), example_inputs=given)}
    assert found == {"a": Q, "c": V, "out": OUT, "up": MLP, "down": MLP, "head": HEAD}
    assert all(site.role is None for site in lorafx.sites(Outer(attended)))


class Narrow(nn.Module):
    """Calls into and out of a narrow width, and what mixes tokens before or after the block."""

    def __init__(self, before, after):
        super().__init__()
        self.into, self.up, self.down, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.before, self.after = before, after

    def forward(self, x):
        y = self.down(self.up(self.before(self.into(x))).relu())
        return torch.tanh(x + self.out(self.after(y)))


def decayed(y):
    states = [y[:, 0]]
    for token in y.unbind(1)[1:]:
        states.append(states[-1] / 2 + token)
    return torch.stack(states, 1)


@pytest.mark.parametrize("before, after, blocks", [
    (torch.sin, torch.sin, {"into", "up", "down", "out"}),
    (lambda y: y.cumsum(1), torch.sin, set()),
    (torch.sin, lambda y: y.cumsum(1), set()),
    (decayed, torch.sin, set()),
])
def test_a_narrow_block_is_of_functions_of_single_rows_alone(before, after, blocks):
    given = (torch.ones(1, 8, 8),)  # as many tokens as features
    found = roles(read_program(Narrow(before, after)), given)
    assert {name for name, role in found.items() if role == MLP} == blocks
