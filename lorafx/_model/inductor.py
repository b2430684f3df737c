"""The pass that joins branches in graphs that a compiler captured, before it derives gradients."""

import operator
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .. import _kernels
from .._graph import groups as grouping
from .._graph.groups import groups, items_of
from .._kernels.addend import Addend
from .._kernels.calls import AdaptedCall
from .._kernels.compiled import HALF
from .._kernels.linears import full_precision, merges
from .._kernels.merged import merged_linears
from .._kernels.private import compiler_pass

_CompilerPass, _hash_of_files = compiler_pass()
# what decides, together with torch's settings, what a graph becomes
_SOURCES = (__file__, str(grouping.__file__),
            *sorted(str(path) for path in Path(_kernels.__path__[0]).glob("*.py")))


class BranchNodes(NamedTuple):
    """The nodes of one branch: y + ((x A^T) * gate) B^T, or its scale in B."""

    x: fx.Node
    A: fx.Node
    B: fx.Node
    half: fx.Node  # x A^T
    gate: fx.Node | None  # (rank), or for each row (N, rank)
    other: fx.Node  # (x A^T) B^T
    sum: fx.Node

    @property
    def linear(self) -> fx.Node | None:
        """The linear call of x that gives y, if nothing else uses it, of the graph's inputs."""
        y = self.sum.args[0]
        if not isinstance(y, fx.Node) or y.target is not F.linear or y.args[0] is not self.x:
            return None
        if len(y.users) > 1 or y.kwargs or not all(map(_is_input, y.args[1:])):
            return None
        return y


