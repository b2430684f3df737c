"""Dropout, x m / (1 - p) with m a mask of bits, and masks packed eight to a byte."""

import torch
import torch.nn.functional as F
from torch import Tensor

_BITS = 8


def dropped(x: Tensor, probability: float) -> Tensor:
    """Return x with elements zeroed at random and the others divided by 1 - probability."""
    return F.dropout(x, probability) if probability else x


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return x with elements zeroed where the mask is False; x itself without a mask."""
    return x if mask is None else x * mask.view(x.shape)


def packed(mask: Tensor) -> Tensor:
    """Return a bool tensor as bytes of eight."""
    flat = F.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % _BITS)).view(-1, _BITS)
    shifts = torch.arange(_BITS, dtype=torch.uint8, device=mask.device)
    return (flat << shifts).sum(1, dtype=torch.uint8)


def unpacked(packed_bits: Tensor, x: Tensor) -> Tensor:
    """Return the mask, one bool for each element of x, (N, in)."""
    shifts = torch.arange(_BITS, dtype=torch.uint8, device=packed_bits.device)
    bits = packed_bits[:, None] >> shifts & 1
    return bits.flatten()[:x.numel()].bool().view(-1, x.shape[-1])
