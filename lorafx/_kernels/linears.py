"""How linear calls on one x, y_k = x W_k^T + b_k + sum s (x A^T) B^T, are computed: the choice.

The Function of `fused` computes all of them and their gradients, but for a small call by itself,
which plain operators compute in less time. Where that Function cannot go (transforms, compilers,
tensor subclasses, trained base weights) plain operators compute the same. For many rows
W + sum s B A is formed.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .addend import Addend
from .again import again
from .calls import AdaptedCall, addends_of
from .fused import CallPlan, fused
from .plain import by_operators, in_place
from .private import any_autocast, is_caching, is_tracing, is_transforming, no_autocast
from .products import has_few_columns
from .tensors import PLAIN

# Below this many elements of x and y together, the passes over them that the Function saves take
# less time than its Python: then torch's own derivative is used (benchmarks/step.py --rule:
# float32, two CPU cores).
SMALL_BELOW = 1 << 19

# W + s B A is formed, and no addend computed by itself, when the rows of x are this many times as
# many as would make the FLOPs of both equal, N (in + out) = 2 in out. Beyond that of FLOPs, since
# small products run at a lower speed (benchmarks/step.py --rule: float32, two CPU cores).
MERGE_FROM = 2.5


def linears(x: Tensor, calls: Sequence[AdaptedCall]) -> list[Tensor]:
    """Return [x W^T + b + sum s (x A^T) B^T for each call], each (..., out), for x (..., in).

    The results have x's dtype. A and B may be wider than x and W. Each addend drops out elements of
    x of its own, unless all are `shared`.
    """
    if not any([call.addends for call in calls]):
        return [F.linear(x, call.weight, call.bias) for call in calls]
    if not _is_plain(x, calls):
        return by_operators(x, calls)
    if any_autocast() and not x.is_meta and x.dtype != torch.float64:
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, calls = x.to(dtype), [call.cast(dtype) for call in calls]
            with no_autocast():
                return _fastest(x, calls)
    return _fastest(x, calls)


def add_beside(x: Tensor, y: Tensor, addends: Sequence[Addend]) -> Tensor:
    """Return y + sum s (x A^T) B^T, (..., out), in y's dtype, for a y that who calls computed.

    A and B may be wider than x (..., in) and y.
    """
    if not addends:
        return y
    call = AdaptedCall(y, None, addends)
    rates = {addend.dropout for addend in addends}
    masks = rates != {0.0} and len(addends) > 1  # more than one is needed
    if masks or not _fits_beside(x, y, addends):
        for addend in addends:
            y = addend.add_to_output(y, x.to(y.dtype))
        return y
    plan = CallPlan.of([call], False, addends[0].dropout, True)
    tensors = CallPlan.tensors([call])
    trains = torch.is_grad_enabled() and _any_requires_grad(addends)
    needs = trains or torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
    x = x.to(y.dtype)
    instead = again(x, addends[0].proven) if trains else None
    with no_autocast() if any_autocast() else contextlib.nullcontext():
        [output] = fused(x, plan, tensors, needs)
    if instead is not None:
        instead.stand_in(output.grad_fn, "tensors")
    return output


def _fits_beside(x: Tensor, y: Tensor, addends: Sequence[Addend]) -> bool:
    """True if y is the plain result of rows x, to which a plain product can be added."""
    plain = _is_plain(x, [AdaptedCall(x.detach(), None, addends)]) and type(y) in PLAIN
    return plain and y.is_floating_point() and y.shape[:-1] == x.shape[:-1] and x.numel() > 0


def _is_plain(x: Tensor, calls: Sequence[AdaptedCall]) -> bool:
    """True for plain tensors on one device, a frozen base, no gates, transform or tracer."""
    if torch.compiler.is_compiling() or type(x) not in PLAIN:
        return False
    if is_transforming() or is_tracing() or is_caching():
        return False
    if x.layout is not torch.strided or x.is_nested or not x.ndim:
        return False
    device = x.device
    for weight, bias, addends in calls:
        if weight.requires_grad or type(weight) not in PLAIN:
            return False
        if weight.device != device or 0 in weight.shape:
            return False
        if bias is not None and (bias.requires_grad or type(bias) not in PLAIN):
            return False
        for left, right, *_, gates in addends:
            if gates is not None or type(left) not in PLAIN or type(right) not in PLAIN:
                return False
            if left.device != device or right.device != device:
                return False
    return True


def _fastest(x: Tensor, calls: Sequence[AdaptedCall]) -> list[Tensor]:
    """The results, computed as takes the least time for these shapes."""
    addends = addends_of(calls)
    rates = {addend.dropout for addend in addends}
    masks = rates != {0.0} and len(addends) > 1  # more than one is needed
    if masks and len(rates) == 1:
        masks = not all([addend.shared for addend in addends])
    if len(calls) > 1:
        no_dx = not x.requires_grad and torch.is_grad_enabled() and _any_requires_grad(addends)
        if masks or no_dx:  # without dX, each may have a backward of its own
            return [linears(x, [call])[0] for call in calls]
    if masks:
        return by_operators(x, calls)
    merged = rates == {0.0} and merges(x, calls)
    trains = torch.is_grad_enabled() and _any_requires_grad(addends)
    instead = again(x, addends[0].proven) if trains else None  # of x, which dA is computed from
    if len(calls) == 1 and not merged and is_small(x, calls[0]):
        return [in_place(x, calls[0], instead)]
    plan, tensors = CallPlan.of(calls, merged, max(rates)), CallPlan.tensors(calls)
    differentiable = trains or torch.is_grad_enabled() and x.requires_grad
    outputs = fused(x, plan, tensors, differentiable)
    if instead is not None:
        instead.stand_in(outputs[0].grad_fn, "tensors")
    return outputs


def _any_requires_grad(addends: Sequence[Addend]) -> bool:
    return any([addend.requires_grad for addend in addends])


def is_small(x: Tensor, call: AdaptedCall) -> bool:
    """True if, by shapes, adding into the fresh output is faster, as exact, and saves no more."""
    out, width = call.weight.shape
    rows = x.numel() // width
    if rows * (out + width) >= SMALL_BELOW or x.dtype not in (torch.float32, torch.float64):
        return False
    if x.ndim > 2 and not x.is_contiguous():  # its rows would be a copy
        return False
    for left, right, _, _, _, dropout, *_ in call.addends:
        if dropout or left.dtype != x.dtype or right.dtype != x.dtype or left.shape[0] != out:
            return False
        if has_few_columns(rows, right.shape[0]):
            return False
    return True


def merges(x: Tensor, calls: Sequence[AdaptedCall], share: float = 1.0) -> bool:
    """True if, by shapes, forming W + s B A is faster, and as exact: not where products round
    float32 operands.

    It is from `share` of the usual number of rows on.
    """
    formed = beside = 0
    for weight, _, addends in calls:
        if addends:
            out, width = weight.shape
            formed, beside = formed + out * width, beside + out + width
    if not many_rows(x, formed, beside, share):
        return False
    for addend in addends_of(calls):
        if addend.left.dtype != x.dtype or addend.right.dtype != x.dtype:
            return False
    if x.dtype == torch.float64:
        return True
    return x.dtype == torch.float32 and full_precision(x.device.type)


def many_rows(x: Tensor, formed: int, beside: int, share: float = 1.0) -> bool:
    """True if x has the rows from which on W + s B A is formed: of in out elements, beside in + out
    for each row."""
    return x.numel() // x.shape[-1] * beside >= 2 * share * MERGE_FROM * formed


def full_precision(device: str) -> bool:
    """True if this kind of device multiplies float32 matrices as such, not as TF32 or bfloat16."""
    settings: dict[str, Any] = {"cpu": torch.backends.mkldnn, "cuda": torch.backends.cuda}
    return device in settings and settings[device].matmul.fp32_precision in ("none", "ieee")
