"""A linear call, x W^T + b, and what is added to it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .addend import Addend


class AdaptedCall(NamedTuple):
    """One linear call and what is added to its weight: whole, or a block of rows."""

    weight: Tensor  # (out, in)
    bias: Tensor | None
    addends: Sequence[Addend]

    def cast(self, dtype: torch.dtype) -> "AdaptedCall":
        """The call with its weight and bias in another dtype."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return AdaptedCall(self.weight.to(dtype), bias, self.addends)


def addends_of(calls: Sequence[AdaptedCall]) -> list[Addend]:
    """Return the addends of all calls in a row."""
    return [addend for call in calls for addend in call.addends]


def split_by_rank(matrix: Tensor, addends: Sequence[Addend], dim: int = 1) -> Sequence[Tensor]:
    """Return the parts, each as long as its addend's rank, of a matrix that joins all ranks."""
    if len(addends) == 1:
        return (matrix,)
    return matrix.split_with_sizes([addend.right.shape[0] for addend in addends], dim=dim)
