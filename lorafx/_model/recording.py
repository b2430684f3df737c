"""Runs a model once, and records which linear calls reach which others, and how.

Every operator of ATen is seen, whoever calls it: graphs, Python, or torch's own layers.
"""

import contextlib
import dataclasses
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from .._kernels.private import TorchDispatchMode, storage_key, tree_iter, writes
from .flow import Attention, Flow, Logits, Scores, Value, attention_of, union
from .operator_calls import (
    OPERATOR, OperatorCall, carries, elements, has_storage, logits_of, matrices_beside, moved,
    reads_rows, rows_in, rows_of, written
)


# Products of matrices: {operator: the places of the two among its arguments}.
PRODUCTS = {
    "mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2), "mv": (0, 1), "addmv": (1, 2),
    "matmul": (0, 1), "linear": (0, 1), "_grouped_mm": (0, 1), "_scaled_mm": (0, 1), "dot": (0, 1),
}
SOFTMAXES = frozenset({"_softmax", "_safe_softmax", "softmax"})
SELECTIONS = frozenset({"topk", "sort", "argsort", "argmax", "multinomial"})
SUMS = frozenset({"add", "index_add", "scatter_add", "addcmul"})
# Of their operands' shapes alone.
FACTORIES = frozenset("""
    zeros_like ones_like empty_like full_like rand_like randn_like
    new_zeros new_ones new_empty new_empty_strided new_full
""".split())
LOOKUPS = frozenset({"embedding", "_embedding_bag"})


