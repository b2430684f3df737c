"""The graph of a region: an `fx.Graph` that may read any attribute of a module, and that pickles flat."""

import dataclasses
import inspect
from typing import Any

from torch import fx, nn
from torch.fx.node import map_aggregate


class RegionGraph(fx.Graph):
    """A graph whose `get_attr` nodes may read any attribute of a module (None, a number), not only tensors."""

    def lint(self) -> None:
        owner, self.owning_module = self.owning_module, None
        try:
            super().lint()
            for node in self.nodes if owner is not None else ():
                if node.op in ("get_attr", "call_module"):
                    _check(owner, str(node.target))
        finally:
            self.owning_module = owner

    def __deepcopy__(self, memo: dict[Any, Any] | None = None) -> "RegionGraph":
        graph = RegionGraph()
        graph.output(graph.graph_copy(self, {} if memo is None else memo))
        return graph

    def __reduce__(self) -> tuple[Any, ...]:
        """A flat list of nodes that name their arguments: pickling the linked nodes themselves would recurse."""

        def named(argument: Any) -> Any:
            return NodeName(argument.name) if isinstance(argument, fx.Node) else argument

        nodes = [(node.op, node.target, map_aggregate((node.args, node.kwargs), named), node.name)
                 for node in self.nodes]
        return _from_nodes, (nodes,)


def _check(owner: Any, target: str) -> None:
    """Raise AttributeError unless a module has this attribute; a property, which might do something, is not read."""
    *path, name = target.split(".")
    for part in path:
        held = owner._modules.get(part) if isinstance(owner, nn.Module) else None
        owner = getattr(owner, part) if held is None else held
    if not isinstance(inspect.getattr_static(type(owner), name, None), property):
        getattr(owner, name)


@dataclasses.dataclass(frozen=True)
class NodeName:
    """A node's place among the arguments of another, in a pickle."""

    name: str


def _from_nodes(nodes: list[tuple[str, Any, Any, str]]) -> RegionGraph:
    graph = RegionGraph()
    made: dict[str, fx.Node] = {}

    def node_of(argument: Any) -> Any:
        return made[argument.name] if isinstance(argument, NodeName) else argument

    for op, target, arguments, name in nodes:
        args, kwargs = map_aggregate(arguments, node_of)
        made[name] = graph.create_node(op, target, args, kwargs, name)
    return graph
