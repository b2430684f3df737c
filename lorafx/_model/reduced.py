"""Which gradients a DistributedDataParallel around a model reduces."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

from .._errors import UnsupportedModelError
from .._graph.loaded import loaded
from .._graph.modules import wrappers_of
from .record import holders


def check_reduced(model: nn.Module, adapters: Iterable[str]) -> None:
    """Raise if DDP wraps a model and would leave the gradients of these adapters as they are.

    It reduces those of the parameters that required one when it wrapped the model, and holds on to
    the nodes of autograd that accumulate them.
    """
    ddp = loaded("torch.nn.parallel.distributed", "DistributedDataParallel")
    for wrapper in wrappers_of(model):
        if ddp is None or not isinstance(wrapper, ddp):
            continue
        ignored = {parameter for name, parameter in wrapper.module.named_parameters()
                   if name in wrapper.parameters_to_ignore}
        for adapter in adapters:
            parameters: set[nn.Parameter] = set()
            for holder in holders(model):
                held = holder._modules.get(adapter)
                parameters.update(() if held is None else held.parameters())
            if not all(map(_has_held_node, parameters - ignored)):
                raise UnsupportedModelError(
                    f"DistributedDataParallel reduces no gradients of adapter {adapter!r}, which "
                    "was added, or frozen, when it wrapped the model: lorafx.activate it on "
                    "model.module, and wrap that again.")


def check_not_reduced(model: nn.Module, adapter: str) -> None:
    """Raise if DDP wraps a model: it would not reduce gradients of what replaces an active adapter.
    """
    ddp = loaded("torch.nn.parallel.distributed", "DistributedDataParallel")
    if ddp is not None and any(isinstance(wrapper, ddp) for wrapper in wrappers_of(model)):
        raise UnsupportedModelError(
            f"DistributedDataParallel reduces the gradients of adapter {adapter!r}, which is "
            "active, and would not reduce those of what takes its place: load that into "
            "model.module, and wrap it again.")


def _has_held_node(parameter: nn.Parameter) -> bool:
    """True if something holds the node that accumulates a parameter's gradient.

    Where nothing does, autograd makes another each time it is asked, without what was noted in it.
    """
    trains, note = parameter.requires_grad, object()
    with torch.inference_mode(False), torch.enable_grad():
        parameter.requires_grad_(True)
        node: Any = get_gradient_edge(parameter).node
        node.metadata["lorafx"] = note
        del node
        node = get_gradient_edge(parameter).node
        found = node.metadata.pop("lorafx", None)
        parameter.requires_grad_(trains)
    return found is note
