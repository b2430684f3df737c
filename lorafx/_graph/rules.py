"""What counts as a linear call, y = x W^T + b, in a graph. Reads graphs, writes none."""

import dataclasses
import inspect
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx


@dataclasses.dataclass(frozen=True)
class Rule:
    """One way of writing a linear call: a function or method, its arguments as in `signature`.

    `transposed` means that the weight argument is (in, out), y = x W, and not (out, in), y = x W^T.
    """

    kind: str
    target: Callable[..., Any] | str
    signature: tuple[str, ...]
    transposed: bool = False

    def named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by their names; none if some have other names."""
        given = dict(zip(self.signature, args))
        for name, value in kwargs.items():
            given[_SPELLINGS.get(name, name)] = value
        fits = given.keys() <= set(self.signature) and len(args) <= len(self.signature)
        return given if fits else {}

    def operands(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """The input and the weight of a call; None, None if it has arguments of other names."""
        given = self.named(args, kwargs)
        return given.get("input"), given.get("weight")


_LINEAR = ("input", "weight", "bias")
_PRODUCT = ("input", "weight")
RULES: dict[Any, Rule] = {rule.target: rule for rule in (
    Rule("linear", F.linear, _LINEAR),
    Rule("addmm", torch.addmm, ("bias", "input", "weight"), transposed=True),
    Rule("matmul", torch.matmul, _PRODUCT, transposed=True),
    Rule("matmul", operator.matmul, _PRODUCT, transposed=True),
    Rule("matmul", "matmul", _PRODUCT, transposed=True),
    Rule("mm", torch.mm, _PRODUCT, transposed=True),
    Rule("mm", "mm", _PRODUCT, transposed=True),
    Rule("bmm", torch.bmm, _PRODUCT, transposed=True),
    Rule("bmm", "bmm", _PRODUCT, transposed=True),
    Rule("baddbmm", torch.baddbmm, ("bias", "input", "weight"), transposed=True),
    Rule("aten.linear", torch.ops.aten.linear.default, _LINEAR),
    Rule("aten.addmm", torch.ops.aten.addmm.default, ("bias", "input", "weight"), transposed=True),
    Rule("aten.matmul", torch.ops.aten.matmul.default, _PRODUCT, transposed=True),
    Rule("aten.mm", torch.ops.aten.mm.default, _PRODUCT, transposed=True),
    Rule("aten.bmm", torch.ops.aten.bmm.default, _PRODUCT, transposed=True),
)}


class Role(NamedTuple):
    """A weight among a function's arguments, (in, out) if `transposed`.

    `blocks` names equal blocks of its rows that are weights by themselves, if it has some.
    """

    transposed: bool = False
    blocks: tuple[str, ...] = ()


# Functions that make linear calls of no rule: {function: {argument that is a weight: Role}}.
COMPOSITES: dict[Any, dict[str, Role]] = {
    F.multi_head_attention_forward: {
        "in_proj_weight": Role(blocks=("q", "k", "v")), "q_proj_weight": Role(),
        "k_proj_weight": Role(), "v_proj_weight": Role(), "out_proj_weight": Role()},
    F.grouped_mm: {"mat_b": Role(transposed=True)},
}


def roles(
    function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[tuple[Any, Role]]:
    """(argument, Role) of each weight among the arguments of a call."""
    if function in COMPOSITES:
        given = {**dict(zip(inspect.signature(function).parameters, args)), **kwargs}
        for name, role in COMPOSITES[function].items():
            if name in given:
                yield given[name], role


# The names that torch gives some of these arguments.
_SPELLINGS = {"mat1": "input", "mat2": "weight", "other": "weight",
              "batch1": "input", "batch2": "weight"}

# Ways of transposing a matrix: {target: alternatives of the other arguments with which it does}.
_SWAPS = ((0, 1), (1, 0), (-1, -2), (-2, -1))
TRANSPOSES: dict[Any, tuple[tuple[Any, ...], ...]] = {
    getattr: (("T",), ("mT",)), "t": ((),), torch.t: ((),), torch.ops.aten.t.default: ((),),
    "transpose": _SWAPS, torch.transpose: _SWAPS, torch.ops.aten.transpose.int: _SWAPS,
    "permute": ((1, 0), ((1, 0),)), torch.permute: (((1, 0),),),
    torch.ops.aten.permute.default: (([1, 0],),),
}
# Where only the name is known.
SWAPS_BY_NAME = frozenset({"T", "mT", "t", "transpose", "permute", "swapaxes"})


@dataclasses.dataclass(frozen=True)
class LinearCall:
    """The parts of a node that computes x W^T + b, or x W + b if `transposed`.

    `weight` is the node of W itself, not of a transpose.
    """

    rule: Rule
    input: fx.Node
    weight: fx.Node
    transposed: bool


def linear_call(node: fx.Node) -> LinearCall | None:
    """The linear call that this node makes, or None."""
    rule = RULES.get(node.target) if node.op in ("call_function", "call_method") else None
    if rule is None or isinstance(rule.target, str) != (node.op == "call_method"):
        return None
    x, weight = rule.operands(node.args, node.kwargs)
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node):
        return None
    if rule.transposed and untransposed(x)[0].op == "get_attr":
        return None  # with a matrix on the left there is no row of inputs
    matrix, swapped = untransposed(weight)
    return LinearCall(rule, x, matrix, rule.transposed != swapped)


def untransposed(node: fx.Node) -> tuple[fx.Node, bool]:
    """The node of the matrix that this one is a transpose of, if it is, and True if it is."""
    swapped = False
    while is_transpose(node) or _is_repeated(node):
        node, swapped = node.all_input_nodes[0], swapped != is_transpose(node)
    return node, swapped


def is_transpose(node: fx.Node) -> bool:
    """True if this node is the transpose of its first argument, taken as a matrix."""
    return node.args[1:] in TRANSPOSES.get(node.target, ())


def _is_repeated(node: fx.Node) -> bool:
    """True if a node is its matrix for each of a batch, as decomposed products take it.

    Only a graph that knows the shapes tells.
    """
    if node.target not in _SHAPING:
        return False
    made, given = (each.meta.get("val") for each in (node, node.all_input_nodes[0]))
    if made is None or given is None or made.ndim > 3 or given.ndim < 2:
        return False
    return bool(made.shape[-2:] == given.shape[-2:])


_SHAPING = (torch.ops.aten.expand.default, torch.ops.aten.view.default,
            torch.ops.aten.reshape.default)


def matrix_users(
    node: fx.Node, transposes: tuple[fx.Node, ...] = ()
) -> Iterator[tuple[tuple[fx.Node, ...], fx.Node]]:
    """(transposes on the way, user) of all that uses a matrix, as it is or transposed."""
    for user in node.users:
        if is_transpose(user) or _is_repeated(user):
            yield from matrix_users(user, (*transposes, user))
        else:
            yield transposes, user


def blocks_of(node: fx.Node, width: int) -> dict[str, tuple[int, int]]:
    """{name: (start, length)} of the blocks into which chunk and split cut the last dimension.

    A block goes by the name of the variable to which forward assigns it, and by its number.
    """
    found: dict[str, tuple[int, int]] = {}
    for user in node.users:
        lengths = _lengths(user, width)
        if not lengths:
            continue
        blocks: list[tuple[int, int]] = []
        start = 0
        for length in lengths:
            blocks.append((start, length))
            start += length
        for part in user.users:
            for item in (part, *part.users):
                if item.target is operator.getitem and isinstance(item.args[1], int):
                    number = range(len(lengths))[item.args[1]]
                    name = re.sub(r"_\d+$", "", item.name)
                    found[name if name != "getitem" else str(number)] = blocks[number]
        for number, block in enumerate(blocks):
            if block not in found.values():
                found[str(number)] = block
    return found


def _lengths(node: fx.Node, width: int) -> list[int]:
    """The lengths of the parts into which a node cuts the last dimension of its argument, or []."""
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    named = node.kwargs.get("chunks", node.kwargs.get("split_size", 0))
    size = node.args[1] if node.args[1:] else named
    dim = node.args[2] if node.args[2:] else node.kwargs.get("dim", 0)
    if name not in ("chunk", "split") or dim != -1 or not size:
        return []
    if isinstance(size, int):
        step = -(-width // size) if name == "chunk" else size
        return [min(step, width - start) for start in range(0, width, step)]
    sizes = list(size) if isinstance(size, (list, tuple)) else []
    return sizes if all(isinstance(length, int) for length in sizes) and sum(sizes) == width else []


# Reading these of a tensor computes nothing with its values.
METADATA = frozenset("""
    dtype device shape size ndim dim numel layout stride element_size is_contiguous requires_grad
    is_meta is_cuda is_cpu new_zeros new_ones new_empty new_full new_tensor
