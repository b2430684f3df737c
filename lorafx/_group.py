"""What a region runs: its graph, in which linear calls and their branches are computed together.

A graph says y = F.linear(x, W, b) and then branch(x, y). It runs as one call of `adapted_linear`; and several of these
on one x, or calls of modules that do nothing else, run as one call of `joined`. The graph itself stays as it is.
"""

import copy
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from ._branch import Branch, hooks, submodule
from ._kernels import Linear, linears
from ._rules import linear_call
from ._trace import tracing
from ._watch import Unsound


class Forward(NamedTuple):
    """The names of the tensors and branches of a module whose forward is one adapted linear call of its input."""

    weight: str
    bias: str | None
    branches: tuple[str, ...]


def adapted_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *branches: Branch) -> Tensor:
    """x W^T + b and what the branches add."""
    if isinstance(x, Tensor) and all(map(_is_bare, branches)):
        return linears(x, [_linear(weight, bias, branches)])[0]
    y = F.linear(x, weight, bias)
    for branch in branches:
        y = branch(x, y)
    return y


def joined(x: Tensor, *members: Any) -> list[Tensor]:
    """What each member gives for x: a module that is one adapted linear call, or (W, b, branches).

    They are computed one by one if something is hooked to one of them, or if one is sharded, patched, compiled or
    replaced by itself.
    """
    calls = [_call(member) for member in members]
    if isinstance(x, Tensor) and _all(calls):
        return linears(x, calls)
    return [member(x) if isinstance(member, nn.Module) else adapted_linear(x, *member) for member in members]


def _call(member: Any) -> Linear | None:
    """The linear call that a member makes, if nothing else happens there."""
    if not isinstance(member, nn.Module):
        weight, bias, *branches = member
    else:
        forward = linear_forward(member)
        if forward is None or not _is_bare(member):
            return None
        weight, bias = getattr(member, forward.weight), forward.bias and getattr(member, forward.bias)
        branches = [getattr(member, name) for name in forward.branches]
    if type(weight) not in (Tensor, nn.Parameter) or not all(map(_is_bare, branches)):
        return None
    return _linear(weight, bias, branches)


def _all(calls: list[Linear | None]) -> TypeGuard[list[Linear]]:
    return None not in calls


def _linear(weight: Tensor, bias: Tensor | None, branches: Sequence[Branch]) -> Linear:
    return Linear(weight, bias, [addend for branch in branches for addend in branch.addends()])


def _is_bare(module: nn.Module) -> bool:
    """Whether calling a module does what its class's forward does and nothing more."""
    patched = "forward" in module.__dict__ or module._compiled_call_impl is not None
    return not (patched or hooks(module) or _has_any_global_hook())  # type: ignore[no-untyped-call]


def linear_forward(module: nn.Module) -> Forward | None:
    """What a module computes, if that is one adapted linear call and no more."""
    found: Forward | None = getattr(type(module), "_linear", None)
    return found


def lower(module: nn.Module, graph: fx.Graph, join: bool) -> fx.Graph:
    """The graph that a module runs for this one; the same if there is nothing to compute together."""
    branched = [node for node in graph.find_nodes(op="call_module") if _branch_of(module, node) is not None]
    if not branched and not (join and _shared(module, graph)):
        return graph
    lowered = copy.deepcopy(graph)
    for node in list(lowered.nodes):
        _fuse(module, lowered, node)
    for members in _members(module, lowered) if join else ():
        _join(lowered, members)
    return lowered


def joins(module: nn.Module, graph: fx.Graph) -> bool:
    """Whether there is something to join in a module's graph."""
    return any(node.target is joined for node in lower(module, graph, True).nodes)


def forward_of(graph: fx.Graph) -> Forward | None:
    """What a lowered graph computes, if that is one adapted linear call of its only input and no more."""
    inputs, outputs = graph.find_nodes(op="placeholder"), graph.find_nodes(op="output")
    calls = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    if len(calls) != 1 or calls[0].target is not adapted_linear or outputs[0].args != (calls[0],):
        return None
    x, *operands = calls[0].args
    names = [None if node is None else str(node.target) for node in operands if node is None or node.op == "get_attr"]
    if inputs != [x] or len(names) != len(operands) or any(name and "." in name for name in names):
        return None
    weight, bias, *branches = names
    return Forward(weight, bias, tuple(branches))  # type: ignore[arg-type]


def _branch_of(module: nn.Module, node: fx.Node) -> Branch | None:
    """The branch that this node calls beside a call that has its input and its way round."""
    found = submodule(module, str(node.target)) if node.op == "call_module" else None
    return found if isinstance(found, Branch) and len(node.args) == 2 else None


