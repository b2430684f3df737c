"""Linear calls with branches, and what they must compute: x (W + sum s B A)^T + b."""

import torch
import torch.nn.functional as F

from lorafx._kernels import linears as kernels
from lorafx._kernels.addend import Addend
from lorafx._kernels.calls import AdaptedCall
from lorafx._kernels.linears import linears


def normal(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def calls_of(width, outs, dtype=torch.float64, bias=True, rank=2):
    """A call for each of `outs`: the second has a block adapted too, the last nothing."""
    calls = []
    for position, out in enumerate(outs):
        addends = [
            Addend(
                normal(out, rank + position, dtype=dtype),
                normal(rank + position, width, dtype=dtype), 0.7
            )
        ]
        if position == 1:
            addends.append(
                Addend(
                    normal(out - 3, 1, dtype=dtype), normal(1, width, dtype=dtype), -1.3, start=2
                )
            )
        weight = torch.randn(out, width, dtype=dtype)
        b = torch.randn(out, dtype=dtype) if bias and position != 1 else None
        given = addends if position < 2 or position < len(outs) - 1 else []
        calls.append(AdaptedCall(weight, b, given))
    return calls


def factors(calls):
    return [factor for call in calls for addend in call.addends for factor in addend[:2]]


def expected(x, calls):
    """By the definition: W and the addends as one matrix."""
    outputs = []
    for weight, bias, addends in calls:
        for B, A, scale, _, start, *_ in addends:
            weight = weight + F.pad(scale * B @ A, (0, 0, start, weight.shape[0] - start - len(B)))
        outputs.append(x @ weight.mT + (0 if bias is None else bias))
    return outputs


def check(x, calls, used=None):
    """Outputs and gradients; `used` are the outputs that a loss sees."""
    inputs = [x, *factors(calls)]
    got, wanted = linears(x, calls), expected(x, calls)
    in_place = len(calls) == 1 and kernels.is_small(x, calls[0]) and not kernels.merges(x, calls)
    assert all(
        (type(y.grad_fn).__name__ == "_LinearsBackward") != in_place for y in got if y.requires_grad
    )
    assert not any(y._is_view() for y in got)
    for y, target in zip(got, wanted):
        torch.testing.assert_close(y, target, rtol=1e-10, atol=1e-10)
    chosen = range(len(calls)) if used is None else used
    ours, theirs = (
        torch.autograd.grad(sum(ys[k].sin().sum() for k in chosen), inputs, allow_unused=True)
        for ys in (got, wanted)
    )
    for mine, target, tensor in zip(ours, theirs, inputs):
        assert (mine is None) == (target is None)
        if mine is not None:
            torch.testing.assert_close(mine, target, rtol=1e-10, atol=1e-10)
            assert mine.shape == tensor.shape and mine.dtype == tensor.dtype
