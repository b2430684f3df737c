"""Adapted linear calls of which no gradient is asked: when they are two products a branch.

Each call reads A and B as they are then: nothing tells of what `.data` or a hook put there. For one
token the products take less time than the questions about them, and in a model, where each layer is
met once a token, a frame of Python costs more than what is done in it. So all is asked, and
computed, in one frame, at once for a layer that is one linear call.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._kernels.direct import Term, add_to_rows, wider
from .._kernels.linears import many_rows
from .._kernels.private import any_autocast, any_global_hook, runs_as_called
from .._kernels.tensors import PLAIN
from .branches import Branch
from .factors import Factors


_BIASES = (type(None), *PLAIN)


class LinearForward(NamedTuple):
    """The attributes of a module whose forward is one adapted linear call of its input."""

    weight: str
    bias: str | None
    branches: tuple[str, ...]


def direct_first(forward: Callable[..., Any], linear: LinearForward) -> Callable[..., Any]:
    """A module's forward, this linear call of a Parameter: directly, else as it is computed."""
    @functools.wraps(forward)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() and len(args) == 1 and not kwargs:
            y = directly(args[0], linear, self.__dict__)
            if y is not None:
                return y
        return forward(self, *args, **kwargs)

    run._direct = linear  # type: ignore[attr-defined]
    return run


def leading_directly(x: Any, members: Sequence[Any]) -> list[Tensor]:
    """What members of `joined` give for x, up to the first that is not direct."""
    results: list[Tensor] = []
    if torch.is_grad_enabled() or torch.compiler.is_dynamo_compiling():
        return results
    for member in members:
        if isinstance(member, nn.Module):
            cls, state = type(member), member.__dict__
            linear = getattr(cls.forward, "_direct", None)
            if linear is None or cls.__call__ is not nn.Module.__call__:
                break
            if state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state:
                break
            if state.get("_compiled_call_impl") is not None:
                break
            y = directly(x, linear, state)
        else:
            y = directly(x, member)
        if y is None:
            break
        results.append(y)
    return results


def directly(x: Any, linear: Sequence[Any], owner: dict[str, Any] | None = None) -> Tensor | None:
    """Return x W^T + b and what the branches add, or None if there is more to do than that.

    The linear call is (W, b, *branches), or names in its owner's state. More is to do where
    something is hooked to or set on a branch, drops out, has no values, is spread over processes,
    adds to some rows of W only, or where W + s B A takes less time.
    """
    if torch.is_grad_enabled() or torch.compiler.is_dynamo_compiling():
        return None  # an exporter that is no compiler has a mode, of which `runs_as_called` tells
    if any_autocast() or not runs_as_called() or any_global_hook():
        return None
    if owner is None:
        weight, bias, *branches = linear
    else:
        held, modules = owner["_parameters"], owner["_modules"]
        first, second, names = linear
        if "trained" in modules or first not in held or second is not None and second not in held:
            return None
        weight, bias = held[first], None if second is None else held[second]
        branches = [*map(modules.get, names)]
    if type(x) not in PLAIN or type(weight) not in PLAIN or type(bias) not in _BIASES:
        return None
    if x.layout is not torch.strided or x.is_nested or weight.dtype is not x.dtype:
        return None
    dtype, count, one = x.dtype, x.numel(), x.numel() == x.size(-1)
    if not count or not one and many_rows(x, weight.numel(), sum(weight.shape)):
        return None
    terms: list[Term] = []
    for branch in branches:
        if type(branch) is not Branch:  # something stands around it
            return None
        state = branch.__dict__  # of hooks, those of the backward pass do nothing here
        if (state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state
                or state["rows"] is not None or state.get("_compiled_call_impl") is not None):
            return None
        selection, adapters = state["choice"].read(), state["_modules"]  # before `retired`
        if selection.rows is not None:
            return None
        for name, share in selection.weights.items():
            factors = selection.held(branch, name) if selection.retired else adapters.get(name)
            if factors is None:
                continue
            state = factors.__dict__
            if (type(factors) is not Factors or state["missing"]
                    or state["dropout"] and state["training"]
                    or state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state
                    or state.get("_compiled_call_impl") is not None):
                return None
            A, B = map(state["_parameters"].get, "AB")
            if (type(A) not in PLAIN or type(B) not in PLAIN or B.dtype is not A.dtype
                    or A.dtype is not dtype and not (one and wider(A, x))):
                return None
            terms.append((A, B, share * state["scale"]))
    # in the shape of x, whose rows by themselves may be added up in another order
    y = F.linear(x, weight, bias)
    if not one or dtype.itemsize < 4:  # in two bytes, mv rounds partial sums
        return add_to_rows(y, x, terms)
    row, whole = x.reshape(-1), y.view(-1)  # (in), (out)
    for A, B, scale in terms:
        whole.addmv_(B, torch.mv(A, row), alpha=scale)
    return y
