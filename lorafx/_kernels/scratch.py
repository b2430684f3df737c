"""Memory that is used again and again."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Scratch:
    """Tensors on memory that is kept, a piece for each use, as the system takes its time to give new memory."""

    def __init__(self) -> None:
        self._held: dict[Any, Tensor] = {}

    def empty(self, use: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        """A contiguous tensor, not initialised, of the memory for this use; what it held before is lost."""
        count, key = math.prod(shape), (use, dtype, device)
        if key not in self._held or self._held[key].numel() < count:
            self._held[key] = torch.empty(count, dtype=dtype, device=device)
        return self._held[key][:count].view(tuple(shape))
