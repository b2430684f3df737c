"""An attention, and what it is called with: two sequences, the second padded."""

import torch
from torch import nn

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
PADDING = torch.arange(5).expand(2, 5) >= torch.tensor([[5], [3]])


def attention(**settings):
    return nn.MultiheadAttention(8, 2, batch_first=True, **settings)
