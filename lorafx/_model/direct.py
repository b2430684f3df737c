"""Adapted linear calls of which no gradient is asked: when they are two products a branch.

Each call reads A and B as they are then: nothing tells of what `.data` or a hook put there. So
little is asked of them, and in a row.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._kernels.direct import Term, direct, is_direct, wider
from .._kernels.linears import many_rows
from .._kernels.private import any_global_hook
from .._kernels.tensors import PLAIN
from .branches import Branch
from .factors import Factors


class LinearForward(NamedTuple):
    """The attributes of a module whose forward is one adapted linear call of its input."""

    weight: str
    bias: str | None
    branches: tuple[str, ...]


def directly(x: Any, weight: Tensor, bias: Tensor | None, *branches: Branch) -> Tensor | None:
    """Return x W^T + b and what the branches add, or None if it is not that and no more."""
    if is_direct(x):
        terms = terms_of(x, weight, bias, branches)
        if terms is not None:
            return direct(x, weight, bias, terms)
    return None


def direct_first(forward: Callable[..., Any], linear: LinearForward) -> Callable[..., Any]:
    """A module's forward, this linear call of a Parameter: directly, else as it is computed."""
    @functools.wraps(forward)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() and len(args) == 1 and not kwargs:
            operands = _operands(self.__dict__, linear)
            if operands is not None:
                y = directly(args[0], *operands)
                if y is not None:
                    return y
        return forward(self, *args, **kwargs)

    run._direct = linear  # type: ignore[attr-defined]
    return run


def directly_together(x: Any, members: Sequence[Any]) -> list[Tensor] | None:
    """What members of `joined` give for x, or None if not all are direct."""
    if not is_direct(x):
        return None
    calls = []
    for member in members:
        found = _called(member) if isinstance(member, nn.Module) else member
        if found is None:
            return None
        weight, bias, *branches = found
        terms = terms_of(x, weight, bias, branches)
        if terms is None:
            return None
        calls.append((weight, bias, terms))
    return [direct(x, *call) for call in calls]


def _called(module: nn.Module) -> Sequence[Any] | None:
    """W, b and the branches of a module, if calling it does no more than its linear call."""
    cls, state = type(module), module.__dict__
    linear = getattr(cls.forward, "_direct", None)
    if linear is None or cls.__call__ is not nn.Module.__call__:
        return None
    if state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state:
        return None
    if state.get("_compiled_call_impl") is not None:
        return None
    return _operands(state, linear)


def _operands(state: dict[str, Any], linear: LinearForward) -> Sequence[Any] | None:
    """W, b and the branches, if W and b are a module's own Parameters."""
    held, modules = state["_parameters"], state["_modules"]
    weight, bias, branches = linear
    if "trained" in modules or weight not in held or bias is not None and bias not in held:
        return None
    b = None if bias is None else held[bias]
    return held[weight], b, *map(modules.get, branches)


def terms_of(
    x: Tensor, weight: Tensor, bias: Tensor | None, branches: Iterable[Branch]
) -> list[Term] | None:
    """Return what `direct` adds to x W^T + b, or None if that is not all that happens there.

    It is not where something is hooked to a branch or patches it, drops out, has no values yet, is
    spread over processes, adds to some rows of W only, or where W + s B A takes less time.
    """
    dtype, one = x.dtype, x.numel() == x.size(-1)
    if type(weight) not in PLAIN or weight.dtype is not dtype or any_global_hook():
        return None
    if bias is not None and type(bias) not in PLAIN:
        return None
    if not one and many_rows(x, weight.numel(), sum(weight.shape)):
        return None
    found: list[Term] = []
    for branch in branches:
        if type(branch) is not Branch:  # something stands around it
            return None
        state = branch.__dict__  # of hooks, those of the backward pass do nothing here
        if state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state:
            return None
        if state["rows"] is not None or state.get("_compiled_call_impl") is not None:
            return None
        selection = state["choice"].read()
        if selection.rows is not None:
            return None
        adapters = state["_modules"]
        for name, share in selection.weights.items():
            factors = adapters.get(name)
            if factors is None:
                continue
            if type(factors) is not Factors:
                return None
            state = factors.__dict__
            if state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state:
                return None
            if state["missing"] or state.get("_compiled_call_impl") is not None:
                return None
            if state["dropout"] and state["training"]:
                return None
            held = state["_parameters"]
            A, B = held.get("A"), held.get("B")
            if type(A) not in PLAIN or type(B) not in PLAIN:
                return None
            if A.dtype is not dtype and not (one and wider(A, x)) or B.dtype is not A.dtype:
                return None
            found.append((A, B, share * state["scale"]))
    return found
