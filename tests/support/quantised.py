"""Layers whose weight is stored packed, in each way that lorafx knows, and their dense W."""

from collections.abc import Callable
from typing import Any, NamedTuple

import bitsandbytes
import torch
import torch.ao.nn.quantized.dynamic as dynamic
import torchao.quantization as torchao
from torch import Tensor, nn
from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

WIDTH, HIDDEN = 64, 256


class Format(NamedTuple):
    """`make` gives a layer of these in and out features, `dense` its W (out, in)."""

    make: Callable[[int, int], nn.Module]
    dense: Callable[[Any], Tensor]
    exact: bool = True  # it multiplies x with W, and not a rounded x
    dtype: torch.dtype = torch.float32  # of x


def _four_bits(kind: str, nested: bool, dtype: torch.dtype = torch.float32) -> Format:
    def make(width: int, out: int) -> nn.Module:
        return bitsandbytes.nn.Linear4bit(
            width, out, compute_dtype=dtype, quant_type=kind, compress_statistics=nested).to("cpu")

    def dense(layer: Any) -> Tensor:
        return bitsandbytes.functional.dequantize_4bit(
            layer.weight.data, layer.weight.quant_state)

    return Format(make, dense, dtype == torch.float32, dtype)


def _eight_bits(width: int, out: int) -> nn.Module:
    return bitsandbytes.nn.Linear8bitLt(width, out, has_fp16_weights=False).to("cpu")


def _eight_dense(layer: Any) -> Tensor:
    scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
    return layer.weight.data.double() * scales.double()[:, None] / 127


def _torchao(config: Any) -> Format:
    def make(width: int, out: int) -> nn.Module:
        net = nn.Sequential(nn.Linear(width, out))
        torchao.quantize_(net, config)
        return net[0]

    return Format(make, lambda layer: layer.weight.dequantize())


def _nf4_tensor(width: int, out: int) -> nn.Module:
    layer = nn.Linear(width, out)
    layer.weight = nn.Parameter(to_nf4(layer.weight.detach()), requires_grad=False)
    return layer


def _dynamic(width: int, out: int) -> nn.Module:
    layer = dynamic.Linear(width, out)
    W, scale = torch.randn(out, width) / width ** 0.5, 0.05
    layer.set_weight_bias(torch.quantize_per_tensor(W, scale, 0, torch.qint8), torch.randn(out))
    return layer


class Grouped(nn.Module):
    """Our own layer of GPTQ's kind: eight 4-bit numbers to an int32, along `in`."""

    along_in = True

    def __init__(self, width: int, out: int, group: int = 16) -> None:
        super().__init__()
        self.in_features, self.out_features = width, out
        packed = (width // 8, out) if self.along_in else (width, out // 8)
        self.register_buffer("qweight", _integers(*packed))
        self.register_buffer("qzeros", _integers(width // group, out // 8))
        self.register_buffer("scales", torch.rand(width // group, out) / width)
        self.register_buffer("groups", torch.arange(width) // group)
        self.register_buffer("bias", torch.randn(out))

    def dense(self) -> Tensor:
        """W^T, (in, out)."""
        shifts = torch.arange(0, 32, 4)
        zeros = (self.qzeros[:, :, None] >> shifts & 15).flatten(1)
        if self.along_in:
            levels = (self.qweight[:, None, :] >> shifts[:, None] & 15).flatten(0, 1)
        else:
            levels = (self.qweight[:, :, None] >> shifts & 15).flatten(1)
        return self.scales[self.groups] * (levels - zeros[self.groups])

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + b."""
        return x @ self.dense() + self.bias


class Interleaved(Grouped):
    """Our own layer of AWQ's kind: eight 4-bit numbers to an int32, along `out`."""

    along_in = False


def _integers(*shape: int) -> Tensor:
    return torch.randint(-2 ** 31, 2 ** 31 - 1, shape, dtype=torch.int32)


FORMATS = {
    "nf4": _four_bits("nf4", True),
    "fp4": _four_bits("fp4", False),
    "nf4 in bfloat16": _four_bits("nf4", True, torch.bfloat16),
    "int8": Format(_eight_bits, _eight_dense),
    "torchao int8": _torchao(torchao.Int8WeightOnlyConfig()),
    "torchao int4": _torchao(torchao.IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=torchao.PerGroup(32))),
    "torchao float8": _torchao(torchao.Float8WeightOnlyConfig()),
    "torchao nf4": Format(_nf4_tensor, lambda layer: layer.weight.get_original_weight()),
    "dynamic": Format(_dynamic, lambda layer: layer.weight().dequantize(), exact=False),
    "gptq": Format(Grouped, lambda layer: layer.dense().t()),
    "awq": Format(Interleaved, lambda layer: layer.dense().t()),
}
# torchao's tensors refuse it, and torch.ao's warn
NO_PICKLE = {"torchao int8", "torchao int4", "torchao float8", "dynamic"}


def network(name: str) -> nn.Module:
    """Two layers of one format, and what they multiply with; not trainable, in train mode."""
    make = FORMATS[name].make
    return nn.Sequential(make(WIDTH, HIDDEN), nn.Tanh(), make(HIDDEN, WIDTH)).requires_grad_(False)
