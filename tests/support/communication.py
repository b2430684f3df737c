"""Counts what processes send each other: the bytes of tensors given to collectives."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode


class Communication(TorchDispatchMode):
    """Bytes of whole tensors that were gathered, and of gradients that were reduced, within."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered = self.reduced = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(cls, DTensor) for cls in types):
            return NotImplemented  # what it does with its local tensors is what counts
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace in ("c10d", "_c10d_functional"):
            if "allgather" in name or "all_gather" in name:  # in place, or functional
                self.gathered += _bytes(args[0] if func.namespace == "c10d" else result)
            elif "reduce_scatter" in name:
                self.reduced += _bytes(args[1] if func.namespace == "c10d" else args[0])
            elif "allreduce" in name or "all_reduce" in name:
                self.reduced += _bytes(args[0])
        return result


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.nbytes
    assert not isinstance(tensors, torch.ScriptObject), "an unknown collective"
    return sum(map(_bytes, tensors))
