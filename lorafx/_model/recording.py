"""Runs a model once, and records which linear calls reach which others, and how.

Every operator of ATen is seen, whoever calls it: graphs, Python, or torch's own layers.
"""

import contextlib
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .._kernels.private import TorchDispatchMode, storage_key, writes
from .flow import Attention, Flow, Logits, Scores, Value, Weighting, attention_of, union


# Products of matrices: {operator: the places of the two among its arguments}.
PRODUCTS = {
    "mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2), "mv": (0, 1), "addmv": (1, 2),
    "matmul": (0, 1), "linear": (0, 1), "_grouped_mm": (0, 1), "_scaled_mm": (0, 1), "dot": (0, 1),
}
SOFTMAXES = frozenset({"_softmax", "_safe_softmax", "softmax"})
SELECTIONS = frozenset({"topk", "sort", "argsort", "argmax", "multinomial"})
SUMS = frozenset({"add", "index_add", "scatter_add", "addcmul"})
# A row of their result may depend on many rows, even where its shape says nothing of that.
MIXING = frozenset({"convolution", "cumsum", "cumprod", "logcumsumexp", "roll", "flip"})
# What logits may go through and still be logits.
PASSING = frozenset("""
    add sub rsub mul div _to_copy clone copy index index_select gather cat stack where masked_fill
    _softmax _log_softmax
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

    Tensors that were computed from constants alone have none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flow = Flow()
        # by the storage's key, with a reference that keeps the key from being used again
        self._values: dict[int, tuple[StorageWeakRef, Value]] = {}
        self._weights: dict[int, list[tuple[range, str]]] = {}  # sites, by storage and place in it

    def weight(self, tensor: Tensor, site: str, rows: tuple[int, int] | None = None) -> None:
        """Make known the tensor of a site, of which it may be some rows."""
        part = tensor if rows is None else tensor.narrow(0, *rows)
        known = self._weights.setdefault(storage_key(tensor.untyped_storage()), [])
        known.append((_elements(part), site))

    def input(self, tensor: Tensor) -> None:
        """Make known a tensor given to the model."""
        if _carries(tensor):
            self._set(tensor, Value(self.flow.bit()))

    def layer(self, site: str, read: Tensor, result: Tensor) -> None:
        """Note the linear call that a layer makes by itself."""
        value = self._of(read) or Value()
        self._set(result, self.flow.linear_call(
            frozenset({site}), value, _rows(read), _rows(result)))

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
        given = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        values = [self._of(tensor) for tensor in given]
        results = [tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
        name = func._schema.name.rpartition("::")[2]
        writing = writes(func)
        name = name.removesuffix("_") if writing else name
        if not any(values) and name not in LOOKUPS:
            return result
        call = _Call(name, func, args, kwargs, given, values)
        known = {storage_key(tensor.untyped_storage()) for tensor in given if _has_storage(tensor)}
        for tensor in results:
            if not _carries(tensor):
                continue
            if storage_key(tensor.untyped_storage()) not in known:
                self._set(tensor, self._value(call, tensor))
            elif writing and tensor is result:
                old, new = self._of(tensor), self._value(call, tensor)
                self._set(tensor, _written(old, new))
        return result

    def _value(self, call: "_Call", result: Tensor) -> Value:
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
            self.flow.sums.add((values[0].sources, values[-1].sources))
        rows = {value.rows for value in values if value.sources}
        if len(rows) == 1 and call.name not in MIXING and _has_rows(result, min(rows)):
            made = dataclasses.replace(made, rows=min(rows))
        return dataclasses.replace(
            made, scores=_moved(call, made.scores, result), logits=_logits(call, values))

    def _weight(self, call: "_Call", values: Sequence[Value]) -> Value:
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
            weight, read = (left, right) if a.weights else (right, left)
            sites = (a if a.weights else b).weights
            value = b if a.weights else a
            return self.flow.linear_call(sites, value, _rows(read), _rows(result))
        made = dataclasses.replace(union([a, b]), scores=())
        if not a.sources or not b.sources:
            return made
        if bool(a.weightings) != bool(b.weightings):
            weights, value = (a, b) if a.weightings else (b, a)
            return self.flow.attention(attention_of(weights.weightings, value))
        self.flow.multiplied |= made.sources
        if a.weightings:
            return made
        has_columns = right.ndim > 1
        row_stride = result.stride(-2 if has_columns else -1) if result.ndim > has_columns else None
        scores = Scores(
            a.sources, b.sources, row_stride, result.stride(-1) if has_columns else None)
        return dataclasses.replace(made, scores=(scores,))

    def _softmax(self, call: "_Call", result: Tensor) -> Value:
        scores = call.given[0]
        value = call.values[0] or Value()
        dim = call.args[1] % max(scores.ndim, 1)
        stride = scores.stride(dim) if scores.ndim and scores.shape[dim] > 1 else None
        weightings: list[Weighting] = []
        for product in value.scores:
            both = {product.row_stride, product.column_stride}
            if stride is None or stride not in both or len(both) == 1:
                weightings.append(Weighting(0, 0, product.left | product.right))
            elif stride == product.column_stride:
                weightings.append(Weighting(product.left, product.right))
            else:
                weightings.append(Weighting(product.right, product.left))
        if not weightings:
            self.flow.weighing |= value.sources
        logits = value.logits
        return Value(value.sources, weightings=tuple(weightings), logits=logits)

    def _of(self, tensor: Tensor) -> Value | None:
        if not _has_storage(tensor):
            return None
        key = storage_key(tensor.untyped_storage())
        if key in self._weights:
            here = _elements(tensor)
            sites = frozenset(
                site for part, site in self._weights[key]
                if max(part.start, here.start) < min(part.stop, here.stop))
            return Value(weights=sites) if sites else None
        found = self._values.get(key)
        return None if found is None else found[1]

    def _set(self, tensor: Tensor, value: Value) -> None:
        storage = tensor.untyped_storage()
        self._values[storage_key(storage)] = StorageWeakRef(storage), value


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of an operator, and the values of the tensors among its arguments."""

    name: str
    func: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    given: Sequence[Tensor]
    values: Sequence[Value | None]

    @functools.cached_property
    def _named(self) -> dict[str, Any]:
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


def _moved(call: _Call, scores: Iterable[Scores], result: Tensor) -> tuple[Scores, ...]:
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
    if len(found) != 1 or result.ndim < -found[0]:
        return None
    return result.stride(found[0])


def _logits(call: _Call, values: Sequence[Value]) -> Logits:
    """What a result is where these are its operands that are no constants."""
    least = min((value.logits for value in values), default=Logits.NO)
    if call.name == "tanh":
        return Logits.BOUNDED if least is Logits.YES else Logits.NO
    if call.name not in PASSING:
        return Logits.NO
    return Logits.YES if least is Logits.BOUNDED and call.name == "mul" else least


def _written(old: Value | None, new: Value) -> Value:
    """The value of a tensor, part of which may have been written anew."""
    if old is None:
        return new
    both = union([old, new])
    rows = new.rows if old.rows in (0, new.rows) and old.sources | new.sources else 0
    return dataclasses.replace(both, rows=rows, logits=min(old.logits, new.logits))


def _has_storage(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided


def _carries(tensor: Tensor) -> bool:
    """True if a tensor has numbers that a layer may have computed: no indices, no masks."""
    return _has_storage(tensor) and (tensor.is_floating_point() or tensor.is_complex())


def _elements(tensor: Tensor) -> range:
    """The places in its storage over which a tensor extends."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    first = tensor.storage_offset()
    return range(first, first + last + 1 if tensor.numel() else first)


def _rows(tensor: Tensor) -> int:
    return math.prod(tensor.shape[:-1])


def _has_rows(tensor: Tensor, rows: int) -> bool:
    """True if the first dimensions of a tensor are so many rows."""
    product = 1
    for size in tensor.shape:
        product *= size
        if product == rows:
            return True
    return product == rows


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


@contextlib.contextmanager
def recording() -> Iterator[Recorder]:
    """A recorder of all that runs in this context, without gradients."""
    recorder = Recorder()
    with torch.no_grad(), UnpackedAttention(), recorder:
        yield recorder
