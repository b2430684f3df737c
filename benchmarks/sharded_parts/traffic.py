"""Exact counts of what a process communicates, by kind, and of the bytes of parameters it holds."""

import enum
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.counting import local


class Kind(enum.Enum):
    """What tensors are that processes exchange."""

    GRADIENTS = "gradients reduced"
    WEIGHTS = "weights gathered"
    ACTIVATIONS = "activations"


# {operator: which of its arguments counts}: the whole that is reduced, gathered or sent. What is
# received counts where it is sent.
REDUCED = {"allreduce_": 0, "_reduce_scatter_base_": 1, "all_reduce": 0, "reduce_scatter_tensor": 0,
           "reduce_scatter_tensor_coalesced_": 1, "allreduce_coalesced_": 0}
SENT = {"send": 0, "broadcast_": 0}
GATHERED = {"allgather_": 0, "_allgather_base_": 0, "allgather_into_tensor_coalesced_": 0}
GATHERED_AS_RESULT = ("all_gather_into_tensor", "all_to_all_single", "shard_dim_alltoall")
FREE = ("wait_tensor", "_wrap_tensor_autograd", "recv_", "recv_any_source_", "barrier",
        "monitored_barrier_")
# The operators that use weights: while they run, these are in their places.
MULTIPLYING = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm,
               torch.ops.aten.embedding}
NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor")


class Traffic(TorchDispatchMode):
    """Counts the bytes that processes exchange inside, on the side of this one.

    A collective counts as the bytes of the whole tensor that it reduces or gathers. Kinds are told
    apart by shape: what is reduced in the shape of a parameter, or flat (DDP and FSDP put gradients
    into one row), is a gradient; what is gathered flat is weights; anything else is an activation.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.bytes = dict.fromkeys(Kind, 0)
        self.held = Held(model)
        self.shapes = {tuple(parameter.shape) for parameter in model.parameters()}
        self.shapes |= {tuple(local(parameter).shape) for parameter in model.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(cls, DTensor) for cls in types):
            return NotImplemented  # it communicates by operators on plain tensors, which come here
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in MULTIPLYING:
            self.held.look()
        if func.namespace in NAMESPACES:
            self.count(func.overloadpacket.__name__, args, result)
        return result

    def count(self, name: str, args: Any, result: Any) -> None:
        """Count one exchange."""
        if name in REDUCED:
            whole = tensors(args[REDUCED[name]])
            self.add(whole, Kind.GRADIENTS, Kind.ACTIVATIONS)
        elif name in GATHERED:
            self.add(tensors(args[GATHERED[name]]), Kind.WEIGHTS, Kind.ACTIVATIONS)
        elif name in GATHERED_AS_RESULT:
            self.add(tensors(result), Kind.WEIGHTS, Kind.ACTIVATIONS)
        elif name in SENT:
            self.add(tensors(args[SENT[name]]), Kind.ACTIVATIONS, Kind.ACTIVATIONS)
        elif name not in FREE:
            raise NotImplementedError(f"What {name} exchanges is not counted: add it to a table.")

    def add(self, whole: Iterable[Tensor], of_parameters: Kind, other: Kind) -> None:
        """Add the bytes of tensors to their kind."""
        for tensor in whole:
            is_parameter = tensor.ndim == 1 or tuple(tensor.shape) in self.shapes
            self.bytes[of_parameters if is_parameter else other] += tensor.nbytes


def tensors(tree: Any) -> list[Tensor]:
    """The tensors in nested lists."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Held:
    """The bytes of a model's parameters in this process: between steps, and at most."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(model.modules())
        self.resting = self.storages()
        self.most = 0

    @property
    def bytes(self) -> int:
        """Between steps."""
        return sum(self.resting.values())

    def storages(self) -> dict[int, int]:
        """{address: bytes} of the storages that the parameters of all modules now lie in."""
        found: dict[int, int] = {}
        for module in self.modules:
            for value in module._parameters.values():
                if value is not None and value.device.type != "meta":
                    storage = local(value).untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
        return found

    def look(self) -> None:
        """Notice what is held now: what was gathered is there beside the parts."""
        self.most = max(self.most, sum((self.resting | self.storages()).values()))
