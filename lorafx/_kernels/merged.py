"""y_k = x (W_k + B_k A_k)^T + b_k for compilers: neither sums nor their gradients are kept."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .compiled import recomputed


def merged_linears(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None],
    factors: list[tuple[Tensor, Tensor]], recompute: bool,
) -> tuple[Tensor, ...]:
    """Return [x (W + B A)^T + b for each], (..., out), of x (..., in) and (A, B), s within B.

    To `recompute` is not to keep an x that the compiler can compute again.
    """
    flat = [tensor for pair in factors for tensor in pair]
    outputs: tuple[Tensor, ...] = _MergedLinears.apply(  # type: ignore[no-untyped-call]
        x, len(weights), recompute, *weights, *biases, *flat)
    return outputs


class _MergedLinears(torch.autograd.Function):
    """(x, count, recompute, W, ..., b, ..., A, B, ...) -> y, ..., differentiable in x, A and B."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, count: int, recompute: bool, *tensors: Any
    ) -> tuple[Tensor, ...]:
        weights, biases = tensors[:count], tensors[count:2 * count]
        A, B = tensors[2 * count::2], tensors[2 * count + 1::2]
        ctx.count, ctx.recompute = count, recompute
        ctx.save_for_backward(x, *weights, *A, *B)
        return tuple(F.linear(x, torch.addmm(W, b, a), bias)
                     for W, bias, a, b in zip(weights, biases, A, B))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        count = ctx.count
        weights, A, B = tensors[:count], tensors[count:2 * count], tensors[2 * count:]
        ranks = [len(a) for a in A]
        rows = recomputed(x, gradients[0]) if ctx.recompute else x
        rows = rows.reshape(-1, x.shape[-1])
        dYs = [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]
        h = (rows @ torch.cat(A).t()).split_with_sizes(ranks, dim=1)
        G = torch.cat([dY @ b for dY, b in zip(dYs, B)], dim=1)
        dA = (rows.t() @ G).t().split_with_sizes(ranks)
        dB = [dY.t() @ part for dY, part in zip(dYs, h)]
        # the transposed sum, which no compiler takes for that of the forward pass and keeps
        dX = [dY @ torch.addmm(W.t(), a.t(), b.t()).t() for dY, W, a, b in zip(dYs, weights, A, B)]
        pairs = [gradient for pair in zip(dA, dB) for gradient in pair]
        return sum(dX[1:], dX[0]).view(x.shape), None, None, *[None] * (2 * count), *pairs
