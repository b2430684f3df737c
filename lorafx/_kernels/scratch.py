"""Memory that is used again and again."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Scratch:
    """Tensors on memory that is kept, a piece for each use: new memory takes time to get."""

    def __init__(self) -> None:
        self._memory: dict[Any, Tensor] = {}

    def empty(
        self, use: str, shape: Sequence[int], dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> Tensor:
        """A contiguous tensor, not initialised, on this use's memory; what was there is lost."""
        count, key = math.prod(shape), (use, dtype, device)
        if key not in self._memory or self._memory[key].numel() < count:
            self._memory[key] = torch.empty(count, dtype=dtype, device=device)
        return self._memory[key][:count].view(tuple(shape))
