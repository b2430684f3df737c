"""What Python reads of a weight beside which branches stand."""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from .._adapter.names import branch_name
from .._kernels.linears import transforming
from .._kernels.weights import Part, whole
from .adapted_weight import NARROW, AdaptedWeight
from .branches import Branch, Trained


FROZEN_PREFIX = "frozen_"


def adapted_names(owner: nn.Module) -> tuple[str, ...]:
    """The attributes of which Python reads adapted tensors at this module."""
    names: tuple[str, ...] = getattr(type(owner), "_adapted", ())
    return names


def original_name(owner: nn.Module, attribute: str) -> str:
    """The name of the tensor that an attribute reads: `weight` for the `frozen_weight` of an adapted module."""
    name = attribute.removeprefix(FROZEN_PREFIX)
    return name if name in adapted_names(owner) else attribute


def base_tensor(owner: nn.Module, attribute: str) -> Any:
    """What a module has under this name without adapters: W."""
    for table in (owner._parameters, owner._buffers, vars(owner)):
        if attribute in table:
            return table[attribute]
    cls = getattr(type(owner), "_user_class", type(owner))
    return getattr(cls, attribute).__get__(owner)  # a parametrization's property


def base_or_trained(owner: nn.Module, attribute: str) -> Any:
    """W, or what an active adapter that trains the module whole has in its place."""
    held = owner._modules.get("trained")
    if isinstance(held, Trained) and held.used is not None:
        tensors = held._modules[held.used]._parameters  # type: ignore[union-attr]
        if attribute in tensors:
            return tensors[attribute]
    return base_tensor(owner, attribute)


def adapted(owner: nn.Module, attribute: str) -> Tensor:
    """What Python reads of a module under this name: W + sum s B A, over the active adapters at its sites.

    It is an `AdaptedWeight`, or the sum itself where no subclass of Tensor can go: in functions that are being
    compiled, transformed or differentiated forward, and in the layers of torch that would not take their fused paths
    with one.
    """
    matrix = base_or_trained(owner, attribute)
    name = branch_name(attribute)
    parts: list[Part] = []
    for key, module in owner._modules.items():
        if key.partition("[")[0] == name and isinstance(module, Branch):
            parts += module.parts()
    if not parts:
        return matrix  # type: ignore[no-any-return]
    compiling, make = torch.compiler.is_compiling(), AdaptedWeight.of
    in_parts = matrix.dtype in NARROW or any(part.dropout for part in parts)
    if not in_parts and (compiling or transforming() or (
            sys._getframe(2).f_globals.get("__name__") in _FUSED and not _needs_grad(parts))):
        return whole(matrix, parts)
    if compiling:  # the compiler cannot make the tensor: its graph ends here
        make = torch.compiler.disable(  # type: ignore[no-untyped-call]
            make, reason="Python reads an adapted weight of a narrow dtype, or with dropout")
    return make(matrix, parts, f"the {attribute} of a {type(owner).__name__}")


# Layers of torch that read their children's weights for a fused kernel, and ask for plain tensors.
_FUSED = ("torch.nn.modules.activation", "torch.nn.modules.transformer")


def _needs_grad(parts: list[Part]) -> bool:
    return torch.is_grad_enabled() and any(part.left.requires_grad or part.right.requires_grad for part in parts)
