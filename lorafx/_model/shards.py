"""Tensors that are spread over processes: all of one, one spread as another, factors beside W."""

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .._errors import UnsupportedModelError
from .._kernels.tensors import PLAIN


def is_sharded(tensor: Tensor | None) -> bool:
    """True for a DTensor. None is where torch's module of them has not been loaded."""
    if tensor is None or type(tensor) in PLAIN:  # compiled programs ask no more
        return False
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def gathered(tensor: Tensor) -> Tensor:
    """All of a tensor. For one that is spread over processes, each of them must ask."""
    if not is_sharded(tensor):
        return tensor
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    whole: Tensor = tensor.to(mesh.device_type).full_tensor()  # type: ignore[attr-defined]
    return whole


def gathered_for_use(tensor: Tensor) -> Tensor:
    """All of a tensor, for a forward pass of this process's part of a batch.

    The gradient is the mean of those of all processes, each of which gets its part.
    """
    from torch.distributed.tensor import Partial

    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    whole: Tensor = tensor.full_tensor(  # type: ignore[attr-defined]
        grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: gradient / mesh.size())
    return whole


def reduced_for_use(tensor: Tensor) -> Tensor:
    """The same tensor, for products whose gradient may be left as parts that are to be summed.

    They are summed once, where torch would do it anew in each step of an optimizer.
    """
    if type(tensor) in PLAIN or not tensor.requires_grad or not torch.is_grad_enabled():
        return tensor
    if not is_sharded(tensor):
        return tensor
    made: Tensor = _Reduced.apply(tensor)  # type: ignore[no-untyped-call]
    return made


class _Reduced(torch.autograd.Function):
    """DTensor -> the same, whose gradient is placed as it is."""

    @staticmethod
    def forward(ctx: Any, tensor: Any) -> Tensor:
        ctx.placements = tensor.placements
        same: Tensor = tensor.view_as(tensor)
        return same

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Tensor:
        placed: Tensor = gradient.redistribute(placements=ctx.placements)
        return placed


def spread_evenly(tensor: Tensor, mesh: Any) -> Tensor:
    """A whole tensor, split along its first axis over the last axis of a mesh, as FSDP does it."""
    from torch.distributed.tensor import Replicate, Shard

    return _distributed(tensor, mesh, [Replicate()] * (mesh.ndim - 1) + [Shard(0)])


def gathered_beside(live: Tensor, tensor: Tensor) -> Tensor:
    """A tensor to put in the place of another, or beside it: all of it, unless that is spread."""
    return tensor if is_sharded(live) else gathered(tensor)


def whole_beside(live: Any, tensor: Tensor) -> Tensor:
    """A tensor that each process has, as a DTensor where another one is."""
    if not is_sharded(live):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh = live.device_mesh
    here = tensor.to(mesh.device_type)
    return DTensor.from_local(here, mesh, [Replicate()] * mesh.ndim, run_check=False)


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def spread_like(live: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor, spread over processes as another of its shape is."""
    if not is_sharded(live) or is_sharded(tensor) or live.shape != tensor.shape:
        return tensor
    mesh, placements = live.device_mesh, live.placements  # type: ignore[attr-defined]
    return _distributed(tensor.to(live.device), mesh, placements)


def check_meshes(weight: Tensor | None, factors: Iterable[Tensor]) -> None:
    """Raise if factors are spread over another mesh than the weight beside them."""
    for factor in factors:
        if weight is not None and is_sharded(weight) and is_sharded(factor):
            there, here = factor.device_mesh, weight.device_mesh  # type: ignore[attr-defined]
            if there != here:
                raise UnsupportedModelError(
                    f"A weight is to be spread over {here}, and A and B beside it are over "
                    f"{there}: lorafx.save the adapter, spread a fresh base over the one mesh, and "
                    "lorafx.load it into that.")


def check_spread(weight: Tensor, factors: Iterable[Tensor]) -> None:
    """Raise if a weight is spread over processes, and what is beside it is not, or otherwise."""
    if not is_sharded(weight):
        return
    factors = list(factors)
    if not all(map(is_sharded, factors)):
        raise UnsupportedModelError(
            "A weight is spread over processes, and A and B beside it are not: spread it by "
            "parallelize_module, distribute_module or `layer.weight = ...`, not through "
            "`_parameters`, or spread it before lorafx.inject; FSDP's is whole in forward only.")
    check_meshes(weight, factors)


def agreed(tensor: Tensor, mesh: Any) -> Tensor:
    """What the first process of a mesh has as this tensor, in all of them."""
    from torch.distributed.tensor import Replicate

    return local_part(_distributed(tensor, mesh, [Replicate()] * mesh.ndim))


def only_mesh(tensors: Iterable[Tensor]) -> Any:
    """The mesh that some of these are spread over; None if there is none, or another too."""
    meshes = {tensor.device_mesh for tensor in tensors if is_sharded(tensor)}  # type: ignore
    return meshes.pop() if len(meshes) == 1 else None


def spread_beside(
    weight: Tensor | None, A: Tensor, B: Tensor, transposed: bool, rows: bool
) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank), spread as the weight beside them is.

    Where W is split along `in`, A is; where along `out`, B is; where along its experts, both are;
    else each process has all of them, as it has of the rows of some weight.
    """
    if weight is None or not is_sharded(weight) or is_sharded(A):
        return A, B
    from torch.distributed.tensor import Replicate, Shard

    out, width = (weight.ndim - 1, weight.ndim - 2) if transposed \
        else (weight.ndim - 2, weight.ndim - 1)
    of_A: list[Any] = []
    of_B: list[Any] = []
    for placement in weight.placements:  # type: ignore[attr-defined]
        axis: Any = placement.dim if placement.is_shard() and not rows else None
        stack = axis is not None and axis < weight.ndim - 2
        of_A.append(Shard(axis if stack else A.ndim - 1) if stack or axis == width else Replicate())
        of_B.append(Shard(axis if stack else B.ndim - 2) if stack or axis == out else Replicate())
    mesh = weight.device_mesh  # type: ignore[attr-defined]
    return _distributed(A, mesh, of_A), _distributed(B, mesh, of_B)


def _distributed(tensor: Tensor, mesh: Any, placements: Any) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.detach(), mesh, placements)