class UnpackedAttention(TorchFunctionMode):
    """Lets torch's attention multiply by the blocks of a packed weight one by one.

    So each block's product can be told from the others.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is not F.multi_head_attention_forward:
            return func(*args, **(kwargs or {}))
        given = inspect.signature(func).bind(*args, **(kwargs or {})).arguments
        if not given.get("use_separate_proj_weight"):
            names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            given.update(zip(names, given["in_proj_weight"].chunk(3)))
            given.update(in_proj_weight=None, use_separate_proj_weight=True)
        return func(**given)


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives each storage a `Value`, and notes in `flow` what ran.

    Tensors that were computed from constants alone have none. What operators of a higher order
    compute within is not seen: they give attention (flex_attention), or are an error.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flow = Flow()
        # by the storage's key, with a reference that keeps the key from being used again
        self._values: dict[int, tuple[StorageWeakRef, Value]] = {}
        self._weights: dict[int, list[tuple[range, str]]] = {}  # sites, by storage and place in it

    def weight(self, tensor: Tensor, site: str, rows: tuple[int, int] | None = None) -> None:
        """Make known the tensor of a site, of which it may be some rows."""
        part = tensor if rows is None else tensor.narrow(0, *rows)
        known = self._weights.setdefault(storage_key(tensor.untyped_storage()), [])
        known.append((elements(part), site))

    def input(self, tensor: Tensor) -> None:
        """Make known a tensor given to the model."""
        if carries(tensor):
            self._set(tensor, Value(self.flow.bit()))

    def layer(self, site: str, read: Tensor, result: Tensor) -> None:
        """Note the linear call that a layer makes by itself."""
        value, rows = self._of(read) or Value(), rows_of(read)
        self._set(result, self._linear_call(frozenset({site}), read, value, rows))

    def returned(self, result: Any) -> None:
        """Note what the model returned."""
        for tensor in tensors_in(result):
            value = self._of(tensor)
            if value is not None and value.logits is Logits.YES:
                self.flow.logits |= value.sources

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [tensor for tensor in tree_iter((args, kwargs)) if isinstance(tensor, Tensor)]
        values = [self._of(tensor) for tensor in given]
        results = [tensor for tensor in tree_iter(result) if isinstance(tensor, Tensor)]
        is_plain = isinstance(func, OPERATOR)
        name = func._schema.name.rpartition("::")[2] if is_plain else func.__name__
        writing = writes(func)
        name = name.removesuffix("_") if writing else name
        if name in FACTORIES or not any(values) and name not in LOOKUPS:
            return result
        call = OperatorCall(name, func, args, kwargs, given, values)
        if not is_plain and call.attention_operands() is None:
            raise NotImplementedError(f"roles are not followed into torch's operator {name}")
        known = {storage_key(tensor.untyped_storage()) for tensor in given if has_storage(tensor)}
        for tensor in results:
            if not carries(tensor):
                continue
            if storage_key(tensor.untyped_storage()) not in known:
                self._set(tensor, self._value(call, tensor))
            elif writing and tensor is result:
                old, new = self._of(tensor), self._value(call, tensor)
                self._set(tensor, written(old, new))
        return result

    def _value(self, call: OperatorCall, result: Tensor) -> Value:
        """The value of what an operator computed; what that says of the flow is noted."""
        operands = call.attention_operands()
        if operands is not None:
            query, key, value = (self._of(tensor) or Value() for tensor in operands)
            return self.flow.attention(Attention(query.sources, key.sources, value.sources))
        if call.name in PRODUCTS:
            left, right = call.operands(PRODUCTS[call.name])
            return self._product(left, right, result)
        if call.name in LOOKUPS:
            return Value(self.flow.bit())
        if call.name in SOFTMAXES:
            return self._softmax(call, result)
        values = [value for value in call.values if value is not None]
        if all(value.weights for value in values):
            return self._weight(call, values)
        values = [value for value in values if not value.weights]
        made = union(values)
        if call.name in SELECTIONS:
            self.flow.selecting |= made.sources
        if call.name in SUMS and len(values) > 1:
            self.flow.sums.append((values[0].sources, values[-1].sources))
        rows, stacks = rows_in(call, result)
        return dataclasses.replace(
            made, rows=rows, stacks=stacks, scores=moved(call, made.scores, result),
            logits=logits_of(call, values))

    def _weight(self, call: OperatorCall, values: Sequence[Value]) -> Value:
        """The value of what is computed from weights alone."""
        sites = frozenset[str]().union(*(value.weights for value in values))
        if call.name in ("index", "index_select") and call.given[0].ndim < 3:
            return Value(self.flow.bit())  # rows looked up in a table
        return Value(weights=sites)

    def _product(self, left: Tensor, right: Tensor, result: Tensor) -> Value:
        """The value of left @ right: of a linear call, an attention, scores, or what else it is."""
        a, b = self._of(left) or Value(), self._of(right) or Value()
        if a.weights and b.weights:
            return Value(weights=a.weights | b.weights)
        if a.weights or b.weights:
            weight, read, axis = (left, right, -2) if a.weights else (right, left, -1)
            stacks = matrices_beside(read, weight)
            rows = read.numel() // max(read.shape[axis] * stacks, 1) if read.ndim > 1 else 1
            return self._linear_call(
                a.weights | b.weights, read, b if a.weights else a, rows, stacks)
        made = dataclasses.replace(union([a, b]), scores=())
        if not a.sources or not b.sources:
            return made
        in_a, in_b = _weights(a), _weights(b)
        if in_a and not in_b:
            return self.flow.attention(attention_of(in_a, _stride(left, -1), b.sources))
        if in_b and not in_a:
            contracted = _stride(right, -2 if right.ndim > 1 else -1)
            return self.flow.attention(attention_of(in_b, contracted, a.sources))
        self.flow.multiplied |= made.sources
        if in_a:
            both = [dataclasses.replace(scores, row_stride=None, column_stride=None)
                    for scores in (*in_a, *in_b)]
            return dataclasses.replace(made, scores=tuple(both))
        column = result.stride(-1) if right.ndim > 1 else None
        row = result.stride(-1 if column is None else -2) if left.ndim > 1 else None
        return dataclasses.replace(made, scores=(Scores(a.sources, b.sources, row, column),))

    def _linear_call(
        self, sites: frozenset[str], read: Tensor, value: Value, rows: int, stacks: int = 1
    ) -> Value:
        """The value of what these sites make of so many rows of a tensor of this value."""
        is_row_wise = rows == value.rows != 0 or reads_rows(read, value.rows)
        return self.flow.linear_call(sites, value, is_row_wise, rows, stacks)

    def _softmax(self, call: OperatorCall, result: Tensor) -> Value:
        """The value of a softmax: weights of an attention, or a choice between other things."""
        operand, value = call.given[0], call.values[0] or Value()
        if not value.scores:
            self.flow.weighing |= value.sources
        stride = _stride(operand, call.args[1])
        weights = [dataclasses.replace(scores, softmax=scores.axis(stride))
                   for scores in value.scores]
        made = dataclasses.replace(call, values=[dataclasses.replace(value, scores=tuple(weights))])
        return Value(value.sources, scores=moved(made, weights, result), logits=value.logits)

    def _of(self, tensor: Tensor) -> Value | None:
        if not has_storage(tensor):
            return None
        key = storage_key(tensor.untyped_storage())
        if key in self._weights:
            here = elements(tensor)
            sites = frozenset(
                site for part, site in self._weights[key]
                if max(part.start, here.start) < min(part.stop, here.stop))
            return Value(weights=sites) if sites else None
        found = self._values.get(key)
        return None if found is None else found[1]

    def _set(self, tensor: Tensor, value: Value) -> None:
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        self._values[storage_key(storage)] = reference, value


def tensors_in(result: Any) -> Iterator[Tensor]:
    """The tensors in what a model returns: in containers, dataclasses and outputs like these."""
    if isinstance(result, Tensor):
        yield result
        return
    if dataclasses.is_dataclass(result):
        result = vars(result)
    if isinstance(result, Mapping):
        result = list(result.values())
    if isinstance(result, (list, tuple)):
        for item in result:
            yield from tensors_in(item)


def _weights(value: Value) -> list[Scores]:
    """The scores in a value of which a softmax was taken."""
    return [scores for scores in value.scores if scores.softmax is not None]


def _stride(tensor: Tensor, dim: int) -> int | None:
    """The stride of an axis; None of one of a single element, which has no telling one."""
    return tensor.stride(dim) if tensor.ndim and tensor.shape[dim] > 1 else None


@contextlib.contextmanager
def recording() -> Iterator[Recorder]:
    """A recorder of all that runs in this context, without gradients, and without compiling."""
    recorder, eager = Recorder(), torch.compiler.set_stance("force_eager")
    with warnings.catch_warnings(), torch.no_grad(), eager, UnpackedAttention(), recorder:
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        yield recorder