class JoinBranches(_CompilerPass):  # type: ignore[misc, valid-type]
    """Of branches of one x, x A_1^T, x A_2^T, ... become parts of x cat(A_1, A_2, ...)^T.

    Or, with the linear calls beside which they stand, they become x (W_1 + s_1 B_1 A_1)^T, ...,
    where that is faster and as exact.
    """

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite the graph in place."""
        found = []
        inputs: dict[fx.Node, fx.Node] = {}  # of the products that may be computed together
        for node in graph.find_nodes(op="call_function", target=torch.add):
            branch = _branch_ending_in(node)
            if branch is not None:
                found.append(branch)
                inputs[branch.half] = branch.x
                if branch.linear is not None:
                    inputs[branch.linear] = branch.x
        members = {node: inputs[node] for node in graph.nodes if node in inputs}
        for group in groups(members, lambda *_: False):
            here = [branch for branch in found if branch.half in group]
            if here and all(branch.linear in group for branch in here) and _forms_weights(here):
                _form_weights(graph, here, group[0])
            elif len(here) > 1 and len({_value(branch.A).dtype for branch in here}) == 1:
                _join_products(graph, here)

    def uuid(self) -> bytes:
        """The same as long as the pass is."""
        precision = str([full_precision(device) for device in ("cpu", "cuda")])
        return _hash_of_files(_SOURCES, precision)


def _branch_ending_in(node: fx.Node) -> BranchNodes | None:
    """The branch that ends in this sum, if one does."""
    other = node.args[1] if len(node.args) == 2 and not node.kwargs else None
    if not _is_product(other) or len(other.users) != 1:
        return None
    half, B = other.args
    half, gate = _without_gate(half)
    if not isinstance(half, fx.Node) or len(half.users) != 1:
        return None
    product, joined = _product_of(half)
    if not _is_product(product) and not _keeps_no_x(product):
        return None
    x, A = product.args
    if joined and isinstance(A, fx.Node) and A.target is torch.cat:  # joined in a region
        A = A.args[0][half.args[1]]  # type: ignore[index]
    if not isinstance(x, fx.Node) or not isinstance(A, fx.Node) or not isinstance(B, fx.Node):
        return None
    if not all(map(_is_input, (A, B, gate))):
        return None
    return BranchNodes(x, A, B, half, gate, other, node)


def _without_gate(half: Any) -> tuple[Any, fx.Node | None]:
    """x A^T, and the gate by which it is multiplied, if it is."""
    gated = half
    while isinstance(gated, fx.Node) and gated.target == "to" and len(gated.users) == 1:
        gated = gated.args[0]
    if isinstance(gated, fx.Node) and gated.target is operator.mul and len(gated.users) == 1:
        return gated.args  # type: ignore[return-value]
    return half, None


def _is_product(value: Any) -> TypeGuard[fx.Node]:
    """True if a node is x W^T."""
    return isinstance(value, fx.Node) and value.target is F.linear and len(value.args) == 2


def _keeps_no_x(value: Any) -> TypeGuard[fx.Node]:
    """True if a node is x A^T of which x is not to be kept."""
    return isinstance(value, fx.Node) and value.target is HALF


def _product_of(half: fx.Node) -> tuple[Any, bool]:
    """The node that computes x A^T, and whether it does for several A of which `half` is a part."""
    split = half.args[0] if half.target is operator.getitem else None
    if isinstance(split, fx.Node) and split.target == "split_with_sizes":
        return split.args[0], True
    return half, False


def _is_input(value: Any) -> bool:
    """True if this is an input of the graph, perhaps cast or scaled, or None."""
    if isinstance(value, fx.Node) and value.target in ("to", operator.mul):
        return all(map(_is_input, value.all_input_nodes))
    return value is None or isinstance(value, fx.Node) and value.op == "placeholder"


def _value(node: fx.Node) -> Tensor:
    value: Tensor = node.meta["example_value"]
    return value


def _forms_weights(branches: list[BranchNodes]) -> bool:
    x, calls = _value(branches[0].x), []
    for branch in branches:
        weight, bias = _operands(branch)
        if any(node is not None and _value(node).requires_grad for node in (weight, bias)):
            return False  # its gradient is not computed there
        if branch.gate is not None and _value(branch.gate).ndim > 1:
            return False  # rows have weights of their own
        addend = Addend(_value(branch.B), _value(branch.A), 1.0)
        calls.append(AdaptedCall(_value(weight), None, [addend]))
    # from fewer rows on than elsewhere, as nothing adds into y in place here
    return isinstance(x.numel(), int) and merges(x, calls, share=0.5)


def _operands(branch: BranchNodes) -> tuple[fx.Node, fx.Node | None]:
    """The weight and the bias of the linear call beside which a branch stands."""
    assert branch.linear is not None
    weight, bias = (*branch.linear.args, None)[1:3]
    assert isinstance(weight, fx.Node) and (bias is None or isinstance(bias, fx.Node))
    return weight, bias


def _form_weights(graph: fx.Graph, branches: list[BranchNodes], first: fx.Node) -> None:
    """Put one `merged_linears` in the place of branches and the linear calls beside them."""
    weights, biases, factors = [], [], []
    for branch in branches:
        weight, bias = _operands(branch)
        weights.append(weight)
        biases.append(bias)
        A, B = _before(first, branch.A), _before(first, branch.B)
        if branch.gate is not None:
            gate = _before(first, branch.gate)
            with graph.inserting_before(first):
                B = graph.call_function(operator.mul, (B, gate))
        factors.append((A, B))
    with graph.inserting_before(first):
        recompute = _keeps_no_x(_product_of(branches[0].half)[0])
        operands = (branches[0].x, weights, biases, factors, recompute)
        results = items_of(graph, graph.call_function(merged_linears, operands), len(branches))
    for branch, result in zip(branches, results):
        branch.sum.replace_all_uses_with(result)
        _erase(graph, branch.sum)


def _join_products(graph: fx.Graph, branches: list[BranchNodes]) -> None:
    """Put one product, cut into parts, in the place of the first halves of some branches."""
    first = min(branch.half for branch in branches)
    factors = [_before(first, branch.A) for branch in branches]
    with graph.inserting_before(first):
        ranks = [graph.call_method("size", (factor, 0)) for factor in factors]
        A = graph.call_function(torch.cat, (factors,))  # (R, in)
        product = HALF if _keeps_no_x(_product_of(first)[0]) else F.linear
        h = graph.call_function(product, (branches[0].x, A))  # (..., R)
        parts = graph.call_method("split_with_sizes", (h, ranks), {"dim": -1})
        results = items_of(graph, parts, len(branches))
    for branch, result in zip(branches, results):
        branch.half.replace_all_uses_with(result)
        _erase(graph, branch.half)


def _before(place: fx.Node, factor: fx.Node) -> fx.Node:
    """An input of the graph, perhaps cast or scaled, moved before a place in the graph."""
    if factor.op != "placeholder" and place < factor:
        for operand in factor.all_input_nodes:
            _before(place, operand)
        place.prepend(factor)
    return factor


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node that has no use any more, and those that had only this one."""
    if not node.users and node.op != "placeholder":
        inputs = node.all_input_nodes
        graph.erase_node(node)
        for argument in inputs:
            _erase(graph, argument)
