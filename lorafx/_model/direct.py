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


def directly(
    x: Any, weight: Tensor, bias: Tensor | None, branches: Iterable[Branch]
) -> Tensor | None:
    """Return x W^T + b and what the branches add, or None if it is not that and no more."""
    if is_direct(x):
        terms = terms_of(x, weight, bias, branches)
        if terms is not None:
            return direct(x, weight, bias, terms)
    return None


def directly_together(x: Any, operands: Sequence[Any]) -> list[Tensor] | None:
    """The results of linear calls, each (W, b, branches), or None if not all are direct."""
    if not is_direct(x):
        return None
    calls = []
    for found in operands:
        terms = None if found is None else terms_of(x, *found)
        if terms is None:
            return None
        calls.append((found, terms))
    return [direct(x, weight, bias, terms) for (weight, bias, _), terms in calls]


def direct_first(forward: Callable[..., Any], linear: LinearForward) -> Callable[..., Any]:
    """A module's forward, this linear call of a Parameter: directly, else as it is computed."""
    weight, bias, branches = linear

    @functools.wraps(forward)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() and len(args) == 1 and not kwargs:
            held, modules = self._parameters, self._modules
            if weight in held and (bias is None or bias in held) and "trained" not in modules:
                added: Any = map(modules.get, branches)
                b = None if bias is None else held[bias]
                y = directly(args[0], held[weight], b, added)  # type: ignore[arg-type]
                if y is not None:
                    return y
        return forward(self, *args, **kwargs)

    return run


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
            factors = adapters.get(name)  # first, as in `Selection.held`
            if selection.retired:
                factors = selection.held(branch, name)
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
