"""What a region runs: its graph, in which linear calls and their branches are computed together.

A graph says y = F.linear(x, W, b) and then branch(x, y). It runs as one call of `adapted_linear`;
and several of these on one x, or calls of modules that do nothing else, run as one call of
`joined`. The graph itself stays as it is.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .._graph.groups import groups, items_of, pure
from .._graph.modules import is_bare, submodule
from .._graph.rules import linear_call
from .._kernels.calls import AdaptedCall
from .._kernels.linears import linears
from .._kernels.private import is_transforming
from .._kernels.tensors import PLAIN
from .branches import Branch, branches_after
from .direct import LinearForward, directly
from .shards import check_spread


@pure
def adapted_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *branches: Branch) -> Tensor:
    """Return x W^T + b and what the branches add."""
    found = directly(x, ((weight, bias, *branches),))
    if found:
        return found[0]
    if isinstance(x, Tensor) and all(map(is_bare, branches)):
        return linears(x, (_linear(weight, bias, branches),))[0]
    y = F.linear(x, weight, bias)
    for branch in branches:
        y = branch(x, y)
    return y


def joined(x: Tensor, *members: Any) -> list[Tensor]:
    """Return what each member gives for x: a module, or the linear call (W, b, branches).

    The linear calls are computed together, unless something is hooked to one of them, or one is
    sharded, patched, compiled or replaced by itself. Other modules that stand between them are
    called in their turn.
    """
    results = directly(x, members)
    if results:
        for member in members[len(results):]:
            results.append(_by_itself(x, member))
        return results
    operands = [_operands(member) for member in members]
    calls = [_call(found) for found in operands]
    together = [call for call in calls if call is not None]
    touched = any(call is None and linear_forward(member) for member, call in zip(members, calls))
    if not isinstance(x, Tensor) or touched or len(together) < 2:
        return [_by_itself(x, member) for member in members]
    if len(together) == len(members):
        return linears(x, together)
    watched = not (torch.compiler.is_compiling() or x.is_inference() or is_transforming())
    if not watched:  # x has no version that would tell of a change
        return [_by_itself(x, member) for member in members]
    results, version = linears(x, together), x._version
    outputs: list[Tensor] = []
    for member, call in zip(members, calls):
        computed = results.pop(0) if call is not None else None
        stale = x._version != version  # a module before it wrote into x
        outputs.append(_by_itself(x, member) if computed is None or stale else computed)
    return outputs


def _by_itself(x: Tensor, member: Any) -> Any:
    return member(x) if isinstance(member, nn.Module) else adapted_linear(x, *member)


def _operands(member: Any) -> tuple[Tensor, Tensor | None, Sequence[Branch]] | None:
    """W, b and the branches of the linear call that a member makes, if nothing else happens there.
    """
    if not isinstance(member, nn.Module):
        weight, bias, *branches = member
        return weight, bias, branches
    forward = linear_forward(member)
    if forward is None or not is_bare(member):
        return None
    bias = None if forward.bias is None else getattr(member, forward.bias)
    branches = [getattr(member, name) for name in forward.branches]
    return getattr(member, forward.weight), bias, branches


def _call(operands: Any) -> AdaptedCall | None:
    """The linear call of these operands, if nothing else happens there."""
    if operands is None:
        return None
    weight, bias, branches = operands
    if type(weight) not in PLAIN or not all(map(is_bare, branches)):
        return None
    return _linear(weight, bias, branches)


def _linear(weight: Tensor, bias: Tensor | None, branches: Sequence[Branch]) -> AdaptedCall:
    addends = [addend for branch in branches for addend in branch.addends(weight)]
    if type(weight) not in PLAIN:
        check_spread(weight, [factor for addend in addends for factor in addend[:2]])
    return AdaptedCall(weight, bias, addends)


def linear_forward(module: Any) -> LinearForward | None:
    """Return what a module computes, if that is one adapted linear call and no more."""
    found: LinearForward | None = getattr(type(module), "_linear", None)
    return found


def lower(module: nn.Module, graph: fx.Graph, join: bool) -> fx.Graph:
    """Return the graph that a module runs for this one; the same if nothing is joined in it."""
    branched = any(isinstance(submodule(module, str(node.target)), Branch)
                   for node in graph.find_nodes(op="call_module"))
    if not branched and not (join and _shared(module, graph)):
        return graph
    lowered = copy.deepcopy(graph)
    for node in list(lowered.nodes):
        _fuse(module, lowered, node)
    members: dict[fx.Node, Any] = {}
    for node in lowered.nodes:
        if _is_member(module, node):
            members[node] = node.args[0]
    if join:
        for group in groups(members, _is_called_with):
            _join_group(lowered, group)
    return lowered


def joins(module: nn.Module, graph: fx.Graph) -> bool:
    """True if there is something to join in a module's graph."""
    return any(node.target is joined for node in lower(module, graph, True).nodes)


