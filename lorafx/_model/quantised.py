"""Layers that store W packed and compute x W^T + b by themselves: which they are, and their W.

A layer that the table of `packings` does not name is recognised by what it declares, `in_features`,
`out_features` and no dense matrix, if its forward is shown to be a linear call.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .._adapter.config import FLOATS
from .._errors import UnsupportedModelError
from .._graph.modules import LorafxModule
from .packings import packing_of


class PackedLayer(nn.Module):
    """The mark of classes derived for a layer that computes x W^T + b by itself."""


def declares_packed(module: nn.Module) -> bool:
    """True for a layer that declares its features and has no dense matrix, but packed numbers.

    They are a bit or more for each element of W.
    """
    width, out = vars(module).get("in_features"), vars(module).get("out_features")
    if not (isinstance(width, int) and isinstance(out, int)):
        return False
    if not all(isinstance(child, LorafxModule) for child in module.children()):
        return False
    if type(module).forward is nn.Module.forward:
        return False
    tensors = [t for t in tensors_of(module) if t is not None]
    dense = [t for t in tensors if t.dtype in FLOATS and t.numel() >= width * out]
    bits = [8 * t.numel() * t.element_size() for t in tensors if t.dtype not in FLOATS]
    return not dense and max(bits, default=0) >= width * out > 0


def tensors_of(layer: nn.Module) -> list[Any]:
    """The Parameters and buffers of a module itself; some are None."""
    return [*layer._parameters.values(), *layer._buffers.values()]


def is_packed(module: nn.Module) -> bool:
    """True for a layer that stores W packed and could be a site; `why_not_linear` tells."""
    known = isinstance(module, PackedLayer) or packing_of(module) is not None
    return known or declares_packed(module)


def why_not_linear(layer: Any) -> str | None:
    """Why what a packed layer computes is not shown to be x W^T + b, or None.

    A layer that no row names is called with a few rows.
    """
    if isinstance(layer, PackedLayer):
        return None
    row = packing_of(layer)
    if row is not None:
        own = type(layer).forward is row.layers().forward
        return None if own else f"its class has a forward that is not that of a {row.name}"
    kind, state = type(layer).__name__, torch.get_rng_state()
    try:
        return _why_not_affine(layer)
    except Exception as error:
        return f"its weight is packed, and calling it to see what it computes failed ({kind}: " \
               f"{error})"
    finally:
        torch.set_rng_state(state)


def _why_not_affine(layer: Any) -> str | None:
    example, kind = stand_in(layer), type(layer).__name__
    if example.is_meta:
        return f"its weight is packed and has no values yet ({kind})"
    dtype, generator = example.dtype, torch.Generator().manual_seed(0)
    points = torch.randn(2, layer.in_features, generator=generator)
    zero, third = torch.zeros_like(points[:1]), 3 * points[:1] - points[1:]
    points = torch.cat([points, zero, third])
    x = points.to(example.device, dtype).requires_grad_()
    with torch.enable_grad():
        y = layer(x)
    if not isinstance(y, Tensor) or y.shape != (4, layer.out_features):
        return f"its weight is packed, and its output is no x W^T + b ({kind})"
    with torch.no_grad():
        first, second, bias, third = y.double()
        error = (3 * (first - bias) - (second - bias) - (third - bias)).abs().max()
        error = torch.maximum(error, (layer(x[:1]).double() - first).abs().max())
        size = y.double().abs().max() + torch.finfo(dtype).tiny
    if not error <= 64 * torch.finfo(dtype).eps * size:  # nor if it is not a number
        return f"its weight is packed, and its output is not affine in its input ({kind})"
    gradient = y.requires_grad and torch.autograd.grad(y.sum(), x, allow_unused=True)[0]
    if gradient is False or gradient is None:
        return f"its weight is packed, and its output has no gradient for its input ({kind})"
    return None


def stand_in(layer: Any) -> Tensor:
    """A tensor of W's shape, device and the dtype that W multiplies in, without its values."""
    row, tensors = packing_of(layer), [t for t in tensors_of(layer) if t is not None]
    dtype = None if row is None else row.dtype(layer)
    if dtype is None:
        floats = [t.dtype for t in tensors if t.dtype in FLOATS]
        dtype = floats[0] if floats and row is None else torch.float32
    device = tensors[0].device if tensors else torch.device("cpu")
    one = torch.zeros((), dtype=dtype, device=device)
    return one.expand(layer.out_features, layer.in_features)


def weight_and_bias(layer: Any) -> tuple[Tensor, Tensor | None]:
    """W (out, in), in float32 or wider, and b (out), if there is one, of a packed layer."""
    row = packing_of(layer)
    if row is not None:
        return row.reads(layer, torch.float32)(), row.bias(layer)
    like = stand_in(layer)
    wide = torch.promote_types(like.dtype, torch.float32)
    zero = torch.zeros(1, layer.in_features, dtype=like.dtype, device=like.device)
    bare, rows = _without_bias(layer), list[Tensor]()
    with torch.no_grad():
        bias, left = layer(zero)[0], bare(zero).to(wide)  # what is left is in no attribute
        for start in range(0, layer.in_features, 512):
            length = min(512, layer.in_features - start)
            eye = torch.zeros(length, layer.in_features, dtype=like.dtype, device=like.device)
            eye[:, start:].fill_diagonal_(1)
            rows.append(bare(eye).to(wide) - left)
    return torch.cat(rows).t().contiguous(), bias if bias.any() else None


def _without_bias(layer: Any) -> Any:
    """A copy of a layer on the same tensors, but for a bias of zeros: sums with b would round W."""
    twin = copy.copy(layer)
    for name in ("_parameters", "_buffers"):
        table = twin.__dict__[name] = dict(twin.__dict__[name])
        if table.get("bias") is not None:
            table["bias"] = torch.zeros_like(table["bias"])
    return twin


def packed_again(layer: Any, path: str, W: Tensor) -> nn.Module:
    """A copy of a layer that stores another W, (out, in), in the layer's own way."""
    row = packing_of(layer)
    if row is None:
        raise UnsupportedModelError(
            f"'{path}' is a {type(layer).__name__}, of which lorafx does not know how it packs a "
            "weight: merge without requantize=True, which gives a plain layer.")
    twin = copy.copy(layer)
    twin.__dict__["_parameters"] = dict(layer._parameters)
    twin.__dict__["_buffers"] = dict(layer._buffers)
    row.pack(twin, W)
    return twin  # type: ignore[no-any-return]


def twins_of_records(module: nn.Module) -> dict[int, Any]:
    """{id: its twin} of what a layer keeps of its packing, for a copy of the layer to have."""
    row = packing_of(module)
    return {} if row is None else row.twins(module)
