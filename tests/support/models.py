"""Hand-made models that several tests share."""

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """A square and two other layers, a tied head, batch norm, dropout, and a hook's counter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 5)
        self.square = nn.Linear(5, 5)
        self.down = nn.Linear(5, 3)
        self.up = nn.Linear(3, 5)
        self.norm = nn.BatchNorm1d(5)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        x = self.drop(self.norm(x + self.square(x)))
        return self.head(self.up(torch.tanh(self.down(x))))


class Tied(nn.Module):
    """One matrix for an embedding and a functional head, in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.linear(self.embedding(tokens), self.embedding.weight)


TOKENS = torch.tensor([1, 4, 9, 2])


def by_another_file(x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """A layer's weight used by a function that the calling module only imports."""
    return F.linear(x, layer.weight)
