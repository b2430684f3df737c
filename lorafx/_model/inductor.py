"""The pass that joins branches in the graphs that the compiler captures, before it derives their gradients."""

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from .._kernels import linears, weights as kernel_weights
from .._kernels.linears import Addend, Linear, full_precision, merges
from . import lower as lowering
from .lower import groups


class BranchNodes(NamedTuple):
    """The nodes of one branch: y + (x A^T) B^T, its scale in B."""

    x: fx.Node
    A: fx.Node
    B: fx.Node
    half: fx.Node  # x A^T
    other: fx.Node  # (x A^T) B^T
    sum: fx.Node

    @property
    def linear(self) -> fx.Node | None:
        """The linear call of x that gives y, if nothing else uses that and its weight is the graph's input."""
        y = self.sum.args[0]
        if isinstance(y, fx.Node) and y.target is F.linear and y.args[0] is self.x and len(y.users) == 1:
            return y if all(_is_input(argument) for argument in y.args[1:]) and not y.kwargs else None
        return None


class JoinBranches(CustomGraphPass):
    """Branches of one x: x A_1^T, x A_2^T, ... become parts of x cat(A_1, A_2, ...)^T; or, with the linear calls beside
    which they stand, x (W_1 + s_1 B_1 A_1)^T, ..., where that is faster and as exact."""

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite the graph in place."""
        found = [branch for node in graph.find_nodes(op="call_function", target=torch.add) for branch in _found(node)]
        members = {node: branch.x for branch in found for node in (branch.half, branch.linear) if node is not None}
        for group in groups({node: members[node] for node in graph.nodes if node in members}, lambda *_: False):
            here = [branch for branch in found if branch.half in group]
            if here and all(branch.linear in group for branch in here) and _forms_weights(here):
                _form_weights(graph, here, group[0])
            elif len(here) > 1 and len({_value(branch.A).dtype for branch in here}) == 1:
                _join_products(graph, here)

    def uuid(self) -> bytes:
        """The same as long as the pass is."""
        precision = str([full_precision(device) for device in ("cpu", "cuda")])
        return get_hash_for_files((__file__, str(lowering.__file__), str(linears.__file__), str(kernel_weights.__file__)), precision)


def _found(node: fx.Node) -> Iterator[BranchNodes]:
    """The branch that ends in this sum, if one does."""
    other = node.args[1] if len(node.args) == 2 and not node.kwargs else None
    if not isinstance(other, fx.Node) or other.target is not F.linear or len(other.args) != 2:
        return
    half, B = other.args
    if not isinstance(half, fx.Node) or len(half.users) != 1 or len(other.users) != 1:
        return
    split = half.args[0] if half.target is operator.getitem else None
    joined = split.args[0] if isinstance(split, fx.Node) and split.target == "split_with_sizes" else None
    product = half if joined is None else joined
    if not isinstance(product, fx.Node) or product.target is not F.linear or len(product.args) != 2:
        return
    x, A = product.args
    if joined is not None and isinstance(A, fx.Node) and A.target is torch.cat:  # joined in a region
        A = A.args[0][half.args[1]]  # type: ignore[index]
    if isinstance(x, fx.Node) and isinstance(A, fx.Node) and isinstance(B, fx.Node) and _is_input(A) and _is_input(B):
        yield BranchNodes(x, A, B, half, other, node)


def _is_input(value: Any) -> bool:
    """Whether this is an input of the graph, perhaps cast or scaled, or None."""
    while isinstance(value, fx.Node) and value.target in ("to", operator.mul) and len(value.all_input_nodes) == 1:
        value = value.args[0]
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
        calls.append(Linear(_value(weight), None, [Addend(_value(branch.A), _value(branch.B), 1.0)]))
    return isinstance(x.numel(), int) and merges(x, calls, share=0.5)  # nothing adds into y in place here


def _operands(branch: BranchNodes) -> tuple[fx.Node, fx.Node | None]:
    """The weight and the bias of the linear call beside which a branch stands."""
    assert branch.linear is not None
    weight, bias = (*branch.linear.args, None)[1:3]
    assert isinstance(weight, fx.Node) and (bias is None or isinstance(bias, fx.Node))
    return weight, bias


def _form_weights(graph: fx.Graph, branches: list[BranchNodes], first: fx.Node) -> None:
    """Put one `merged_linears` in the place of some branches and the linear calls beside which they stand."""
    linears = [_operands(branch) for branch in branches]
    factors = [tuple(_before(first, factor) for factor in (branch.A, branch.B)) for branch in branches]
    with graph.inserting_before(first):
        node = graph.call_function(merged_linears, (
            branches[0].x, [W for W, _ in linears], [bias for _, bias in linears], factors))
        results = [graph.call_function(operator.getitem, (node, index)) for index in range(len(branches))]
    for branch, result in zip(branches, results):
        branch.sum.replace_all_uses_with(result)
        _erase(graph, branch.sum)


def _join_products(graph: fx.Graph, branches: list[BranchNodes]) -> None:
    """Put one product, cut into parts, in the place of the first halves of some branches."""
    first = min(branch.half for branch in branches)
    factors = [_before(first, branch.A) for branch in branches]
    ranks = [len(_value(branch.A)) for branch in branches]
    with graph.inserting_before(first):
        A = graph.call_function(torch.cat, (factors,))  # (R, in)
        h = graph.call_function(F.linear, (branches[0].x, A))  # (..., R)
        parts = graph.call_method("split_with_sizes", (h, ranks), {"dim": -1})
        results = [graph.call_function(operator.getitem, (parts, index)) for index in range(len(branches))]
    for branch, result in zip(branches, results):
        branch.half.replace_all_uses_with(result)
        _erase(graph, branch.half)


def _before(place: fx.Node, factor: fx.Node) -> fx.Node:
    """An input of the graph, perhaps cast or scaled, which now happens before a place in the graph."""
    if factor.op != "placeholder" and place < factor:
        _before(place, factor.all_input_nodes[0])
        place.prepend(factor)
    return factor


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node that has no use any more, and those that had only this one."""
    if not node.users and node.op != "placeholder":
        inputs = node.all_input_nodes
        graph.erase_node(node)
        for argument in inputs:
            _erase(graph, argument)