""".split())


def only_metadata(node: fx.Node) -> bool:
    """True if a node asks its first argument for its shape, dtype or the like, and nothing more."""
    if node.target is getattr:
        return node.args[1] in METADATA
    return node.op == "call_method" and node.target in METADATA


def weight_sources(
    node: fx.Node, linear_calls: Mapping[fx.Node, LinearCall]
) -> Iterator[tuple[fx.Node, bool, tuple[str, ...]]]:
    """(get_attr, transposed, blocks of rows) of each tensor from which a weight is computed."""
    call = linear_calls.get(node)
    if call is not None and call.weight.op != "get_attr":
        for source in attribute_sources(call.weight):
            yield source, call.transposed, ()
    for weight, role in roles(node.target, node.args, node.kwargs):
        if isinstance(weight, fx.Node):
            matrix, swapped = untransposed(weight)
            for source in attribute_sources(matrix):
                yield source, role.transposed != swapped, role.blocks
    is_call = node.op in ("call_function", "call_method")
    rule = RULES.get(node.target) if call is None and is_call else None
    if rule is not None and rule.transposed:  # w @ x
        left, right = rule.operands(node.args, node.kwargs)
        are_nodes = isinstance(left, fx.Node) and isinstance(right, fx.Node)
        if are_nodes and not attribute_sources(right):
            for source in attribute_sources(left):
                yield source, False, ()


def attribute_sources(node: fx.Node) -> list[fx.Node]:
    """The attributes from which a value is computed, if from nothing else: no input, no module."""
    if node.op == "get_attr":
        return [node]
    if node.op not in ("call_function", "call_method") or node.target is getattr:
        return []
    sources: list[fx.Node] = []
    for argument in node.all_input_nodes:
        if not only_metadata(argument):
            found = attribute_sources(argument)
            if not found:
                return []
            sources += found
    return sources
