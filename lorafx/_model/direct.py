"""Adapted linear calls of which no gradient is asked: when they are two products a branch.

For one token the products take less time than the questions about them, and in a model, where each
layer is met once a token, a frame of Python costs more than what is done in it. So all is asked,
and computed, in one frame, at once for a layer that is one linear call and for calls that are
joined. What is set on a branch or its factors is asked once, until something is set on any. Each
call reads A and B as they are then, and asks for hooks: nothing tells of what is written into the
tables of a module, nor of `.data`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._graph.modules import LAST_CHANGE
from .._kernels.direct import Term, add_to_rows, wider
from .._kernels.linears import many_rows
from .._kernels.private import any_autocast, any_global_hook, runs_as_called
from .._kernels.tensors import PLAIN
from .branches import Branch
from .choice import Selection
from .factors import Factors


_BIASES = (type(None), *PLAIN)


class LinearForward(NamedTuple):
    """The attributes of a module whose forward is one adapted linear call of its input."""

    weight: str
    bias: str | None
    branches: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Products:
    """What a branch does for a selection, if that is to add products and no more.

    It holds until another change, and while the tables of hooks are empty.
    """

    change: object
    weights: Mapping[str, float]  # the selection's own
    hooks: tuple[Mapping[int, Any], ...]
    factors: tuple[tuple[Any, float], ...]  # (the table that has A and B, w s)


def direct_first(forward: Callable[..., Any], linear: LinearForward) -> Callable[..., Any]:
    """A module's forward, this linear call of a Parameter: directly, else as it is computed."""
    @functools.wraps(forward)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() and len(args) == 1 and not kwargs:
            found = directly(args[0], (self,), linear)
            if found:
                return found[0]
        return forward(self, *args, **kwargs)

    run._direct = linear  # type: ignore[attr-defined]
    return run


def directly(x: Any, members: Sequence[Any], within: LinearForward | None = None) -> list[Tensor]:
    """Return x W^T + b and what branches add, of each member up to one where there is more to do.

    A member is a linear call (W, b, *branches), or a module; who asks `within` the forward of one
    says what it computes. More is to do where something is hooked to or set on a branch, drops out,
    has no values, is spread over processes, adds to some rows of W only, or where W + s B A takes
    less time.
    """
    results: list[Tensor] = []
    if torch.is_grad_enabled() or torch.compiler.is_dynamo_compiling():
        return results  # an exporter that is no compiler has a mode, which `runs_as_called` tells
    if any_autocast() or not runs_as_called() or any_global_hook():
        return results
    if type(x) not in PLAIN or x.layout is not torch.strided or x.is_nested or not x.numel():
        return results
    dtype, one = x.dtype, x.numel() == x.shape[-1]
    for member in members:
        if isinstance(member, tuple):
            weight, bias, *branches = member
        else:
            linear, owner = within or _called(member), member.__dict__
            if linear is None:
                return results
            held, modules, (first, second, names) = owner["_parameters"], owner["_modules"], linear
            if "trained" in modules or first not in held:
                return results
            if second is not None and second not in held:
                return results
            weight, bias = held[first], None if second is None else held[second]
            branches = [*map(modules.get, names)]
        if type(weight) not in PLAIN or type(bias) not in _BIASES or weight.dtype is not dtype:
            return results
        if not one and many_rows(x, weight.numel(), sum(weight.shape)):
            return results
        terms: list[Term] = []
        for branch in branches:
            if type(branch) is not Branch:  # something stands around it
                return results
            state = branch.__dict__
            products, selection = state.get("products"), state["choice"].read()
            if (products is None or products.change is not LAST_CHANGE[0]
                    or products.weights is not selection.weights):
                products = _products_of(branch, selection)
            if products is None or any(products.hooks):
                return results
            for tensors, scale in products.factors:
                A, B = tensors.get("A"), tensors.get("B")
                if (type(A) not in PLAIN or type(B) not in PLAIN or B.dtype is not A.dtype
                        or A.dtype is not dtype and not (one and wider(A, x))):
                    return results
                terms.append((A, B, scale))
        # in the shape of x, whose rows by themselves may be added up in another order
        y = F.linear(x, weight, bias)
        if not one or dtype.itemsize < 4:  # in two bytes, mv rounds partial sums
            add_to_rows(y, x, terms)
        else:
            row, whole = x.reshape(-1), y.view(-1)  # (in), (out)
            for A, B, scale in terms:
                whole.addmv_(B, torch.mv(A, row), alpha=scale)
        results.append(y)
    return results


def _called(module: Any) -> LinearForward | None:
    """The linear call that calling a member of `joined` is, if that does nothing else."""
    cls, state = type(module), module.__dict__
    linear: LinearForward | None = getattr(cls.forward, "_direct", None)
    if linear is None or cls.__call__ is not nn.Module.__call__:
        return None
    if state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state:
        return None
    return None if state.get("_compiled_call_impl") is not None else linear


def _products_of(branch: Branch, selection: Selection) -> Products | None:
    """Ask all that is told of when it changes; None if a branch does more than to add products."""
    change, hooks, factors = LAST_CHANGE[0], [], []
    modules: list[Any] = [branch]
    for name, weight in selection.weights.items():
        found = selection.held(branch, name)
        if found is None:
            continue
        if type(found) is not Factors or found.missing or found.dropping:
            return None
        modules.append(found)
        factors.append((found._parameters, weight * found.scale))
    for module in modules:  # of hooks, those of the backward pass do nothing here
        state = module.__dict__
        if "forward" in state or state.get("_compiled_call_impl") is not None:
            return None
        hooks += [state["_forward_hooks"], state["_forward_pre_hooks"]]
    if branch.rows is not None or selection.rows is not None:
        return None
    products = Products(change, selection.weights, tuple(hooks), tuple(factors))
    if not selection.retired:  # what has gone is not kept
        branch.__dict__["products"] = products
    return products
