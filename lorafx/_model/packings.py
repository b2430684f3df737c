"""How layers of other libraries store W packed: one table, a row a class of layers.

Nothing is imported for it: a class is looked up where its library is loaded.
"""

import copy
import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._graph.loaded import loaded

ReadsW = Callable[[], Tensor]


class Packing(NamedTuple):
    """How layers of one class, `name` in `module`, store W."""

    module: str
    name: str
    # the dtype in which a layer multiplies, None for that of its input
    dtype: Callable[[Any], torch.dtype | None]
    # what reads W, (out, in), as it is stored now, in a dtype; later calls may pack it otherwise
    reads: Callable[[Any, torch.dtype], ReadsW]
    # stores another W in a layer that nothing else uses
    pack: Callable[[Any, Tensor], None]
    # {id: its twin} of what a layer keeps of its packing, of which a copy of the layer has its own
    twins: Callable[[Any], dict[int, Any]]
    # whether the layer's product has a derivative for its input, as W is stored now
    derives: Callable[[Any], bool]
    bias: Callable[[Any], Tensor | None] = lambda layer: layer.bias

    def layers(self) -> Any:
        """The class, or None where its module is not loaded."""
        return loaded(self.module, self.name)


# bitsandbytes 4-bit: nf4 and fp4, with scales that may be quantised too.

def _dtype_4bit(layer: Any) -> torch.dtype | None:
    state = _state_4bit(layer)
    found: torch.dtype | None = layer.compute_dtype or (None if state is None else state.dtype)
    return found


def _state_4bit(layer: Any) -> Any:
    state = vars(layer._parameters["weight"]).get("quant_state")
    return layer.quant_state if state is None else state


def _reads_4bit(layer: Any, dtype: torch.dtype) -> ReadsW:
    data, state = layer._parameters["weight"].data, _state_4bit(layer)
    if state is None:  # it is packed when it is moved to its device
        return functools.partial(data.to, dtype)
    return functools.partial(_unpacked_4bit, data, copy.copy(state), dtype)


def _is_reordered(state: Any) -> bool:
    """True for the order in which CPUs with AVX512 multiply; then no derivative is known."""
    return bool(state is not None and vars(state).get("packing_format_for_cpu"))


def _unpacked_4bit(data: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    functional = sys.modules["bitsandbytes.functional"]
    state = copy.copy(state)
    if _is_reordered(state):
        state.original_nested = False  # its scales were unpacked, which needs no undoing
        data, state = functional._convert_weight_packed_for_cpu_inverse(data, state)
        state.absmax = state.absmax.T.reshape(-1).float()
    state.dtype = dtype
    unpacked: Tensor = functional.dequantize_4bit(data, state)
    return unpacked


def _pack_4bit(layer: Any, W: Tensor) -> None:
    old, state = layer._parameters["weight"], _state_4bit(layer)
    dtype = vars(state).get("original_dtype", state.dtype)
    new = type(old)(
        W.to(dtype), requires_grad=False, blocksize=old.blocksize,
        compress_statistics=old.compress_statistics, quant_type=old.quant_type,
        quant_storage=old.quant_storage, module=layer)
    layer._parameters["weight"] = new.to(W.device)


def _twins_4bit(layer: Any) -> dict[int, Any]:
    twins: dict[int, Any] = {}
    for state in (_state_4bit(layer), layer.quant_state):
        if state is not None and id(state) not in twins:
            twin = twins[id(state)] = copy.copy(state)
            if state.nested:
                twin.state2 = copy.copy(state.state2)
    return twins


# bitsandbytes 8-bit: rows of int8, each with a scale.

def _reads_8bit(layer: Any, dtype: torch.dtype) -> ReadsW:
    weight = layer._parameters["weight"]
    scales = layer.state.SCB if weight.SCB is None else weight.SCB
    data = layer.state.CB if weight.CB is None else weight.CB
    if data is None or scales is None or layer.state.has_fp16_weights:
        return functools.partial(weight.data.to, dtype)
    return functools.partial(_unpacked_8bit, data, scales, dtype)


def _unpacked_8bit(data: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return (data.float() * (scales.float() / 127)[:, None]).to(dtype)


def _pack_8bit(layer: Any, W: Tensor) -> None:
    old = layer._parameters["weight"]
    new = type(old)(W.half(), requires_grad=False, has_fp16_weights=old.has_fp16_weights)
    layer.state = copy.copy(layer.state)
    layer.state.CB = layer.state.SCB = None
    if not layer.state.has_fp16_weights:
        new = new._quantize(W.device)
    layer._parameters["weight"] = new


def _twins_8bit(layer: Any) -> dict[int, Any]:
    return {id(layer.state): copy.copy(layer.state)}


# torch.ao dynamic: int8 or float16, in an object of C++ that nobody writes into.

def _reads_dynamic(layer: Any, dtype: torch.dtype) -> ReadsW:
    return lambda: _plain(layer.weight()).to(dtype)


def _plain(W: Tensor) -> Tensor:
    return W.dequantize() if W.is_quantized else W


def _pack_dynamic(layer: Any, W: Tensor) -> None:
    old, bias = layer.weight(), layer.bias()
    if not old.is_quantized:
        new = W
    elif old.qscheme() == torch.per_tensor_affine:
        scale = max(float(W.abs().max()), torch.finfo(torch.float32).tiny) / 127.5
        new = torch.quantize_per_tensor(W, scale, 0, old.dtype)
    else:
        scales = W.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny).double() / 127.5
        zeros = torch.zeros_like(scales, dtype=torch.int64)
        new = torch.quantize_per_channel(W, scales, zeros, 0, old.dtype)
    layer._packed_params = copy.copy(layer._packed_params)
    layer.set_weight_bias(new, bias)


def _twins_dynamic(layer: Any) -> dict[int, Any]:
    held = layer._packed_params._packed_params
    return {id(held): held}


PACKINGS = (
    Packing("bitsandbytes.nn.modules", "Linear4bit",
            _dtype_4bit, _reads_4bit, _pack_4bit, _twins_4bit,
            lambda layer: not _is_reordered(_state_4bit(layer))),
    Packing("bitsandbytes.nn.modules", "Linear8bitLt",
            lambda layer: None, _reads_8bit, _pack_8bit, _twins_8bit, lambda layer: True),
    Packing("torch.ao.nn.quantized.dynamic.modules.linear", "Linear",
            lambda layer: torch.float32, _reads_dynamic, _pack_dynamic, _twins_dynamic,
            lambda layer: False, lambda layer: layer.bias()),
)


def packing_of(layer: nn.Module) -> Packing | None:
    """The row for a layer, or None."""
    for row in PACKINGS:
        cls = row.layers()
        if cls is not None and isinstance(layer, cls):
            return row
    return None
