"""Adapted linear calls of which no gradient is asked: when they are two products a branch.

Each call reads A and B as they are then: nothing tells of what `.data` or a hook put there. So
little is asked of them, and in a row.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .._graph.modules import is_bare
from .._kernels.direct import Term
from .._kernels.linears import many_rows
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
    if type(weight) not in PLAIN or weight.dtype is not dtype:
        return None
    if bias is not None and type(bias) not in PLAIN:
        return None
    if not one and many_rows(x, weight.numel(), sum(weight.shape)):
        return None
    found: list[Term] = []
    for branch in branches:
        if branch.rows is not None or not is_bare(branch):
            return None
        for name, share in branch._active:
            factors: Any = branch._modules[name]
            if factors.missing or factors.dropping or not is_bare(factors):
                return None
            A, B = factors._parameters.get("A"), factors._parameters.get("B")
            if type(A) not in PLAIN or type(B) not in PLAIN or A.dtype is not B.dtype:
                return None
            if A.dtype is not dtype and not (one and A.dtype.itemsize > dtype.itemsize):
                return None
            found.append((A, B, share * factors.scale))
    return found
