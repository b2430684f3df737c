"""What operators make of the values of their operands."""

import dataclasses
import functools
import inspect
import itertools
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .flow import Logits, Scores, Value, union


OPERATOR = type(torch.ops.aten.add.Tensor)  # others, as flex_attention, are of a higher order
# What logits may go through and still be logits.
PASSING = frozenset("""
    add sub rsub mul div _to_copy clone copy index index_select gather cat stack where masked_fill
    _softmax _log_softmax
""".split())

# A row of their result may depend on many rows, even where its shape says nothing of that.
MIXING = frozenset({"convolution", "cumsum", "cumprod", "logcumsumexp", "roll", "flip"})
# They pick rows, or put them together.
MOVING = frozenset({"cat", "index", "index_select", "index_add"})


@dataclasses.dataclass(frozen=True)
class OperatorCall:
    """A call of an operator, and the values of the tensors among its arguments."""

    name: str
    func: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    given: Sequence[Tensor]
    values: Sequence[Value | None]

    @functools.cached_property
    def _named(self) -> dict[str, Any]:
        if not isinstance(self.func, OPERATOR):
            return inspect.signature(self.func).bind(*self.args, **self.kwargs).arguments
        names = [argument.name for argument in self.func._schema.arguments]
        return {**dict(zip(names, self.args)), **self.kwargs}

    def attention_operands(self) -> list[Tensor] | None:
        """Query, key and value of a kernel that computes attention, by its arguments' names."""
        for names in (("query", "key", "value"), ("q", "k", "v")):
            found = [self._named.get(name) for name in names]
            if all(isinstance(tensor, Tensor) for tensor in found):
                return found  # type: ignore[return-value]
        return None

    def operands(self, places: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The two arguments at these places."""
        values = list(self._named.values())
        return values[places[0]], values[places[1]]


def moved(call: OperatorCall, scores: Iterable[Scores], result: Tensor) -> tuple[Scores, ...]:
    """The scores as they are in the result of an operator that keeps its operand's axes."""
    moved: dict[Scores, None] = {}
    for product in scores:
        for tensor, value in zip(call.given, call.values):
            if value is not None and product in value.scores:
                row = _stride_in(result, tensor, product.row_stride)
                column = _stride_in(result, tensor, product.column_stride)
                moved[dataclasses.replace(product, row_stride=row, column_stride=column)] = None
                break
    return tuple(moved)


def _stride_in(result: Tensor, tensor: Tensor, stride: int | None) -> int | None:
    """The stride that the axis of a tensor with this one has in a result of the same axes."""
    found = [dim - tensor.ndim for dim in range(tensor.ndim)
             if tensor.stride(dim) == stride and tensor.shape[dim] > 1]
    if len(found) != 1 or result.ndim < -found[0] or result.shape[found[0]] == 1:
        return None
    return result.stride(found[0])


def logits_of(call: OperatorCall, values: Sequence[Value]) -> Logits:
    """What a result is where these are its operands that are no constants."""
    least = min((value.logits for value in values), default=Logits.NO)
    if call.name == "tanh":
        return Logits.BOUNDED if least is Logits.YES else Logits.NO
    if call.name not in PASSING:
        return Logits.NO
    return Logits.YES if least is Logits.BOUNDED and call.name == "mul" else least


def written(old: Value | None, new: Value) -> Value:
    """The value of a tensor, part of which may have been written anew."""
    if old is None:
        return new
    both = union([old, new])
    rows = new.rows if old.rows in (0, new.rows) and old.sources | new.sources else 0
    logits = min(old.logits, new.logits)
    return dataclasses.replace(both, rows=rows, stacks=new.stacks, logits=logits)


def has_storage(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided


def carries(tensor: Tensor) -> bool:
    """True if a tensor has numbers that a layer may have computed: no indices, no masks."""
    return has_storage(tensor) and (tensor.is_floating_point() or tensor.is_complex())


def elements(tensor: Tensor) -> range:
    """The places in its storage over which a tensor extends."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    first = tensor.storage_offset()
    return range(first, first + last + 1 if tensor.numel() else first)


def rows_of(tensor: Tensor) -> int:
    return math.prod(tensor.shape[:-1])


def matrices_beside(tensor: Tensor, weight: Tensor) -> int:
    """How many matrices of a weight, as of groups or experts, have rows of a tensor each."""
    matrices = 1
    if weight.ndim == tensor.ndim:
        for size, stride in zip(weight.shape[:-2], weight.stride()):
            matrices *= size if stride else 1
    return matrices


def has_rows(tensor: Tensor, rows: int) -> bool:
    """True if the first dimensions of a tensor, but for what a row has, are so many rows."""
    shape = tensor.shape[:-1] if tensor.ndim > 1 else tensor.shape
    return rows in itertools.accumulate(shape, operator.mul, initial=1)


def rows_in(call: OperatorCall, result: Tensor) -> tuple[int, int]:
    """The rows of an operator's result that are functions of single rows, and their stacks.

    What picks, stacks or puts whole rows has those of its result. What is empty has none to lose.
    """
    found, are_whole = set(), call.name in MOVING
    for tensor, value in zip(call.given, call.values):
        if value is not None and value.sources and tensor.numel():
            found.add((value.rows, value.stacks))
            is_read = value.rows == rows_of(tensor) or reads_rows(tensor, value.rows)
            are_whole = are_whole and is_read and tensor.shape[-1:] == result.shape[-1:]
    if are_whole and found:
        return rows_of(result), 1
    if len(found) != 1 or call.name in MIXING:
        return 0, 1
    [(rows, stacks)] = found
    are_there = has_rows(result, rows) or has_rows(result, rows * stacks)
    return (rows, stacks) if are_there else (0, 1)


def reads_rows(tensor: Tensor, rows: int) -> bool:
    """True if each row of a view is one of the rows of which its storage has so many."""
    if not rows or tensor.ndim < 2:
        return False
    width = tensor.untyped_storage().nbytes() // tensor.element_size() // rows
    steps = (tensor.storage_offset(), *tensor.stride()[:-1])
    is_whole = tensor.shape[-1] == width and tensor.stride(-1) == 1
    return is_whole and not any(step % width for step in steps)
