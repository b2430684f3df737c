"""Why a weight is not a site, in words that finish the sentence "cannot be adapted: ..."."""

import inspect
import types
from collections.abc import Mapping, Sequence

from torch import nn

from .._adapter.config import FLOATS
from .places import Weight
from .regions import is_plain_graph, why_not_adapted
from .uses import LAYER, Usage


# Layers of torch that compute something else than x W^T with their weights.
UNSUPPORTED_LAYERS: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Conv1d, "a convolution"), (nn.Conv2d, "a convolution"), (nn.Conv3d, "a convolution"),
    (nn.ConvTranspose1d, "a convolution"), (nn.ConvTranspose2d, "a convolution"),
    (nn.ConvTranspose3d, "a convolution"),
    (nn.Embedding, "an embedding"), (nn.EmbeddingBag, "an embedding"),
    (nn.RNNBase, "a recurrent layer"), (nn.RNNCellBase, "a recurrent layer"),
    (nn.Bilinear, "a bilinear layer"),
)

# What a class may add to such a layer and still make no linear call.
_HARMLESS = {"__module__", "__qualname__", "__doc__", "__annotations__", "__init__", "__dict__",
             "__weakref__", "__static_attributes__", "__firstlineno__"}


def unsupported_layer(module: nn.Module) -> str | None:
    """The kind of a layer that lorafx does not adapt, as a reason; None for any other module."""
    for cls, kind in UNSUPPORTED_LAYERS:
        if isinstance(module, cls):
            return f"{kind} ({type(module).__name__}), which lorafx does not adapt yet"
    return None


def is_unsupported_torch_layer(module: nn.Module) -> bool:
    """True for such a layer with torch's own methods, which make no linear call.

    Another class may override what torch's forward calls, such as `_conv_forward`.
    """
    if unsupported_layer(module) is None:
        return False
    for cls in type(module).__mro__:
        torchs = cls.__module__.partition(".")[0] in ("torch", "builtins")
        if not torchs and not vars(cls).keys() <= _HARMLESS:
            return False
    return True


def why_packed(module: nn.Module) -> str | None:
    """Why a module has no weight that can be adapted, if a method stands in its place, or None."""
    if isinstance(inspect.getattr_static(type(module), "weight", None), types.FunctionType):
        return f"its weight is packed, as quantised layers have it ({type(module).__name__})"
    return None


def why_not_site(
    weight: Weight, usage: Usage, breaks: Mapping[str, str],
    paths: Mapping[nn.Module, Sequence[str]],
) -> str | None:
    """Why a weight is not a site, or None if it is one."""
    if not usage.linear:
        return _why_not_linear(weight, usage, breaks, paths)
    if any("[" in name for name in weight.places):
        return "its name holds '[', which is how blocks of rows are named"
    if weight.dtype not in FLOATS:
        return f"its weight has dtype {weight.dtype}"
    blocks = usage.equal_blocks
    if len(weight.shape) > (2 if blocks else 3) or blocks and weight.shape[0] % len(blocks):
        return f"its weight has the shape {tuple(weight.shape)}"
    owners = {use.place.module: None for use in usage.linear}
    in_graph_module = any(map(is_plain_graph, owners))
    if in_graph_module and (usage.other or not usage.calls):
        other = usage.other or "other than linear calls"
        return f"its weight is also read by {other} in a GraphModule"
    if usage.missed is not None:
        return usage.missed
    if usage.kind == LAYER and (usage.other or any(use.kind != LAYER for use in usage.linear)):
        return "its packed weight is also read outside of its layer, which no adapter reaches"
    if weight.no_derivative is not None:
        return weight.no_derivative
    for owner in owners:
        reason = None if is_plain_graph(owner) else why_not_adapted(owner)
        if reason is not None:
            return reason
    return None


def _why_not_linear(
    weight: Weight, usage: Usage, breaks: Mapping[str, str],
    paths: Mapping[nn.Module, Sequence[str]],
) -> str:
    for place in weight.places.values():
        layer = unsupported_layer(place.module)
        if layer is not None:
            return layer
    if usage.other:
        return f"read by {usage.other}, no linear call"
    owner = paths[next(iter(weight.places.values())).module][0]
    if owner in breaks:
        return ("no linear call on it was found, and its module is a graph break: "
                f"{breaks[owner]}")
    return "no traced call reads it"