def _fuse(module: nn.Module, graph: fx.Graph, node: fx.Node) -> None:
    """Put one `adapted_linear` in the place of a linear call and the branches that follow it."""
    call = linear_call(node)
    following: list[fx.Node] = []
    while users := [user for user in (following or [node])[-1].users
                    if call is not None and _branch_of(module, user) is not None and user.args[0] is call.input]:
        following.append(users[0])
    if call is None or not following:
        return
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


def _shared(module: nn.Module, graph: fx.Graph) -> bool:
    """Whether a value is the input of two modules that are adapted linear calls."""
    inputs = [node.args for node in graph.find_nodes(op="call_module") if _is_member(module, node)]
    return len(set(inputs)) < len(inputs)


def _is_member(module: nn.Module, node: fx.Node) -> bool:
    """Whether a node is an adapted linear call that can be joined with others: of its first argument."""
    if node.op == "call_module":
        called = submodule(module, str(node.target))
        return linear_forward(called) is not None and len(node.args) == 1 and not node.kwargs
    operands: list[Any] = [*node.args[1:]]
    return node.target is adapted_linear and all(operand is None or operand.op == "get_attr" for operand in operands)


def _members(module: nn.Module, graph: fx.Graph) -> list[list[fx.Node]]:
    def writes(node: fx.Node) -> bool:
        called = submodule(module, str(node.target)) if node.op == "call_module" else None
        return may_write(node) if called is None else not _is_pure(called)

    members: dict[fx.Node, Any] = {node: node.args[0] for node in graph.nodes if _is_member(module, node)}
    return groups(members, writes)


def groups(members: Mapping[fx.Node, fx.Node], writes: Callable[[fx.Node], bool]) -> list[list[fx.Node]]:
    """The members that can be computed where the first of each group is: on one value that nothing changes between.

    The members are given in the graph's order, each with this value; `writes` says whether a node may change a value in
    place.
    """
    by_input: dict[Any, list[fx.Node]] = defaultdict(list)
    for member, value in members.items():
        by_input[value].append(member)
    found: list[list[fx.Node]] = []
    for sharing in by_input.values():
        group: list[fx.Node] = []
        fresh: set[fx.Node] = set()  # the members and what is computed from them alone
        for node in _span(sharing):
            if node in sharing:
                group.append(node)
                fresh.add(node)
            elif node.op != "get_attr" and fresh.issuperset(node.all_input_nodes):
                fresh.add(node)  # it may write into these, not into x or a weight
            elif group and writes(node):
                found.append(group)
                group, fresh = [], set()
        found.append(group)
    return [group for group in found if len(group) > 1]


def _span(members: list[fx.Node]) -> Iterable[fx.Node]:
    """The nodes from the first to the last of these."""
    node = members[0]
    while node is not members[-1]:
        yield node
        node = node.next
    yield node


def may_write(node: fx.Node) -> bool:
    """Whether a node may change a value in place, as far as names and flags say; a module's call may."""
    if node.op in ("get_attr", "placeholder", "output"):
        return False
    name = node.target if isinstance(node.target, str) else node.target.__name__
    in_place = name.endswith("_") and not name.endswith("__") or node.target in _IN_PLACE
    flagged = any(value is True for value in node.args) or "out" in node.kwargs or bool(node.kwargs.get("inplace"))
    return node.op == "call_module" or in_place or flagged


_IN_PLACE = {operator.setitem, operator.delitem, operator.iadd, operator.isub, operator.imul, operator.itruediv,
             operator.ifloordiv, operator.imod, operator.ipow, operator.imatmul, operator.iand, operator.ior,
             operator.ixor, operator.ilshift, operator.irshift}


def _is_pure(module: nn.Module) -> bool:
    """Whether a module's forward can be traced and changes nothing in place."""
    if isinstance(module, fx.GraphModule):
        graph = module.graph
    else:
        try:
            with tracing() as trace:
                graph = trace(module)
        except Unsound:
            return False
    return not any(may_write(node) for node in graph.nodes if node.op != "call_module") and all(
        _is_pure(submodule(module, str(node.target))) for node in graph.find_nodes(op="call_module"))


def _join(graph: fx.Graph, members: list[fx.Node]) -> None:
    """Put one `joined` in the place of several adapted linear calls."""
    with graph.inserting_before(members[0]):
        operands: list[Any] = []
        for member in members:
            if member.op == "call_module":
                operands.append(graph.get_attr(str(member.target)))
            else:
                given: list[Any] = [*member.args[1:]]
                operands.append(tuple(operand and graph.get_attr(str(operand.target)) for operand in given))
        node = graph.call_function(joined, (members[0].args[0], *operands))
        results = [graph.call_function(operator.getitem, (node, index)) for index in range(len(members))]
    for member, result in zip(members, results):
        result.meta = member.meta.copy()
        member.replace_all_uses_with(result)
        graph.erase_node(member)
        for operand in member.all_input_nodes:
            if operand.op == "get_attr" and not operand.users:
                graph.erase_node(operand)
