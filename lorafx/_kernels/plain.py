"""y_k = x W_k^T + b_k + sum s (x R^T) L^T by plain operators, which torch differentiates."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .again import Again
from .calls import AdaptedCall, addends_of, split_by_rank
from .compiled import first_half
from .private import unsafe_view


def by_operators(x: Tensor, calls: Sequence[AdaptedCall]) -> list[Tensor]:
    """Return the results of calls on one x; the R's that share an undropped x are joined."""
    joined = [addend for addend in addends_of(calls) if not addend.is_apart]
    halves: list[Tensor] = []
    if len(joined) > 1:
        right = torch.cat([addend.right.to(x.dtype) for addend in joined])  # (ranks, in)
        half = first_half(x, right, joined[0].proven is not None)
        halves.extend(split_by_rank(half, joined, dim=-1))
    outputs = []
    for weight, bias, addends in calls:
        y = F.linear(x, weight, bias)
        for addend in addends:
            if len(joined) < 2 or addend.is_apart:
                y = addend.add_to_output(y, x, fresh=True)
            else:
                y = addend.add_half(y, halves.pop(0))
        outputs.append(y)
    return outputs


def in_place(x: Tensor, call: AdaptedCall, instead: Again | None = None) -> Tensor:
    """Return the result of one call; addends as long as the output are added in place.

    Autograd keeps what is given `instead` of x.
    """
    # in the shape of x, whose rows by themselves may be added up in another order
    y = F.linear(x, call.weight, call.bias)
    rows = x
    if x.ndim != 2:
        rows, y = x.reshape(-1, x.shape[-1]), unsafe_view(y, (-1, y.shape[-1]))
    for addend in call.addends:
        h = addend.add_into_output(y, rows)
        if instead is not None and addend.right.requires_grad:
            instead.stand_in(h.grad_fn, "self")  # of a product, rows A^T
    return y if x.ndim == 2 else unsafe_view(y, (*x.shape[:-1], y.shape[-1]))
