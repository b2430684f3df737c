"""x R^T for compilers, which so keep no x that they can compute again element by element.

A compiler that has forward and backward in one graph chooses what to keep in between: it computes
again what is cheap, but keeps what a product of matrices in the backward pass begins with, such as
x for the gradient of R. Here that product begins with a copy of x that depends on a gradient, so
that it cannot be made earlier. What is kept for the copy is the compiler's choice again: most often
what it keeps anyway, a norm's input or the factors of x; never is a product computed again.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .private import is_transforming
from .tensors import PLAIN


def first_half(x: Tensor, right: Tensor, recompute: bool) -> Tensor:
    """Return x R^T, (..., rank), for R (rank, in) in x's dtype, or stacks of both, (K, ..., in).

    To `recompute` is to let a compiler choose whether x is kept for the gradient of R.
    """
    if not (recompute and torch.compiler.is_compiling() and _trains(x, right)):
        return _product(x, right)
    kind = x.device.type
    if not x.is_meta and x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, right = x.to(dtype), right.to(dtype)
    half: Tensor = HALF(x, right)
    return half


def _product(x: Tensor, right: Tensor) -> Tensor:
    return F.linear(x, right) if right.ndim == 2 else torch.bmm(x, right.mT)


def halves_apart(x: Tensor, right: Tensor, rates: Tensor, recompute: bool) -> Tensor:
    """Return x R^T, (..., rank), where K equal shares of R's rows meet an x, each with dropout.

    Each drops out elements of its own, at `rates` (K), below 1, of its own.
    """
    count, width = len(rates), x.shape[-1]
    each = rates.view(-1, *[1] * x.ndim)  # (K, 1, ..., 1)
    kept = torch.rand(count, *x.shape, device=x.device) >= each
    dropped = x * (kept / (1 - each)).to(x.dtype)  # (K, ..., in)
    if count == 1:
        return first_half(dropped[0], right, recompute)
    halves = first_half(
        dropped.reshape(count, -1, width), right.view(count, -1, width), recompute)
    return halves.transpose(0, 1).reshape(*x.shape[:-1], len(right))  # (..., rank)


def recomputed(x: Tensor, gradient: Tensor) -> Tensor:
    """Return a copy of x (..., in) that depends on a gradient (..., n): x, be that zero or not."""
    return torch.where(gradient[..., :1] != 0, x, x)


def _trains(x: Tensor, right: Tensor) -> bool:
    """True for plain tensors that have gradients, but not in a program that is exported."""
    if not (torch.is_grad_enabled() and x.requires_grad and right.requires_grad):
        return False
    if type(x) not in PLAIN or type(right) not in PLAIN:
        return False
    return not (is_transforming() or torch.compiler.is_exporting())


class _Half(torch.autograd.Function):
    """(x, R) -> x R^T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(x, right)
        return _product(x, right)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, right = ctx.saved_tensors
        rows, of_half = recomputed(x, gradient), gradient
        if right.ndim == 2:
            rows, of_half = _rows(rows), _rows(gradient)
        return gradient @ right, of_half.mT @ rows


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _half(x: Tensor, right: Tensor) -> Tensor:
    half: Tensor = _Half.apply(x, right)  # type: ignore[no-untyped-call]
    return half


def _operator() -> Any:
    """An operator is one node of what a compiler captures: passes find it, and caches know it.

    A process registers one, also if this file is imported several times.
    """
    try:
        return torch.ops.lorafx.half.default
    except AttributeError:
        torch.library.define("lorafx::half", "(Tensor x, Tensor right) -> Tensor")
        torch.library.impl("lorafx::half", "Autograd", _half)
        torch.library.impl("lorafx::half", "CompositeExplicitAutograd", _product)
        return torch.ops.lorafx.half.default


HALF = _operator()
