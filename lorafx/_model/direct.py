"""Adapted linear calls of which no gradient is asked: when they are two products a branch.

Each call reads A and B as they are then: nothing tells of what `.data` or a hook put there. So
little is asked of them, and in a row.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .._graph.modules import is_untouched
from .._kernels.direct import Term, wider
from .._kernels.linears import many_rows
from .._kernels.private import any_global_hook
from .._kernels.tensors import PLAIN
from .branches import Branch


def terms_of(
    x: Tensor, weight: Tensor, bias: Tensor | None, branches: Iterable[Branch]
) -> list[Term] | None:
    """Return what `direct` adds to x W^T + b, or None if that is not all that happens there.

    It is not where something is hooked to a branch or patches it, drops out, has no values yet, is
    spread over processes, adds to some rows of W only, or where W + s B A takes less time.
    """
    dtype, one = x.dtype, x.numel() == x.shape[-1]
    if type(weight) not in PLAIN or weight.dtype is not dtype or any_global_hook():
        return None
    if bias is not None and type(bias) not in PLAIN:
        return None
    if not one and many_rows(x, weight.numel(), sum(weight.shape)):
        return None
    found: list[Term] = []
    for branch in branches:
        if branch.rows is not None or not is_untouched(branch):
            return None
        selection = branch.choice.read()
        if selection.rows is not None:
            return None
        for name, share in selection.weights.items():
            factors: Any = selection.held(branch, name)
            if factors is None:
                continue
            if factors.missing or factors.dropout and factors.training or not is_untouched(factors):
                return None
            held = factors._parameters
            A, B = held.get("A"), held.get("B")
            if type(A) not in PLAIN or type(B) not in PLAIN:
                return None
            if A.dtype is not dtype and not (one and wider(A, x)) or B.dtype is not A.dtype:
                return None
            found.append((A, B, share * factors.scale))
    return found
