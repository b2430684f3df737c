"""Models that make several linear calls on one value."""

import torch
import torch.nn.functional as F
from torch import nn

X = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Straight-line code, so that it becomes a region."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, n) for n in (8, 6, 6, 8))

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(q + F.pad((k.softmax(-1) * v), (0, 2)))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = (
            nn.Linear(8, 12), nn.Linear(8, 12, bias=False), nn.Linear(12, 8)
        )
        self.act = nn.SiLU(inplace=True)

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.last = (
            nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 8)
        )

    def forward(self, x):
        return F.linear(x, self.w1) * F.linear(x, self.w2).tanh() + self.last(x)


class Twice(Gated):
    def forward(self, x):
        return self.down(self.gate(x) * self.gate(x) + self.up(x))


class Python(Attention):
    """The same as Attention, but Python decides."""

    def forward(self, x):
        if x.ndim > 1:
            return super().forward(x)
        return x


def in_place_on_x(self, x):
    x = x * 1
    gate = self.gate(x)
    x.add_(1)
    return self.down(gate * self.up(x))
