"""Linear calls with branches, on tensors only: y_k = x W_k^T + b_k + sum s (x A^T) B^T for calls that share x.

One autograd.Function computes all of them and their gradients, but for a small call by itself, which plain operators
compute in less time. With rows x (N, in), R the ranks of all addends together, h = x cat(A)^T (N, R) and
G = [s dY B] (N, R), by the chain rule

    dA = G^T x      dB = s dY^T h      dX = sum dY_k W_k + G cat(A)

so x is read once for all ranks, nothing of the size of an output is made but the outputs, and x and h are all that is
saved. If A and B are wider than x, these products are computed in their dtype and rounded to x's only where they are
added to y and dX; then some rows of x, y, dX and dY are cast at a time, never all. Where that Function cannot go
(transforms, compilers, tensor subclasses, trained base weights) plain operators compute the same.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import checkpoint as torch_checkpoint
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .products import add_product, over_rows, packed, through, times, unpacked
from .weights import dropped


class Addend(NamedTuple):
    """s (x A^T) B^T, added to the features of a call from `start` on; x is dropped out with probability `dropout`."""

    A: Tensor  # (rank, in)
    B: Tensor  # (length, rank)
    scale: float
    start: int = 0
    dropout: float = 0.0
    shared: bool = False  # whether all addends of calls that share x may drop out the same elements


class Linear(NamedTuple):
    """One linear call, x W^T + b, and what is added to it."""

    weight: Tensor  # (out, in)
    bias: Tensor | None
    addends: Sequence[Addend]


def add_branch(y: Tensor, x: Tensor, addend: Addend) -> Tensor:
    """y + s (x A^T) B^T, in y's dtype, by plain operators.

    x (..., in), y (..., out). A and B are cast to x's dtype, never x to theirs: the weights are the narrow side, so no
    copy of an activation is saved for the backward pass.
    """
    return _added(y, F.linear(dropped(x, addend.dropout), addend.A.to(x.dtype)), addend)


def _added(y: Tensor, h: Tensor, addend: Addend) -> Tensor:
    """y + s h B^T, h (..., rank). B is scaled, before it is cast: inductor of torch 2.13 loses the alpha of a sum."""
    B = (addend.B if addend.scale == 1 else addend.B * addend.scale).to(h.dtype)
    start, length = addend.start, B.shape[0]
    if length == y.size(-1):
        return torch.add(y, F.linear(h, B))
    block = torch.add(y.narrow(-1, start, length), F.linear(h, B))
    return torch.cat([y[..., :start], block, y[..., start + length:]], dim=-1)


def transforming() -> bool:
    """Whether a functorch transform or forward-mode differentiation is under way."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def linears(x: Tensor, calls: Sequence[Linear]) -> list[Tensor]:
    """[x W^T + b + sum s (x A^T) B^T for each call], each (..., out), for x (..., in); in x's dtype.

    A and B may be wider than x and W. Each addend drops out elements of x of its own, unless all are `shared`.
    """
    if not any([call.addends for call in calls]):
        return [F.linear(x, call.weight, call.bias) for call in calls]
    if not _is_plain(x, calls):
        return _by_operators(x, calls)
    if torch._C._is_any_autocast_enabled() and not x.is_meta and x.dtype != torch.float64 and torch.is_autocast_enabled(
            x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, calls = x.to(dtype), [_cast(call, dtype) for call in calls]
        with torch._C._DisableAutocast():
            return _fused(x, calls)
    return _fused(x, calls)


def _is_plain(x: Tensor, calls: Sequence[Linear]) -> bool:
    """Whether the Function can compute these: plain tensors on one device, a frozen base, no transform, no tracer."""
    if torch.compiler.is_compiling() or type(x) not in PLAIN or transforming() or _tracing() or _caching():
        return False
    if x.layout is not torch.strided or x.is_nested or not x.ndim:
        return False
    device = x.device
    for weight, bias, addends in calls:
        if weight.requires_grad or type(weight) not in PLAIN or weight.device != device or 0 in weight.shape:
            return False
        if bias is not None and (bias.requires_grad or type(bias) not in PLAIN):
            return False
        for A, B, *_ in addends:
            if type(A) not in PLAIN or type(B) not in PLAIN or A.device != device or B.device != device:
                return False
    return True


def _tracing() -> bool:
    """Whether torch.jit or make_fx is noting down operators."""
    return torch._C._get_tracing_state() is not None or torch._C._get_dispatch_mode(_PROXY) is not None


def _caching() -> bool:
    """Whether selective checkpointing keeps results of operators, which must not be written into."""
    return torch._C._len_torch_dispatch_stack() > 0 and any(
        isinstance(mode, _CACHES) for mode in _get_current_dispatch_mode_stack())


PLAIN = (Tensor, nn.Parameter)  # types that the kernels know
_CACHES = (torch_checkpoint._CachingTorchDispatchMode, torch_checkpoint._CachedTorchDispatchMode)
_PROXY = torch._C._TorchDispatchModeKey.PROXY
_unsafe_view: Any = torch.ops.aten._unsafe_view.default


def _every(calls: Sequence[Linear]) -> list[Addend]:
    """The addends of all calls in a row."""
    return [addend for call in calls for addend in call.addends]


def _cast(call: Linear, dtype: torch.dtype) -> Linear:
    return Linear(call.weight.to(dtype), None if call.bias is None else call.bias.to(dtype), call.addends)


def _fused(x: Tensor, calls: Sequence[Linear]) -> list[Tensor]:
    every = _every(calls)
    drops = {addend.dropout for addend in every}
    masks = drops != {0.0} and len(every) > 1 and (len(drops) > 1 or not all(addend.shared for addend in every))
    if len(calls) > 1 and (masks or not x.requires_grad and torch.is_grad_enabled() and _train(every)):
        return [y for call in calls for y in linears(x, [call])]  # without dX, each may have a backward of its own
    if masks:
        return _by_operators(x, calls)
    merged = drops == {0.0} and merges(x, calls)
    if len(calls) == 1 and not merged and is_small(x, calls[0]):
        return [_in_place(x, calls[0])]
    plan = _plan(calls, merged, *drops)
    tensors = [tensor for weight, bias, addends in calls for tensor in (
        weight, *(() if bias is None else (bias,)), *(factor for addend in addends for factor in addend[:2]))]
    if torch.is_grad_enabled() and (x.requires_grad or _train(every)):
        return list(_apply(x, plan, *tensors))
    return _computed(x, plan, plan.calls(tensors), saving=False)[0]


def _train(addends: Sequence[Addend]) -> bool:
    return any([addend.A.requires_grad or addend.B.requires_grad for addend in addends])


# Below this many elements of x and y together, the passes over them that the Function saves take less time than its
# Python: then torch's own derivative is used (benchmarks/step.py --rule: float32, two CPU cores).
SMALL_BELOW = 1 << 19


def is_small(x: Tensor, call: Linear) -> bool:
    """Whether plain operators that add into the fresh output are faster, by shapes; as exact; and save no more."""
    out, width = call.weight.shape
    rows = x.numel() // width
    if rows * (out + width) >= SMALL_BELOW or x.dtype not in (torch.float32, torch.float64):
        return False
    if x.ndim > 2 and not x.is_contiguous():  # its rows would be a copy
        return False
    return not any([dropout or A.dtype != x.dtype or B.dtype != x.dtype or B.shape[0] != out
                    or rows >= _MANY and A.shape[0] < _FEW for A, B, _, _, dropout, _ in call.addends])


def _in_place(x: Tensor, call: Linear) -> Tensor:
    """The same by plain operators, for addends as long as the output."""
    y = F.linear(x, call.weight, call.bias)  # in the shape of x, whose rows alone may be added up in another order
    rows, y = (x, y) if x.ndim == 2 else (x.reshape(-1, x.shape[-1]), _unsafe_view(y, (-1, y.shape[-1])))
    for A, B, scale, *_ in call.addends:
        y.addmm_(F.linear(rows, A), B.t(), alpha=scale)
    return y if x.ndim == 2 else _unsafe_view(y, (*x.shape[:-1], y.shape[-1]))


def _by_operators(x: Tensor, calls: Sequence[Linear]) -> list[Tensor]:
    """The same by plain operators; A's that share an undropped x are joined."""
    joined = [addend for addend in _every(calls) if not addend.dropout]
    h: Iterator[Tensor] = iter(())
    if len(joined) > 1:
        A = torch.cat([addend.A.to(x.dtype) for addend in joined])  # (R, in)
        h = iter(_parts(F.linear(x, A), joined, dim=-1))
    outputs = []
    for weight, bias, addends in calls:
        y = F.linear(x, weight, bias)
        for addend in addends:
            alone = len(joined) < 2 or addend.dropout
            y = add_branch(y, x, addend) if alone else _added(y, next(h), addend)
        outputs.append(y)
    return outputs


# W + s B A is formed, and no addend computed by itself, when the rows of x are this many times as many as would make
# the FLOPs of both ways equal, N (in + out) = 2 in out. Beyond that of FLOPs, since small products run at a lower speed
# (benchmarks/step.py --rule: float32, two CPU cores).
MERGE_FROM = 4.0


class _CallPlan(NamedTuple):
    """How some calls on one x are computed: all but their tensors."""

    biased: tuple[bool, ...]
    addends: tuple[tuple[tuple[float, int], ...], ...]  # (scale, start) of each call's
    dropout: float
    merged: bool

    def calls(self, tensors: Iterable[Tensor]) -> list[Linear]:
        """The calls of these tensors, W, b, A, B, A, B, ... in a row."""
        rest = iter(tensors)
        return [Linear(next(rest), next(rest) if biased else None,
                       [Addend(next(rest), next(rest), scale, start) for scale, start in addends])
                for biased, addends in zip(self.biased, self.addends)]

    @property
    def factors(self) -> list[bool]:
        """Whether a tensor is an A or a B, for all tensors in a row."""
        return [place for biased, addends in zip(self.biased, self.addends)
                for place in [False] * (1 + biased) + [True] * (2 * len(addends))]

    def weight(self, call: Linear) -> Tensor:
        """W, or W + sum s B A if that is the plan."""
        if not self.merged or not call.addends:
            return call.weight
        weight = call.weight.clone()
        for A, B, scale, start, *_ in call.addends:
            weight.narrow(0, start, B.shape[0]).addmm_(B, A, alpha=scale)
        return weight


def _plan(calls: Sequence[Linear], merged: bool, dropout: float) -> _CallPlan:
    addends = tuple(tuple((addend.scale / (1 - dropout), addend.start) for addend in call.addends) for call in calls)
    return _CallPlan(tuple(call.bias is not None for call in calls), addends, dropout, merged)


def merges(x: Tensor, calls: Sequence[Linear], share: float = 1.0) -> bool:
    """Whether forming W + s B A is faster, by shapes, and as exact: not where products round float32 operands.

    It is from `share` of the usual number of rows on.
    """
    formed = beside = 0
    for weight, _, addends in calls:
        if addends:
            out, width = weight.shape
            formed, beside = formed + out * width, beside + out + width
    if x.numel() // x.shape[-1] * beside < 2 * share * MERGE_FROM * formed:
        return False
    if any(factor.dtype != x.dtype for call in calls for addend in call.addends for factor in addend[:2]):
        return False
    return x.dtype == torch.float64 or x.dtype == torch.float32 and full_precision(x.device.type)


def full_precision(device: str) -> bool:
    """Whether products of float32 matrices are float32 products on this kind of device, not TF32 or bfloat16."""
    settings: dict[str, Any] = {"cpu": torch.backends.mkldnn, "cuda": torch.backends.cuda}
    return device in settings and settings[device].matmul.fp32_precision in ("none", "ieee")


class _Linears(torch.autograd.Function):
    """(x, plan, W, b, A, B, A, B, ..., W, ...) -> y, ..., differentiable in x and the A and B."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: _CallPlan, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs, h, mask = _computed(x, plan, plan.calls(tensors), saving=True)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, h, None if mask is None else packed(mask), *tensors)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, h, bits, *tensors = ctx.saved_tensors
        plan, needs_dx = ctx.plan, ctx.needs_input_grad[0]
        mask = None if bits is None else unpacked(bits, x)
        batched = any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in gradients)
        if torch.is_grad_enabled() or transforming() or batched:
            return _differentiable(x, plan, tensors, mask, gradients, ctx.needs_input_grad)
        calls = plan.calls(tensors)
        autocast = torch._C._is_any_autocast_enabled()
        with torch._C._DisableAutocast() if autocast else contextlib.nullcontext():
            dX, factors = _gradients(x, plan, calls, h, mask, gradients, needs_dx)
        rest = iter(factors)
        given = [next(rest) if place else None for place in plan.factors]
        return dX, None, *given


# Function.apply without its questions about transforms, which `_is_plain` has asked.
_apply: Any = super(torch.autograd.Function, _Linears).apply


def _computed(
    x: Tensor, plan: _CallPlan, calls: Sequence[Linear], saving: bool
) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """The results, none of them a view; h (N, R) and the mask (N, in) of dropout, where they are needed."""
    outputs = [_base(F.linear(x, plan.weight(call), call.bias)) for call in calls]
    if plan.merged and not saving:
        return outputs, None, None
    rows = x.reshape(-1, x.shape[-1])  # (N, in)
    mask = torch.empty_like(rows, dtype=torch.bool).bernoulli_(1 - plan.dropout) if plan.dropout else None
    addends = _every(calls)
    h = times(_masked(rows, mask), _stacked(addends, x.dtype).t())  # (N, R)
    parts = iter(_parts(h, addends))
    for y, call in zip(outputs, calls) if not plan.merged else ():
        for (_, B, scale, start, *_), part in zip(call.addends, parts):
            block = _columns(y.view(-1, y.shape[-1]), start, B.shape[0])  # (N, length)
            add_product(block, part, _in(B, h.dtype).t(), scale)
    return outputs, h, mask


def _gradients(
    x: Tensor, plan: _CallPlan, calls: Sequence[Linear], h: Tensor, mask: Tensor | None,
    gradients: Sequence[Tensor | None], needs_dx: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dX and [dA, dB, dA, dB, ...] by the formulas above, each in memory of its own."""
    G = torch.empty_like(h)  # (N, R)
    addends = _every(calls)
    factors = _in_columns([_in(addend.B, h.dtype) for addend in addends], len(h))
    parts = zip(_parts(G, addends), _parts(h, addends), factors)
    dX: Tensor | None = None
    dB: list[Tensor | None] = []
    for call, gradient in zip(calls, gradients):
        dY = None if gradient is None else gradient.reshape(-1, gradient.shape[-1]).contiguous()  # (N, out)
        if dY is not None and needs_dx:
            weight = plan.weight(call)
            dX = dY @ weight if dX is None else dX.addmm_(dY, weight)
        for addend, (g, part, B) in zip(call.addends, parts):
            if dY is None:
                g.zero_()
                dB.append(None)
                continue
            block = _columns(dY, addend.start, B.shape[0])  # (N, length)
            found = through(block, B, part, addend.scale, g).t()  # (length, rank)
            dB.append(_copied(found if addend.scale == 1 else found.mul_(addend.scale), addend.B.dtype))
    if dX is not None:
        if mask is not None:
            dX.addcmul_((G @ _stacked(addends, x.dtype)).to(x.dtype), mask.to(x.dtype))
        elif not plan.merged:
            add_product(dX, G, _stacked(addends, x.dtype))
        dX = dX if x.ndim == 2 else _unsafe_view(dX, x.shape)
    dA = _parts(over_rows(G, _masked(x.reshape(-1, x.shape[-1]), mask)), addends, dim=0)  # each (rank, in)
    return dX, [gradient for a, b, addend in zip(dA, dB, addends)
                for gradient in (None if b is None else _copied(a, addend.A.dtype), b)]


def _differentiable(
    x: Tensor, plan: _CallPlan, tensors: Sequence[Tensor], mask: Tensor | None,
    gradients: Sequence[Tensor | None], needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients, by operators that can be differentiated again or mapped over.

    Each place has an alias of its own: a factor may stand in several, and x may be computed from the factors.
    """
    with torch.enable_grad():
        x, *tensors = (t.view_as(t) if isinstance(t, Tensor) else t for t in (x, *tensors))
        outputs = []
        for call in plan.calls(tensors):
            y = F.linear(x, call.weight, call.bias)
            for addend in call.addends:
                y = _added(y, F.linear(_masked(x, mask), addend.A.to(x.dtype)), addend)
            outputs.append(y)
        inputs = [x, x, *tensors]  # the second stands for the plan
        given = [(y, gradient) for y, gradient in zip(outputs, gradients) if gradient is not None]
        found = iter(torch.autograd.grad(
            [y for y, _ in given], [tensor for tensor, need in zip(inputs, needs) if need],
            [gradient for _, gradient in given], create_graph=True, allow_unused=True))
    return tuple(next(found) if need else None for need in needs)


def _stacked(addends: Sequence[Addend], dtype: torch.dtype) -> Tensor:
    """cat(A), (R, in), in this dtype or a wider one of theirs."""
    A = torch.cat([addend.A for addend in addends]) if len(addends) > 1 else addends[0].A
    return A if A.dtype == dtype else A.to(torch.promote_types(A.dtype, dtype))


def _copied(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix, contiguous, in this dtype and in memory of its own."""
    if matrix.dtype == dtype and matrix._base is None and matrix.is_contiguous():
        return matrix
    return matrix.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _parts(matrix: Tensor, addends: Sequence[Addend], dim: int = 1) -> Sequence[Tensor]:
    """The parts, each as long as its rank, of a matrix that is R long in this dimension."""
    ranks = [addend.A.shape[0] for addend in addends]
    return matrix.split_with_sizes(ranks, dim=dim) if len(ranks) > 1 else (matrix,)


_MANY, _FEW = 256, 16  # from so many rows on, factors of fewer columns than this are laid out by columns


def _in_columns(factors: Sequence[Tensor], rows: int) -> Sequence[Tensor]:
    """The B, laid out by columns where few of them would make a product with rows up to ten times as slow on a CPU."""
    ranks = {B.shape[1] for B in factors}
    if rows < _MANY or len(ranks) > 1 or max(ranks) >= _FEW or factors[0].device.type != "cpu":
        return factors
    joined = torch.cat([B.t() for B in factors], dim=1)  # (rank, sum of lengths)
    return [part.t() for part in joined.split_with_sizes([B.shape[0] for B in factors], dim=1)]


def _columns(matrix: Tensor, start: int, length: int) -> Tensor:
    return matrix if length == matrix.shape[1] else matrix.narrow(1, start, length)


def _in(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _base(y: Tensor) -> Tensor:
    """The same tensor as a view of none: what a Function returns as a view could not be written into."""
    return _unsafe_view(y, y.shape) if y._is_view() else y


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask.view(x.shape)
