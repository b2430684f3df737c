"""How a value is computed again, without a product of matrices, from what autograd keeps anyway.

The node of autograd that made a value keeps tensors for its own backward pass: silu keeps its
input, softmax its result, a product both factors. So the value of a node is a cheap function of
what the node keeps and of the values of the nodes before it. `ROWS` has that function, a row a
node; from x upwards rows make a tree whose leaves are tensors that are kept. All of them are
deterministic, element by element or mere views, so that they give the same bits.

Not in the table: what would take a product of matrices or a sum over many elements (also this
library's own linear calls), and what keeps less than its value is made of (group_norm does not
keep its bias, a sum no constant).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Operand(NamedTuple):
    """A tensor that a node computed with: `kept` under a name, or else what its `edge` gives.

    One that is kept for certain and has no edge may be None, such as a norm's bias.
    """

    kept: str | None = None
    edge: int | None = None


class Row(NamedTuple):
    """The value of a node: function(*operands, *constants).

    Constants are attributes of the node, or `.shape`, `.dtype` and `.output` of the value. Where
    the node does not tell which function it was, `guesses` are what it may have been.
    """

    function: Callable[..., Tensor]
    operands: tuple[Operand, ...]
    constants: tuple[str, ...] = ()
    guesses: tuple[Callable[..., Tensor], ...] = ()


def _itself(value: Tensor) -> Tensor:
    return value


def _add(left: Tensor, right: Tensor, alpha: float) -> Tensor:
    return torch.add(left, right, alpha=alpha)


def _sub(left: Tensor, right: Tensor, alpha: float) -> Tensor:
    return torch.sub(left, right, alpha=alpha)


def _gelu(value: Tensor, approximate: str) -> Tensor:
    return F.gelu(value, approximate=approximate)


def _elu(value: Tensor, alpha: float, scale: float, input_scale: float) -> Tensor:
    return torch.ops.aten.elu(value, alpha, scale, input_scale)  # type: ignore[no-any-return]


def _slice(value: Tensor, dim: int, start: int, end: int, step: int) -> Tensor:
    return torch.ops.aten.slice(value, dim, start, end, step)  # type: ignore[no-any-return]


def _part(value: Tensor, sizes: Any, dim: int, output: int) -> Tensor:
    return torch.split(value, sizes, dim)[output]


def _item(value: Tensor, dim: int, output: int) -> Tensor:
    return value.select(dim, output)


def _dropped(value: Tensor, mask: Tensor, p: float) -> Tensor:
    scale = 0.0 if p == 1 else 1 / (1 - p)
    return torch.ops.aten.native_dropout_backward(  # type: ignore[no-any-return]
        value, mask, scale)  # the same product, value * mask * scale


def _layer_norm(
    value: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None,
    shape: tuple[int, ...],
) -> Tensor:
    """By the statistics, so that no eps is needed; bit for bit if they are not rounded."""
    dtype, wide = value.dtype, rstd.dtype
    if value.device.type == "cpu" and dtype.itemsize < wide.itemsize:  # its kernel's other order
        normed = torch.addcmul(-(mean * rstd), value.to(wide), rstd)
    else:
        normed = (value.to(wide) - mean).mul_(rstd)
    if weight is None:
        return (normed if bias is None else normed.add_(bias)).to(dtype)
    if bias is None:
        return normed.mul_(weight).to(dtype)
    return torch.addcmul(bias.to(wide), normed, weight.to(wide)).to(dtype)


def _layer_norm_of(
    eps: float, value: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None,
    bias: Tensor | None, shape: tuple[int, ...],
) -> Tensor:
    return F.layer_norm(value, shape, weight, bias, eps)


# where mean and rstd are kept in half precision
_EPS = tuple([functools.partial(_layer_norm_of, 10.0 ** -power) for power in range(3, 13)])


def _rms_norm(
    value: Tensor, rstd: Tensor, weight: Tensor | None, shape: tuple[int, ...]
) -> Tensor:
    normed = value.to(rstd.dtype) * rstd
    return (normed if weight is None else normed.mul_(weight)).to(value.dtype)


_FIRST, _SECOND = Operand(edge=0), Operand(edge=1)
_BOTH = Operand("self", 0), Operand("other", 1)  # each is kept if the other has a gradient
_INPUT, _RESULT, _OUTPUT = (Operand("self"),), (Operand("result"),), (Operand("output"),)
_STATISTICS = Operand("result1"), Operand("result2")

ROWS: dict[str, Row] = {
    # sums and products
    "AddBackward0": Row(_add, (_FIRST, _SECOND), ("alpha",)),
    "SubBackward0": Row(_sub, (_FIRST, _SECOND), ("alpha",)),
    "MulBackward0": Row(torch.mul, _BOTH),
    "DivBackward0": Row(torch.div, _BOTH),
    "NegBackward0": Row(torch.neg, (_FIRST,)),
    # functions that keep their input
    "SiluBackward0": Row(F.silu, _INPUT),
    "GeluBackward0": Row(_gelu, _INPUT, ("approximate",)),
    "PowBackward0": Row(torch.pow, _INPUT, ("exponent",)),
    "LogBackward0": Row(torch.log, _INPUT),
    "AbsBackward0": Row(torch.abs, _INPUT),
    "EluBackward0": Row(_elu, _INPUT, ("alpha", "scale", "input_scale")),
    "LeakyReluBackward0": Row(F.leaky_relu, _INPUT, ("negative_slope",)),
    "HardswishBackward0": Row(F.hardswish, _INPUT),
    "HardtanhBackward0": Row(F.hardtanh, _INPUT, ("min_val", "max_val")),
    "MishBackward0": Row(F.mish, _INPUT),
    "SoftplusBackward0": Row(F.softplus, _INPUT, ("beta", "threshold")),
    "GluBackward0": Row(F.glu, _INPUT, ("dim",)),
    # functions that keep their result
    "ReluBackward0": Row(_itself, _RESULT),
    "TanhBackward0": Row(_itself, _RESULT),
    "SigmoidBackward0": Row(_itself, _RESULT),
    "ExpBackward0": Row(_itself, _RESULT),
    "RsqrtBackward0": Row(_itself, _RESULT),
    "SqrtBackward0": Row(_itself, _RESULT),
    "SoftmaxBackward0": Row(_itself, _RESULT),
    "LogSoftmaxBackward0": Row(_itself, _RESULT),
    "ScaledDotProductFlashAttentionForCpuBackward0": Row(_itself, _OUTPUT),
    "ScaledDotProductFlashAttentionBackward0": Row(_itself, _OUTPUT),
    "ScaledDotProductEfficientAttentionBackward0": Row(_itself, _OUTPUT),
    "ScaledDotProductCudnnAttentionBackward0": Row(_itself, _OUTPUT),
    # norms, and dropout by its mask
    "NativeLayerNormBackward0": Row(
        _layer_norm, (Operand("input"), *_STATISTICS, Operand("weight"), Operand("bias")),
        ("normalized_shape",), _EPS),
    "FusedRmsNormBackward0": Row(
        _rms_norm, (Operand("input"), Operand("result1"), Operand("weight")),
        ("normalized_shape",)),
    "NativeDropoutBackward0": Row(_dropped, (_FIRST, Operand("result1")), ("p",)),
    # casts and other arrangements of the same elements
    "ToCopyBackward0": Row(Tensor.to, (_FIRST,), (".dtype",)),
    "CloneBackward0": Row(_itself, (_FIRST,)),
    "AliasBackward0": Row(_itself, (_FIRST,)),
    "ViewBackward0": Row(torch.reshape, (_FIRST,), (".shape",)),
    "UnsafeViewBackward0": Row(torch.reshape, (_FIRST,), (".shape",)),
    "ReshapeAliasBackward0": Row(torch.reshape, (_FIRST,), (".shape",)),
    "SqueezeBackward0": Row(torch.reshape, (_FIRST,), (".shape",)),
    "SqueezeBackward1": Row(torch.reshape, (_FIRST,), (".shape",)),
    "UnsqueezeBackward0": Row(torch.unsqueeze, (_FIRST,), ("dim",)),
    "ExpandBackward0": Row(Tensor.expand, (_FIRST,), (".shape",)),
    "TBackward0": Row(torch.t, (_FIRST,)),
    "TransposeBackward0": Row(torch.transpose, (_FIRST,), ("dim0", "dim1")),
    "PermuteBackward0": Row(torch.permute, (_FIRST,), ("dims",)),
    "SliceBackward0": Row(_slice, (_FIRST,), ("dim", "start", "end", "step")),
    "SelectBackward0": Row(torch.select, (_FIRST,), ("dim", "index")),
    "SplitBackward0": Row(_part, (_FIRST,), ("split_size", "dim", ".output")),
    "SplitWithSizesBackward0": Row(_part, (_FIRST,), ("split_sizes", "dim", ".output")),
    "UnbindBackward0": Row(_item, (_FIRST,), ("dim", ".output")),
}
