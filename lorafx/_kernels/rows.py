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
    that does not give the value, `guess` may: a function of a number, which no node tells, and the
    same. A value may be put in the memory of an operand that was computed for it (`out`), unless
    that is a view of something else (`arranges`).
    """

    function: Callable[..., Tensor]
    operands: tuple[Operand, ...]
    constants: tuple[str, ...] = ()
    guess: Callable[..., Tensor] | None = None
    out: bool = False
    arranges: bool = False


def _itself(value: Tensor) -> Tensor:
    return value


def _add(left: Tensor, right: Tensor, alpha: float, out: Tensor | None = None) -> Tensor:
    return torch.add(left, right, alpha=alpha, out=out)


def _sub(left: Tensor, right: Tensor, alpha: float, out: Tensor | None = None) -> Tensor:
    return torch.sub(left, right, alpha=alpha, out=out)


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


def _unpadded(value: Tensor, pad: tuple[int, ...]) -> Tensor:
    """The value, if its node pads by nothing; it does not tell with what."""
    if any(pad):
        raise NotImplementedError
    return value


def _dropped(value: Tensor, mask: Tensor, p: float) -> Tensor:
    """value * mask / (1 - p); its node does not tell if that was in training."""
    if p == 1 or mask.numel() * p < 64:  # else one in e^64 masks drops nothing in training
        raise NotImplementedError
    scaled = torch.ops.aten.native_dropout_backward(value, mask, 1 / (1 - p))  # the same product
    return torch.where(mask.all(), value, scaled)


def _layer_norm(
    value: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None,
    shape: tuple[int, ...],
) -> Tensor:
    """By the statistics, if they are not rounded, so that no eps is needed."""
    dtype, wide = value.dtype, rstd.dtype
    if wide.itemsize < 4:
        raise NotImplementedError
    if value.device.type == "cpu" and dtype.itemsize < wide.itemsize:  # its kernel's other order
        normed = torch.addcmul(-(mean * rstd), value.to(wide), rstd)
    else:
        normed = (value.to(wide) - mean).mul_(rstd)
    if weight is None:
        return (normed if bias is None else normed.add_(bias)).to(dtype)
    if bias is None:
        return normed.mul_(weight).to(dtype)
    return torch.addcmul(bias.to(wide), normed, weight.to(wide), out=normed).to(dtype)


def _layer_norm_of(
    eps: float, value: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None,
    bias: Tensor | None, shape: tuple[int, ...],
) -> Tensor:
    """By its eps, where the statistics are kept in half precision."""
    return F.layer_norm(value, shape, weight, bias, eps)


def _rms_norm(
    value: Tensor, rstd: Tensor, weight: Tensor | None, shape: tuple[int, ...]
) -> Tensor:
    normed = value.to(rstd.dtype) * rstd
    return (normed if weight is None else normed.mul_(weight)).to(value.dtype)


def _arranged(
    function: Callable[..., Tensor], operands: tuple[Operand, ...], constants: tuple[str, ...] = ()
) -> Row:
    return Row(function, operands, constants, arranges=True)


_FIRST, _SECOND = Operand(edge=0), Operand(edge=1)
_BOTH = Operand("self", 0), Operand("other", 1)  # each is kept if the other has a gradient
_INPUT, _RESULT, _OUTPUT = (Operand("self"),), (Operand("result"),), (Operand("output"),)
_STATISTICS = Operand("result1"), Operand("result2")

ROWS: dict[str, Row] = {
    # sums and products
    "AddBackward0": Row(_add, (_FIRST, _SECOND), ("alpha",), out=True),
    "SubBackward0": Row(_sub, (_FIRST, _SECOND), ("alpha",), out=True),
    "MulBackward0": Row(torch.mul, _BOTH, out=True),
    "DivBackward0": Row(torch.div, _BOTH, out=True),
    "NegBackward0": Row(torch.neg, (_FIRST,), out=True),
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
    "ReluBackward0": _arranged(_itself, _RESULT),
    "TanhBackward0": _arranged(_itself, _RESULT),
    "SigmoidBackward0": _arranged(_itself, _RESULT),
    "ExpBackward0": _arranged(_itself, _RESULT),
    "RsqrtBackward0": _arranged(_itself, _RESULT),
    "SqrtBackward0": _arranged(_itself, _RESULT),
    "SoftmaxBackward0": _arranged(_itself, _RESULT),
    "LogSoftmaxBackward0": _arranged(_itself, _RESULT),
    "ScaledDotProductFlashAttentionForCpuBackward0": _arranged(_itself, _OUTPUT),
    "ScaledDotProductFlashAttentionBackward0": _arranged(_itself, _OUTPUT),
    "ScaledDotProductEfficientAttentionBackward0": _arranged(_itself, _OUTPUT),
    "ScaledDotProductCudnnAttentionBackward0": _arranged(_itself, _OUTPUT),
    # norms, and dropout by its mask
    "NativeLayerNormBackward0": Row(
        _layer_norm, (Operand("input"), *_STATISTICS, Operand("weight"), Operand("bias")),
        ("normalized_shape",), _layer_norm_of),
    "FusedRmsNormBackward0": Row(
        _rms_norm, (Operand("input"), Operand("result1"), Operand("weight")),
        ("normalized_shape",)),
    "NativeDropoutBackward0": Row(_dropped, (_FIRST, Operand("result1")), ("p",)),
    # casts and other arrangements of the same elements
    "ToCopyBackward0": _arranged(Tensor.to, (_FIRST,), (".dtype",)),
    "CloneBackward0": _arranged(_itself, (_FIRST,)),
    "AliasBackward0": _arranged(_itself, (_FIRST,)),
    "ViewBackward0": _arranged(torch.reshape, (_FIRST,), (".shape",)),
    "UnsafeViewBackward0": _arranged(torch.reshape, (_FIRST,), (".shape",)),
    "ReshapeAliasBackward0": _arranged(torch.reshape, (_FIRST,), (".shape",)),
    "SqueezeBackward0": _arranged(torch.reshape, (_FIRST,), (".shape",)),
    "SqueezeBackward1": _arranged(torch.reshape, (_FIRST,), (".shape",)),
    "UnsqueezeBackward0": _arranged(torch.unsqueeze, (_FIRST,), ("dim",)),
    "ExpandBackward0": _arranged(Tensor.expand, (_FIRST,), (".shape",)),
    "TBackward0": _arranged(torch.t, (_FIRST,)),
    "TransposeBackward0": _arranged(torch.transpose, (_FIRST,), ("dim0", "dim1")),
    "PermuteBackward0": _arranged(torch.permute, (_FIRST,), ("dims",)),
    "SliceBackward0": _arranged(_slice, (_FIRST,), ("dim", "start", "end", "step")),
    "SelectBackward0": _arranged(torch.select, (_FIRST,), ("dim", "index")),
    "SplitBackward0": _arranged(_part, (_FIRST,), ("split_size", "dim", ".output")),
    "SplitWithSizesBackward0": _arranged(_part, (_FIRST,), ("split_sizes", "dim", ".output")),
    "RollBackward0": Row(torch.roll, (_FIRST,), ("shifts", "dims")),
    "ConstantPadNdBackward0": _arranged(_unpadded, (_FIRST,), ("pad",)),
    "UnbindBackward0": _arranged(_item, (_FIRST,), ("dim", ".output")),
}
