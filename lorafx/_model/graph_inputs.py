"""Inputs for a graph that knows their shapes, as exported and shape-propagated graphs do."""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import TensorMetadata

from .regions import is_plain_graph


def inputs_in_graph(model: nn.Module) -> list[Any] | None:
    """A value for each placeholder of a caller's GraphModule, or None if one's shape is not known.

    All are 0: what flows where in a graph depends on no value.
    """
    if not is_plain_graph(model):
        return None
    values: list[Any] = []
    for node in model.graph.find_nodes(op="placeholder"):
        if "val" in node.meta:
            known = node.meta["val"]  # of torch.export
            values.append(_zeros(known, known.device) if isinstance(known, Tensor) else known)
        elif isinstance(node.meta.get("tensor_meta"), TensorMetadata):
            values.append(_zeros(node.meta["tensor_meta"], None))  # of ShapeProp
        elif node.args:
            values.append(node.args[0])  # its default
        else:
            return None
    return values


def _zeros(known: Tensor | TensorMetadata, device: torch.device | None) -> Tensor:
    """A tensor of this shape and dtype."""
    return torch.zeros([*map(int, known.shape)], dtype=known.dtype, device=device)


def run_graph(model: fx.GraphModule, *values: Any) -> Any:
    """What a GraphModule computes of a value for each placeholder."""
    return fx.Interpreter(model).run(*values, enable_io_processing=False)