def forward_of(graph: fx.Graph) -> LinearForward | None:
    """Return what a lowered graph computes, if that is one adapted linear call of its input."""
    inputs, outputs = graph.find_nodes(op="placeholder"), graph.find_nodes(op="output")
    calls = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    if len(calls) != 1 or calls[0].target is not adapted_linear or outputs[0].args != (calls[0],):
        return None
    x, *operands = calls[0].args
    if inputs != [x] or not _are_attributes(operands):
        return None
    names = [None if node is None else str(node.target) for node in operands]
    if any(name is not None and "." in name for name in names):
        return None
    weight, bias, *branches = names
    return LinearForward(weight, bias, tuple(branches))  # type: ignore[arg-type]


def _fuse(module: nn.Module, graph: fx.Graph, node: fx.Node) -> None:
    """Put one `adapted_linear` in the place of a linear call and the branches that follow it."""
    call = linear_call(node)
    following = branches_after(module, node) if call is not None else []
    if call is None or not following:
        return
    if any(user.args != (call.input, user.args[1]) for user in following):
        return  # some is called in reverse
    given = call.rule.named(node.args, node.kwargs)
    weight, bias = given["weight"], given.get("bias")
    if call.rule.transposed and isinstance(bias, fx.Node) and bias.op != "get_attr":
        return  # any addend may stand there, and need not have the shape of a bias
    with graph.inserting_before(following[-1]):
        if call.rule.transposed:
            weight = graph.call_function(getattr, (weight, "mT"))
        branches = [graph.get_attr(str(user.target)) for user in following]
        fused = graph.call_function(adapted_linear, (call.input, weight, bias, *branches))
    fused.meta = node.meta.copy()
    following[-1].replace_all_uses_with(fused)
    for old in (*reversed(following), node):
        graph.erase_node(old)


def _is_called_with(node: fx.Node, value: fx.Node) -> bool:
    """True if a node calls a module with this value only."""
    return node.op == "call_module" and node.args == (value,) and not node.kwargs


def _shared(module: nn.Module, graph: fx.Graph) -> bool:
    """True if a value is the input of two modules that are adapted linear calls."""
    inputs = [node.args for node in graph.find_nodes(op="call_module") if _is_member(module, node)]
    return len(set(inputs)) < len(inputs)


def _is_member(module: nn.Module, node: fx.Node) -> bool:
    """True if a node is an adapted linear call of its first argument, and so can be joined."""
    if node.op == "call_module":
        called = submodule(module, str(node.target))
        return linear_forward(called) is not None and len(node.args) == 1 and not node.kwargs
    return node.target is adapted_linear and _are_attributes(node.args[1:])


def _are_attributes(operands: Iterable[Any]) -> bool:
    """True if all are read from modules, or None."""
    return all(operand is None or operand.op == "get_attr" for operand in operands)


def _join_group(graph: fx.Graph, members: list[fx.Node]) -> None:
    """Put one `joined` in the place of several adapted linear calls."""
    with graph.inserting_before(members[0]):
        operands: list[Any] = []
        for member in members:
            if member.op == "call_module":
                operands.append(graph.get_attr(str(member.target)))
            else:
                given: list[Any] = [*member.args[1:]]
                read = [operand and graph.get_attr(str(operand.target)) for operand in given]
                operands.append(tuple(read))
        node = graph.call_function(joined, (members[0].args[0], *operands))
        results = items_of(graph, node, len(members))
    for member, result in zip(members, results):
        result.meta = member.meta.copy()
        member.replace_all_uses_with(result)
        graph.erase_node(member)
        for operand in member.all_input_nodes:
            if operand.op == "get_attr" and not operand.users:
                graph.erase_node(operand)
