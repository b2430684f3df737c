"""The branch of one linear call, on tensors only: y + s * (x A^T) B^T, and the same as a matrix, s * B A."""

import torch
import torch.nn.functional as F
from torch import Tensor


def add_branch(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """y + scale * (x A^T) B^T, in y's dtype.

    x (..., in), y (..., out), A (rank, in), B (out, rank). A and B are cast to x's dtype, never x to theirs:
    the weights are the narrow side, so no copy of an activation is saved for the backward pass.
    """
    h = F.linear(x, A.to(x.dtype))  # (..., rank)
    return torch.add(y, F.linear(h, B.to(x.dtype)), alpha=scale)  # (..., out)


def delta(A: Tensor, B: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scale * B A, of shape (..., out, in), computed in `dtype`: A (..., rank, in), B (..., out, rank)."""
    return scale * (B.to(dtype) @ A.to(dtype))
