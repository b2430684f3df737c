"""Writes branches into the graph of a region: y becomes branch(x, y) for all that used y."""

import functools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import fx, nn

from .._adapter.names import dotted
from .._graph.modules import submodule
from .._graph.rules import matrix_users, only_metadata
from .._graph.sites import Call
from .branches import after_branches
from .reading import FROZEN_PREFIX, adapted_names
from .regions import make_region


class Insertion(NamedTuple):
    """A branch, by its path below the region, to put after a call, which may be in reverse."""

    call: Call
    branch: str
    reverse: bool


def insert_branches(
    region: nn.Module, graph: fx.Graph, insertions: Iterable[Insertion], group: bool
) -> None:
    """Insert a branch after each of these linear calls, and let the region run the graph.

    `group`: compute linear calls that share an input together.
    """
    for call, branch, reverse in insertions:
        last = after_branches(region, call.node)  # some may be there of the weight's other blocks
        with graph.inserting_after(last):
            arguments = (call.input, last, True) if reverse else (call.input, last)
            node = graph.call_module(branch, arguments)
        node.meta = call.node.meta.copy()
        last.replace_all_uses_with(node, delete_user_cb=functools.partial(_is_other, node))
    _read_frozen(region, graph)
    if isinstance(region, fx.GraphModule):
        region.recompile()
    else:
        make_region(region, graph, group)
    graph.lint()


def _is_other(node: fx.Node, user: fx.Node) -> bool:
    return user is not node


def _read_frozen(region: nn.Module, graph: fx.Graph) -> None:
    """Let linear calls with a branch beside them, and questions for a shape or dtype, read W."""
    for node in graph.find_nodes(op="get_attr"):
        owner, _, attribute = str(node.target).rpartition(".")
        if attribute not in adapted_names(submodule(region, owner)):
            continue
        target, users = dotted(owner, FROZEN_PREFIX + attribute), list(matrix_users(node))
        frozen = {user for _, user in users
                  if only_metadata(user) or after_branches(region, user) is not user}
        if len(frozen) == len({user for _, user in users}):
            node.target = target
            continue
        for transposes, user in users:
            if user in frozen:  # it gets a reading, and transposes, of its own
                with graph.inserting_before(user):
                    twin = graph.get_attr(target)
                    for transpose in transposes:
                        given = transpose.all_input_nodes[0]
                        twin = graph.node_copy(
                            transpose, functools.partial(_instead, {given: twin}))
                user.replace_input_with(transposes[-1] if transposes else node, twin)


def _instead(twins: Mapping[fx.Node, fx.Node], node: fx.Node) -> fx.Node:
    return twins.get(node, node)
