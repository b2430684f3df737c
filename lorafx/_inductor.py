"""The pass that joins branches in the graphs that the compiler captures, before it derives their gradients."""

import operator

import torch
import torch.nn.functional as F
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from . import _group
from ._group import groups, may_write


class JoinBranches(CustomGraphPass):
    """x A_1^T, x A_2^T, ... -> the parts of x cat(A_1, A_2, ...)^T, where each is the first half of a branch."""

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite the graph in place."""
        halves = [node for node in graph.find_nodes(op="call_function", target=F.linear) if _is_first_half(node)]
        for group in groups(halves, may_write):
            if len({node.args[1].meta["example_value"].dtype for node in group}) == 1:  # type: ignore[union-attr]
                _join(graph, group)

    def uuid(self) -> bytes:
        """The same as long as the pass is."""
        return get_hash_for_files((__file__, str(_group.__file__)))


def _is_first_half(node: fx.Node) -> bool:
    """Whether this is the x A^T of y + (x A^T) B^T, A being an input of the graph or a cast of one."""
    A = node.args[1]
    source = A.args[0] if isinstance(A, fx.Node) and A.target == "to" else A
    if len(node.args) != 2 or node.kwargs or not isinstance(source, fx.Node) or source.op != "placeholder":
        return False
    second = _only_user(node)
    added = second and _only_user(second)
    return (second is not None and second.target is F.linear and second.args[0] is node
            and added is not None and added.target is torch.add and added.args[1] is second)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _join(graph: fx.Graph, halves: list[fx.Node]) -> None:
    factors: list[fx.Node] = [node.args[1] for node in halves]  # type: ignore[misc]
    for factor in factors:
        if factor.op != "placeholder":
            halves[0].prepend(factor)
    ranks = [factor.meta["example_value"].shape[0] for factor in factors]
    with graph.inserting_before(halves[0]):
        A = graph.call_function(torch.cat, (factors,))  # (R, in)
        h = graph.call_function(F.linear, (halves[0].args[0], A))  # (..., R)
        parts = graph.call_method("split_with_sizes", (h, ranks), {"dim": -1})
        results = [graph.call_function(operator.getitem, (parts, index)) for index in range(len(halves))]
    for half, result in zip(halves, results):
        half.replace_all_uses_with(result)
        graph.erase_node(half)
