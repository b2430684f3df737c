"""One autograd.Function for linear calls on one x: y_k = x W_k^T + b_k + sum s (x A^T) B^T.

With rows x (N, in), R the ranks of all addends together, h = x cat(A)^T (N, R), and
G = [s dY B] (N, R), by the chain rule

    dA = G^T x      dB = s dY^T h      dX = sum dY_k W_k + G cat(A)

so x is read once for all ranks, nothing of the size of an output is made but the outputs, and x and
h are all that is saved. If A and B are wider than x, these products are computed in their dtype and
rounded to x's only where they are added to y and dX; then some rows of x, y, dX and dY are cast at
a time, never all. A is an addend's `right`, B its `left`.
"""

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .addend import Addend
from .calls import AdaptedCall, addends_of, split_by_rank
from .dropout import masked, packed, unpacked
from .private import (
    any_autocast, apply_of, is_legacy_batched, is_transforming, no_autocast, unsafe_view)
from .products import add_product, both_products, in_columns, product, transposed_product


class CallPlan(NamedTuple):
    """How some calls on one x are computed: all but their tensors."""

    biased: tuple[bool, ...]
    addends: tuple[tuple[tuple[float, int], ...], ...]  # (scale, start) of each call's
    dropout: float
    merged: bool
    beside: bool = False  # who calls computed x W^T + b, which stands in W's place

    @staticmethod
    def of(
        calls: Sequence[AdaptedCall], merged: bool, dropout: float, beside: bool = False
    ) -> "CallPlan":
        """The plan of calls whose addends drop out alike; `merged` forms W + sum s B A."""
        scales = []
        for call in calls:
            scales.append(tuple([(a.scale / (1 - dropout), a.start) for a in call.addends]))
        biased = tuple([call.bias is not None for call in calls])
        return CallPlan(biased, tuple(scales), dropout, merged, beside)

    @staticmethod
    def tensors(calls: Sequence[AdaptedCall]) -> list[Tensor]:
        """W, b, B, A, B, A, ... of each call, in a row."""
        tensors = []
        for weight, bias, addends in calls:
            tensors.append(weight)
            if bias is not None:
                tensors.append(bias)
            for addend in addends:
                tensors += addend[:2]
        return tensors

    def calls(self, tensors: Iterable[Tensor]) -> list[AdaptedCall]:
        """The calls of these tensors."""
        rest, calls = iter(tensors), []
        for biased, scales in zip(self.biased, self.addends):
            weight, bias = next(rest), next(rest) if biased else None
            addends = [Addend(next(rest), next(rest), s, -2, start) for s, start in scales]
            calls.append(AdaptedCall(weight, bias, addends))
        return calls

    def in_places(
        self, factors: Iterable[Tensor | None], outputs: Iterable[Tensor | None]
    ) -> list[Tensor | None]:
        """The gradients of B, A, B, A, ..., each in the place of its factor among all tensors.

        An output's gradient is that of what stands in W's place too, if W does not.
        """
        rest = iter(factors)
        places: list[Tensor | None] = []
        for biased, scales, output in zip(self.biased, self.addends, outputs):
            places += [output if self.beside else None] + [None] * biased
            for _ in scales:
                places += next(rest), next(rest)
        return places

    def output(self, x: Tensor, call: AdaptedCall) -> Tensor:
        """x W^T + b, or with W + sum s B A if that is the plan, in memory of its own."""
        if self.beside:
            return call.weight.clone(memory_format=torch.contiguous_format)
        return _not_a_view(F.linear(x, self.weight(call), call.bias))

    def weight(self, call: AdaptedCall) -> Tensor:
        """W, or W + sum s B A if that is the plan."""
        if not self.merged or not call.addends:
            return call.weight
        weight = call.weight.clone()
        for addend in call.addends:
            addend.add_into(weight)
        return weight


def fused(
    x: Tensor, plan: CallPlan, tensors: Sequence[Tensor], differentiable: bool
) -> list[Tensor]:
    """Return the results of the plan's calls of these tensors, `differentiable` if so asked."""
    if differentiable:
        return list(_apply(x, plan, *tensors))
    return _compute(x, plan, plan.calls(tensors), saving=False)[0]


class _Linears(torch.autograd.Function):
    """(x, plan, W, b, B, A, B, A, ..., W, ...) -> y, ..., differentiable in x and the B and A."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: CallPlan, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs, h, mask = _compute(x, plan, plan.calls(tensors), saving=True)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        if plan.beside:  # of y, its shape is enough
            tensors = (tensors[0].new_zeros(()).expand_as(tensors[0]), *tensors[1:])
        ctx.save_for_backward(x, h, None if mask is None else packed(mask), *tensors)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, h, bits, *tensors = ctx.saved_tensors
        plan, needs_dx = ctx.plan, ctx.needs_input_grad[0]
        mask = None if bits is None else unpacked(bits, x)
        batched = any(g is not None and is_legacy_batched(g) for g in gradients)
        if torch.is_grad_enabled() or is_transforming() or batched:
            return _differentiable(x, plan, tensors, mask, gradients, ctx.needs_input_grad)
        calls = plan.calls(tensors)
        with no_autocast() if any_autocast() else contextlib.nullcontext():
            dX, factors = _gradients(x, plan, calls, h, mask, gradients, needs_dx)
        return dX, None, *plan.in_places(factors, gradients)


_apply: Any = apply_of(_Linears)  # `linears` has asked about transforms


def _compute(
    x: Tensor, plan: CallPlan, calls: Sequence[AdaptedCall], saving: bool
) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """The results, none of them a view; h (N, R) and dropout's mask (N, in), where needed."""
    outputs = [plan.output(x, call) for call in calls]
    if plan.merged and not saving:
        return outputs, None, None
    rows = x.reshape(-1, x.shape[-1])  # (N, in)
    mask = None
    if plan.dropout:
        mask = torch.empty_like(rows, dtype=torch.bool).bernoulli_(1 - plan.dropout)
    addends = addends_of(calls)
    h = product(masked(rows, mask), _stacked(addends, x.dtype).t())  # (N, R)
    if plan.merged:
        return outputs, h, mask
    halves = iter(split_by_rank(h, addends))
    for y, call in zip(outputs, calls):
        for addend in call.addends:
            B = _in_dtype(addend.left, h.dtype)
            block = _columns(y.view(-1, y.shape[-1]), addend.start, B.shape[0])  # (N, length)
            add_product(block, next(halves), B.t(), addend.scale)
    return outputs, h, mask


