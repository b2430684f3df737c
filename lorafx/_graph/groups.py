"""Nodes of a graph that can be computed together, as nothing between them changes their input."""

import functools
import inspect
import math
import operator
import types
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import fx

from .._kernels.private import writes

Function = TypeVar("Function", bound=Callable[..., Any])
_registered: set[Callable[..., Any]] = set()


def pure(function: Function) -> Function:
    """Declare, as a decorator, that a function writes into none of its arguments."""
    _registered.add(function)
    return function


def groups(
    members: Mapping[fx.Node, fx.Node], takes: Callable[[fx.Node, fx.Node], bool]
) -> list[list[fx.Node]]:
    """Return the groups of members that can be computed where the first of each group is.

    The members are given in the graph's order, each with the value that it is computed from. A node
    between two of them that may change this value ends a group, unless the group `takes` the node
    (given the value) as a member that is none of these.
    """
    by_value: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for member, value in members.items():
        by_value[value].append(member)
    found = []
    for value, sharing in by_value.items():
        for group in _groups_of(value, sharing, takes):
            while group and group[-1] not in members:
                group.pop()
            if sum(node in members for node in group) > 1:
                found.append(group)
    return found


def items_of(graph: fx.Graph, node: fx.Node, count: int) -> list[fx.Node]:
    """Return new nodes for the items of what a node gives, in the order of their numbers."""
    return [graph.call_function(operator.getitem, (node, index)) for index in range(count)]


def _groups_of(
    value: fx.Node, sharing: list[fx.Node], takes: Callable[[fx.Node, fx.Node], bool]
) -> list[list[fx.Node]]:
    """The groups among the members that share one value; the last nodes may be no members."""
    found, group = [], list[fx.Node]()
    fresh: set[fx.Node] = set()  # the members and what is computed from them only
    for node in _span(sharing):
        if node in sharing or group and takes(node, value):
            group.append(node)
            fresh.add(node)
        elif node.all_input_nodes and fresh.issuperset(node.all_input_nodes):
            fresh.add(node)  # it may write into these, not into x or a weight
        elif group and may_write(node):
            found.append(group)
            group, fresh = [], set()
    return [*found, group]


def _span(members: list[fx.Node]) -> Iterator[fx.Node]:
    """The nodes from the first to the last of these."""
    node = members[0]
    while node is not members[-1]:
        yield node
        node = node.next
    yield node


_OVERLOAD: Any = type(torch.ops.aten.add.Tensor)
_PACKET: Any = type(torch.ops.aten.add)


def may_write(node: fx.Node) -> bool:
    """True if a node may change a value or a mode, as far as can be seen: what is not known may."""
    target = node.target
    if node.op in ("get_attr", "placeholder", "output"):
        return False
    if node.op == "call_method":
        name = str(target)
        in_place = name.endswith("_") and not name.endswith("__")
        return in_place or name.startswith(("__i", "__set", "__del"))
    if isinstance(target, _OVERLOAD):
        return writes(target)
    if node.op == "call_module" or not callable(target) or isinstance(target, _PACKET):
        return True
    if target in _registered:
        return False
    return target not in _pure_functions() or _sets_a_flag(target, node)


@functools.cache
def _pure_functions() -> frozenset[Any]:
    """The functions of torch and operator that compute a value; those that write end in `_`."""
    found: set[Any] = {getattr}
    for functions in torch.overrides.get_overridable_functions().values():
        found |= {function for function in functions if not function.__name__.endswith("_")}
    for module in (operator, math):
        for value in vars(module).values():
            if isinstance(value, types.BuiltinFunctionType):
                found.add(value)
    written = {value for name, value in vars(operator).items() if name.strip("_") in _WRITERS}
    return frozenset(found - written)


_WRITERS = frozenset("""setitem delitem iadd iand iconcat ifloordiv ilshift imatmul imod imul ior
    ipow irshift isub itruediv ixor""".split())


def _sets_a_flag(function: Any, node: fx.Node) -> bool:
    """True if an argument asks a function to write, be it into a table that it renormalises."""
    given = dict(node.kwargs)
    if isinstance(function, types.FunctionType):
        given |= dict(zip(inspect.signature(function).parameters, node.args))
    return any(given.get(name) not in (None, False) for name in ("out", "inplace", "max_norm"))