def merged_linears(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], factors: list[tuple[Tensor, Tensor]],
) -> tuple[Tensor, ...]:
    """[x (W + B A)^T + b for each], for a compiler to trace: neither the sums nor their gradients are kept."""
    flat = [tensor for pair in factors for tensor in pair]
    outputs: tuple[Tensor, ...] = _MergedLinears.apply(  # type: ignore[no-untyped-call]
        x, len(weights), *weights, *biases, *flat)
    return outputs


class _MergedLinears(torch.autograd.Function):
    """(x, count, W, ..., b, ..., A, B, A, B, ...) -> y, ..., differentiable in x and the A and B."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, *tensors: Any) -> tuple[Tensor, ...]:
        weights, biases, factors = tensors[:count], tensors[count:2 * count], tensors[2 * count:]
        A, B = factors[::2], factors[1::2]
        ctx.count = count
        ctx.save_for_backward(x, *weights, *A, *B)
        return tuple(F.linear(x, torch.addmm(W, b, a), bias) for W, bias, a, b in zip(weights, biases, A, B))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        count = ctx.count
        weights, A, B = tensors[:count], tensors[count:2 * count], tensors[2 * count:]
        rows = x.reshape(-1, x.shape[-1])
        dYs = [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]
        h = (rows @ torch.cat(A).t()).split_with_sizes([len(a) for a in A], dim=1)
        G = torch.cat([dY @ b for dY, b in zip(dYs, B)], dim=1)
        dA = (rows.t() @ G).t().split_with_sizes([len(a) for a in A])
        dB = [dY.t() @ part for dY, part in zip(dYs, h)]
        # the transposed sum, which no compiler takes for that of the forward pass and keeps
        dX = [dY @ torch.addmm(W.t(), a.t(), b.t()).t() for dY, W, a, b in zip(dYs, weights, A, B)]
        pairs = [gradient for pair in zip(dA, dB) for gradient in pair]
        return sum(dX[1:], dX[0]).view(x.shape), None, *[None] * (2 * count), *pairs