def _gradients(
    x: Tensor, plan: CallPlan, calls: Sequence[AdaptedCall], h: Tensor, mask: Tensor | None,
    gradients: Sequence[Tensor | None], needs_dx: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dX and [dB, dA, dB, dA, ...] by the formulas above, each in memory of its own."""
    G = torch.empty_like(h)  # (N, R)
    addends = addends_of(calls)
    Bs = in_columns([_in_dtype(addend.left, h.dtype) for addend in addends], len(h))
    parts = zip(split_by_rank(G, addends), split_by_rank(h, addends), Bs)
    dX: Tensor | None = None
    dBs: list[Tensor | None] = []
    for call, gradient in zip(calls, gradients):
        dY = None  # (N, out)
        if gradient is not None:
            dY = gradient.reshape(-1, gradient.shape[-1]).contiguous()
        if dY is not None and needs_dx and plan.beside:
            dX = dY.new_zeros(len(h), x.shape[-1])
        elif dY is not None and needs_dx:
            weight = plan.weight(call)
            dX = dY @ weight if dX is None else dX.addmm_(dY, weight)
        for addend, (g, half, B) in zip(call.addends, parts):
            dBs.append(_fill_g(dY, addend, g, half, B))
    if dX is not None:
        if mask is not None:
            dX.addcmul_((G @ _stacked(addends, x.dtype)).to(x.dtype), mask.to(x.dtype))
        elif not plan.merged:
            add_product(dX, G, _stacked(addends, x.dtype))
        dX = dX if x.ndim == 2 else unsafe_view(dX, x.shape)
    rows = masked(x.reshape(-1, x.shape[-1]), mask)
    dAs = split_by_rank(transposed_product(G, rows), addends, dim=0)  # each (rank, in)
    factors: list[Tensor | None] = []
    for dA, dB, addend in zip(dAs, dBs, addends):
        factors += dB, None if dB is None else _own(dA, addend.right.dtype)
    return dX, factors


def _fill_g(
    dY: Tensor | None, addend: Addend, g: Tensor, half: Tensor, B: Tensor
) -> Tensor | None:
    """Fill g = s dY B, (N, rank), and return dB = s dY^T h, (length, rank).

    They are zeros and None for an output that was not used.
    """
    if dY is None:
        g.zero_()
        return None
    block = _columns(dY, addend.start, B.shape[0])  # (N, length)
    dB = both_products(block, B, half, addend.scale, g)[1].t()
    return _own(dB if addend.scale == 1 else dB.mul_(addend.scale), addend.left.dtype)


def _differentiable(
    x: Tensor, plan: CallPlan, tensors: Sequence[Tensor], mask: Tensor | None,
    gradients: Sequence[Tensor | None], needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients, by operators that can be differentiated again or mapped over.

    Each place has an alias of its own: a factor may stand in several, and x may be computed from
    the factors.
    """
    with torch.enable_grad():
        x, *tensors = (t.view_as(t) if isinstance(t, Tensor) else t for t in (x, *tensors))
        used, given = [], []
        for call, gradient in zip(plan.calls(tensors), gradients):
            y = call.weight if plan.beside else F.linear(x, call.weight, call.bias)
            for addend in call.addends:
                h = F.linear(masked(x, mask), addend.right.to(x.dtype))
                y = addend.add_half(y, h)
            if gradient is not None:
                used.append(y)
                given.append(gradient)
        inputs = [x, x, *tensors]  # the second stands for the plan
        wanted = [tensor for tensor, need in zip(inputs, needs) if need]
        found = iter(torch.autograd.grad(used, wanted, given, create_graph=True, allow_unused=True))
    return tuple(next(found) if need else None for need in needs)


def _stacked(addends: Sequence[Addend], dtype: torch.dtype) -> Tensor:
    """cat(A), (R, in), in this dtype or a wider one of theirs."""
    A = addends[0].right
    if len(addends) > 1:
        A = torch.cat([addend.right for addend in addends])
    return A if A.dtype == dtype else A.to(torch.promote_types(A.dtype, dtype))


def _own(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix, contiguous, in this dtype and in memory of its own."""
    if matrix.dtype == dtype and matrix._base is None and matrix.is_contiguous():
        return matrix
    return matrix.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _columns(matrix: Tensor, start: int, length: int) -> Tensor:
    return matrix if length == matrix.shape[1] else matrix.narrow(1, start, length)


def _in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _not_a_view(y: Tensor) -> Tensor:
    """The same tensor as no view: a view that a Function returns could not be written into."""
    return unsafe_view(y, y.shape) if y._is_view() else y
