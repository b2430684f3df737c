"""Weights that are tensors of a class of their own which stores W quantised: one table.

A linear call multiplies with such a weight by torch's dispatch, and so it stays as it is; here is
what reads the W that it stands for, and what stores another in the same way.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._errors import UnsupportedModelError
from .._kernels.tensors import PLAIN


class TensorPacking(NamedTuple):
    """How tensors of one class, `name` in `module`, store W."""

    module: str
    name: str
    reads: Callable[[Any], Tensor]
    packs: Callable[[Any, Tensor], Tensor] | None = None  # (a tensor, another W)


def _dequantized(weight: Any) -> Tensor:
    W: Tensor = weight.dequantize()
    return W


def _int8(weight: Any, W: Tensor) -> Tensor:
    kept = {name: getattr(weight, name) for name in ("act_quant_kwargs", "act_quant_scale",
                                                     "act_quant_zero_point", "act_pre_scale")}
    made: Tensor = type(weight).from_hp(W, _blocks(weight.block_size), **kept)
    return made


def _float8(weight: Any, W: Tensor) -> Tensor:
    return type(weight).from_hp(  # type: ignore[no-any-return]
        W, weight.qdata.dtype, _blocks(weight.block_size), weight.mm_config,
        kernel_preference=weight.kernel_preference, act_quant_kwargs=weight.act_quant_kwargs)


def _intx(weight: Any, W: Tensor) -> Tensor:
    return type(weight).from_hp(  # type: ignore[no-any-return]
        W, weight.block_size, weight.target_dtype,
        activation_quantization=weight.activation_quantization)


def _nf4(weight: Any, W: Tensor) -> Tensor:
    return type(weight).from_tensor(  # type: ignore[no-any-return]
        W, weight.block_size, weight.scaler_block_size)


def _blocks(block_size: Any) -> Any:
    return sys.modules["torchao.quantization.granularity"].PerBlock(tuple(block_size))


_WORKFLOWS = "torchao.quantization.quantize_.workflows"
TENSOR_PACKINGS = (
    TensorPacking(f"{_WORKFLOWS}.nf4.nf4_tensor", "NF4Tensor",
                  lambda weight: weight.get_original_weight(), _nf4),
    TensorPacking(f"{_WORKFLOWS}.int8.int8_tensor", "Int8Tensor", _dequantized, _int8),
    TensorPacking(f"{_WORKFLOWS}.float8.float8_tensor", "Float8Tensor", _dequantized, _float8),
    TensorPacking(f"{_WORKFLOWS}.intx.intx_unpacked_to_int8_tensor", "IntxUnpackedToInt8Tensor",
                  _dequantized, _intx),
    TensorPacking("torchao.utils", "TorchAOBaseTensor", _dequantized),
)


def tensor_packing_of(weight: Any) -> TensorPacking | None:
    """The row for a weight, or None for a dense one."""
    if type(weight) in PLAIN:  # of which compiled programs need not ask what has been imported
        return None
    for row in TENSOR_PACKINGS:
        cls = getattr(sys.modules.get(row.module), row.name, None)
        if cls is not None and isinstance(weight, cls):
            return row
    return None


def dense(weight: Tensor) -> Tensor:
    """W as a plain tensor, in the dtype of its products; a weight that is dense is itself."""
    row = tensor_packing_of(weight)
    return weight if row is None else row.reads(weight.detach())


def quantised_again(weight: Tensor, path: str, W: Tensor) -> Tensor:
    """A tensor that stores another W in this one's own way."""
    row = tensor_packing_of(weight)
    if row is None or row.packs is None:
        raise UnsupportedModelError(
            f"The weight of '{path}' is a {type(weight).__name__}, of which lorafx does not know "
            "how to quantise again: merge without requantize=True, which gives a plain weight.")
    return row.packs(weight, W.to(weight.dtype))


def why_no_derivative(weight: Tensor) -> str | None:
    """Why no gradient can pass a product with this weight, or None; asked of a row of zeros."""
    if tensor_packing_of(weight) is None or weight.is_meta:
        return None
    kind = f"a {type(weight).__name__}"
    x = torch.zeros(1, weight.shape[-1], dtype=weight.dtype, device=weight.device)
    try:
        with torch.enable_grad():
            y = F.linear(x.requires_grad_(), weight.detach())
        passes = y.requires_grad and torch.autograd.grad(y.sum(), x, allow_unused=True)[0]
    except Exception as error:
        return f"its weight is {kind}, with which a product failed ({error})"
    if passes is False or passes is None:
        return f"its weight is {kind} that quantises its input too, through which no gradient goes"
    return None
