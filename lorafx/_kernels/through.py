"""A product x W^T + b that a layer computes in its own way, with the derivative dX = dY W."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .private import is_tracing, is_transforming, unsafe_view


def through(
    x: Tensor, product: Callable[[Tensor], Tensor], reader: Callable[[], Callable[[], Tensor]],
    derives: bool,
) -> Tensor:
    """Return product(x), computed as where no gradient is asked for, and differentiable in x.

    `reader`, called after the product, gives what reads W (out, in), in the dtype of its products:
    W is read for the backward pass, and not kept. Compilers, transforms and tracers see the
    product's own derivative, where it `derives`, else that of x W^T; a compiler's graph ends there.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return product(x)
    compiling = torch.compiler.is_compiling()
    if compiling and not derives:
        apart = torch.compiler.disable(  # type: ignore[no-untyped-call]
            _Through.apply, reason="a layer's product has no derivative of its own")
        return apart(x, product, reader)  # type: ignore[no-any-return]
    if compiling or is_transforming() or is_tracing():
        if derives:
            return product(x)
        y, z = product(x.detach()), F.linear(x, reader()().to(x.dtype))
        return y.detach() + (z - z.detach())
    return _Through.apply(x, product, reader)  # type: ignore[no-untyped-call, no-any-return]


class _Through(torch.autograd.Function):
    """(x, product, reader) -> y; only x has a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, product: Any, reader: Any) -> Tensor:
        y: Tensor = product(x.detach())
        ctx.read, ctx.dtype = reader(), x.dtype
        return unsafe_view(y, y.shape) if y._is_view() else y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        W: Tensor = ctx.read()
        return (gradient.to(W.dtype) @ W).to(ctx.dtype), None, None
