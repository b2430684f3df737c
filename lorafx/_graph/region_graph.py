"""The graph of a region: an `fx.Graph` that reads any attribute of a module, and pickles flat."""

import dataclasses
import inspect
from typing import Any

from torch import fx, nn
from torch.fx.node import map_aggregate


class RegionGraph(fx.Graph):
    """A graph whose `get_attr` nodes may read any attribute: None, a number, a tensor."""

    def lint(self) -> None:
        owner, self.owning_module = self.owning_module, None
        try:
            super().lint()
            for node in self.nodes:
                if owner is not None and node.op in ("get_attr", "call_module"):
                    _check(owner, str(node.target))
        finally:
            self.owning_module = owner

    def __deepcopy__(self, memo: dict[Any, Any] | None = None) -> "RegionGraph":
        graph = RegionGraph()
        graph.output(graph.graph_copy(self, {} if memo is None else memo))
        return graph

    def __reduce__(self) -> tuple[Any, ...]:
        """A flat list of nodes that name their arguments: pickling linked nodes would recurse."""

        def named(argument: Any) -> Any:
            return NodeName(argument.name) if isinstance(argument, fx.Node) else argument

        nodes: list[tuple[str, Any, Any, str]] = []
        for node in self.nodes:
            arguments = map_aggregate((node.args, node.kwargs), named)
            nodes.append((node.op, node.target, arguments, node.name))
        return _from_nodes, (nodes,)


def _check(owner: Any, target: str) -> None:
    """Raise AttributeError unless a module has this attribute.

    A property, which might do something, is not read.
    """
    *path, name = target.split(".")
    for part in path:
        child = owner._modules.get(part) if isinstance(owner, nn.Module) else None
        owner = getattr(owner, part) if child is None else child
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
