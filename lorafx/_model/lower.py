"""What a region runs: its graph, in which linear calls and their branches are computed together.

A graph says y = F.linear(x, W, b) and then branch(x, y). It runs as one call of `adapted_linear`; and several of these
on one x, or calls of modules that do nothing else, run as one call of `joined`. The graph itself stays as it is.
"""

import copy
import functools
import inspect
import math
import operator
import types
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from .._graph.modules import submodule
from .._graph.rules import linear_call
from .._kernels.linears import PLAIN, Linear, linears, transforming
from .branches import Branch, branches_after


class Forward(NamedTuple):
    """The names of the tensors and branches of a module whose forward is one adapted linear call of its input."""

    weight: str
    bias: str | None
    branches: tuple[str, ...]


def adapted_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *branches: Branch) -> Tensor:
    """x W^T + b and what the branches add."""
    if isinstance(x, Tensor) and all(map(_is_bare, branches)):
        return linears(x, (_linear(weight, bias, branches),))[0]
    y = F.linear(x, weight, bias)
    for branch in branches:
        y = branch(x, y)
    return y


def joined(x: Tensor, *members: Any) -> list[Tensor]:
    """What each member gives for x: a module, or the linear call (W, b, branches).

    The linear calls are computed together, unless something is hooked to one of them, or one is sharded, patched,
    compiled or replaced by itself. Other modules that stand between them are called in their turn.
    """
    calls = [_call(member) for member in members]
    together = [call for call in calls if call is not None]
    touched = any(call is None and linear_forward(member) for member, call in zip(members, calls))
    if not isinstance(x, Tensor) or touched or len(together) < 2:
        return [_alone(x, member) for member in members]
    if len(together) == len(members):
        return linears(x, together)
    if torch.compiler.is_compiling() or x.is_inference() or transforming():  # no version of x to watch
        return [_alone(x, member) for member in members]
    results, version = linears(x, together), x._version
    outputs: list[Tensor] = []
    for member, call in zip(members, calls):
        computed = results.pop(0) if call is not None else None
        stale = x._version != version  # a module before it wrote into x
        outputs.append(_alone(x, member) if computed is None or stale else computed)
    return outputs


def _alone(x: Tensor, member: Any) -> Any:
    return member(x) if isinstance(member, nn.Module) else adapted_linear(x, *member)


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
    if type(weight) not in PLAIN or not all(map(_is_bare, branches)):
        return None
    return _linear(weight, bias, branches)


def _linear(weight: Tensor, bias: Tensor | None, branches: Sequence[Branch]) -> Linear:
    return Linear(weight, bias, [addend for branch in branches for addend in branch.addends()])


def _is_bare(module: nn.Module) -> bool:
    """Whether calling a module does what its class's forward does and nothing more."""
    hooked = (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
              or module._backward_pre_hooks or _has_any_global_hook())  # type: ignore[no-untyped-call]
    patched = "forward" in module.__dict__ or module._compiled_call_impl is not None
    return not hooked and not patched and type(module).__call__ is nn.Module.__call__


def linear_forward(module: Any) -> Forward | None:
    """What a module computes, if that is one adapted linear call and no more."""
    found: Forward | None = getattr(type(module), "_linear", None)
    return found


def lower(module: nn.Module, graph: fx.Graph, join: bool) -> fx.Graph:
    """The graph that a module runs for this one; the same if there is nothing to compute together."""
    branched = any(isinstance(submodule(module, str(node.target)), Branch)
                   for node in graph.find_nodes(op="call_module"))
    if not branched and not (join and _shared(module, graph)):
        return graph
    lowered = copy.deepcopy(graph)
    for node in list(lowered.nodes):
        _fuse(module, lowered, node)
    members: dict[fx.Node, Any] = {node: node.args[0] for node in lowered.nodes if _is_member(module, node)}
    for group in groups(members, _is_called_with) if join else ():
        _join_group(lowered, group)
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


def _fuse(module: nn.Module, graph: fx.Graph, node: fx.Node) -> None:
    """Put one `adapted_linear` in the place of a linear call and the branches that follow it."""
    call = linear_call(node)
    following = branches_after(module, node) if call is not None else []
    if call is None or not following or any(user.args != (call.input, user.args[1]) for user in following):
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
    """Whether a node calls a module with this value alone."""
    return node.op == "call_module" and node.args == (value,) and not node.kwargs


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


def groups(members: Mapping[fx.Node, fx.Node], takes: Callable[[fx.Node, fx.Node], bool]) -> list[list[fx.Node]]:
    """The members that can be computed where the first of each group is: on one value that nothing changes between.

    The members are given in the graph's order, each with this value. A node between two of them that may change it
    ends a group, unless the group `takes` the node (given the value) as a member that is none of these.
    """
    by_input: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for member, value in members.items():
        by_input[value].append(member)
    found: list[list[fx.Node]] = []
    for value, sharing in by_input.items():
        group: list[fx.Node] = []
        fresh: set[fx.Node] = set()  # the members and what is computed from them alone
        for node in _span(sharing):
            if node in sharing or group and takes(node, value):
                group.append(node)
                fresh.add(node)
            elif node.all_input_nodes and fresh.issuperset(node.all_input_nodes):
                fresh.add(node)  # it may write into these, not into x or a weight
            elif group and may_write(node):
                found.append(group)
                group, fresh = [], set()
        found.append(group)
    for group in found:
        while group and group[-1] not in members:
            group.pop()
    return [group for group in found if sum(node in members for node in group) > 1]


def _span(members: list[fx.Node]) -> Iterable[fx.Node]:
    """The nodes from the first to the last of these."""
    node = members[0]
    while node is not members[-1]:
        yield node
        node = node.next
    yield node


def may_write(node: fx.Node) -> bool:
    """Whether a node may change a value or a mode, as far as can be seen: what is not known may."""
    if node.op in ("get_attr", "placeholder", "output"):
        return False
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__") or name.startswith(("__i", "__set", "__del"))
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    if node.op == "call_module" or not callable(node.target) or isinstance(node.target, torch._ops.OpOverloadPacket):
        return True
    return node.target not in _pure_functions() or _sets_a_flag(node.target, node)


@functools.cache
def _pure_functions() -> frozenset[Any]:
    """The functions of torch and operator that compute a value; those that write end in an underscore."""
    torchs = [function for functions in torch.overrides.get_overridable_functions().values() for function in functions]
    named = {function for function in torchs if not function.__name__.endswith("_")}
    plain = {value for module in (operator, math) for value in vars(module).values()
             if isinstance(value, types.BuiltinFunctionType)}
    written = {value for name, value in vars(operator).items() if name.strip("_") in _WRITERS}
    return frozenset((named | plain | {getattr, adapted_linear}) - written)


_WRITERS = frozenset("""setitem delitem iadd iand iconcat ifloordiv ilshift imatmul imod imul ior ipow irshift isub
    itruediv ixor""".split())


def _sets_a_flag(function: Any, node: fx.Node) -> bool:
    """Whether an argument asks a function to write: into `out`, `inplace`, or a table that it renormalises."""
    given = dict(node.kwargs)
    if isinstance(function, types.FunctionType):
        given |= dict(zip(inspect.signature(function).parameters, node.args))
    return any(given.get(name) not in (None, False) for name in ("out", "inplace", "max_norm"))


def _join_group(graph: fx.Graph, members: list[fx.Node]) -> None:
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
