"""The models in which adapters go astray, as small as they get."""

import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 32


class UsesWeight(nn.Module):
    """A forward that uses its layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., width) -> the same shape."""
        return F.linear(x, self.layer.weight)


class TwoNames(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        """x (..., width) -> the same shape."""
        return self.second(self.first(x).tanh())


class TiedHead(nn.Module):
    """A head that is the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, WIDTH)
        self.head = nn.Linear(WIDTH, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (...) -> logits (..., 50)."""
        return self.head(self.embedding(tokens))


class Attention(nn.Module):
    """torch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, length, width) -> the same shape."""
        return self.attention(x, x, x, need_weights=False)[0]


class Projections(nn.Module):
    """Three linear calls of one value."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., width) -> the same shape."""
        return self.q(x) + self.k(x) + self.v(x)
