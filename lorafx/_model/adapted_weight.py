"""What Python reads of an adapted weight: W + sum s B A, as a tensor that multiplies by its parts.

A branch lives in a graph, beside the linear call that uses its weight. Python that no graph holds reads the weight
itself, `layer.weight`, and must see the adapter too. It gets an `AdaptedWeight`: products with it, its transposes and
its rows are computed in parts, x W^T + s (x A^T) B^T, which no dtype rounds away; whatever else is done with it, is
done with the sum.
"""

import functools
import operator
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map

from .._errors import AdaptedWeightError
from .._graph.rules import RULES, Rule
from .._kernels.weights import Part, dropped, padded, rows_of, whole


NARROW = (torch.float16, torch.bfloat16)


class AdaptedWeight(Tensor):
    """W + sum s L R without being computed: `matrix` is W, `parts` the addends, `label` what to call it in errors."""

    matrix: Tensor
    parts: tuple[Part, ...]
    label: str

    @staticmethod
    def of(matrix: Tensor, parts: Sequence[Part], label: str) -> Tensor:
        """The tensor, differentiable in its parts."""
        factors = [factor for part in parts for factor in part[:2]]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (matrix, *factors)):
            made: Tensor = _Join.apply(matrix, (tuple(parts), label), *factors)  # type: ignore[no-untyped-call]
            return made
        return _wrapped(matrix, tuple(parts), label)

    def of_same(self, matrix: Tensor, parts: Sequence[Part]) -> Tensor:
        """A part, a transpose or a cast of this tensor."""
        return AdaptedWeight.of(matrix, parts, self.label)

    def whole(self) -> Tensor:
        """The sum; refused if it would round the adapter away."""
        if self.matrix.dtype in NARROW and not all(part.rounding for part in self.parts):
            raise AdaptedWeightError(
                f"Python needs {self.label} as a whole, but rounding W + s B A to {self.matrix.dtype} would lose most "
                "of a small adapter: cast the model to float32, exclude this site, or accept it with rounding=True.")
        if any(part.dropout for part in self.parts):
            raise AdaptedWeightError(
                f"Python needs {self.label} as a whole, where there is no input of which an adapter could drop "
                "elements: exclude this site, or inject with dropout=0.")
        return whole(self.matrix, self.parts)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.whole().detach().clone()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"AdaptedWeight({self.label}, shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types_: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], cls) and _writes(func):
            args[0]._refuse_writing()
        if func in _FLAG:
            return args[0].matrix.requires_grad  # as the base's Python would see it
        if func is Tensor.data_ptr:
            raise AdaptedWeightError(f"A kernel asks for the memory of {args[0].label}, but it is adapted, and "
                                     "W + s B A is nowhere in memory: exclude this site.")
        if isinstance(func, types.FunctionType) and (names := _asking(func)):
            return _without_asking(func, names)(*args, **kwargs)
        if func in _SAME and args and isinstance(args[0], cls):
            return _SAME[func](args[0], func, args[1:], kwargs)
        if func in _PRODUCTS:
            result = _PRODUCTS[func](func, args, kwargs)
            if result is not None:
                return result
        if func in _GRADIENT and sys._getframe(1).f_code is nn.Module.register_parameter.__code__:
            raise AdaptedWeightError(f"{args[0].label.capitalize()} is adapted, so that what Python reads of it cannot "
                                     "be another module's Parameter: tie weights before lorafx.inject.")
        return _plainly(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types_: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """What reaches an operator has not been computed in parts: it gets the sum, or W if only W's shape matters."""
        name = func.overloadpacket.__name__
        for value in tree_iter((args[:1], kwargs)) if func._schema.is_mutable else ():
            if isinstance(value, cls):
                value._refuse_writing()
        if name in ("detach", "alias"):
            return _wrapped(args[0].matrix, args[0].parts, args[0].label)
        only_shape = name.startswith("new_") or name.endswith("_like")

        def plain(value: Any) -> Any:
            return (value.matrix if only_shape else value.whole()) if isinstance(value, cls) else value

        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))

    def _refuse_writing(self) -> NoReturn:
        raise AdaptedWeightError(_WRITING_IS_LOST.format(self.label))


_WRITING_IS_LOST = (
    "Something writes into {}, which is adapted: what Python reads of it is W + s B A, and what is written there would "
    "be lost. Write into W, `frozen_...` of the same module, load a state_dict, or do it before lorafx.inject.")


class SumView(Tensor):
    """A view of the sum W + sum s L R, into which nothing may be written: it is a temporary."""

    @classmethod
    def __torch_function__(cls, func: Any, types_: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (args and isinstance(args[0], cls) and _writes(func)) or isinstance((kwargs or {}).get("out"), cls):
            raise AdaptedWeightError(_WRITING_IS_LOST.format("a view of a weight"))
        return _plainly(func, args, kwargs or {})


def _plainly(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call as on plain tensors; what it returns is one, but a view remains unwritable."""
    with torch._C.DisableTorchFunctionSubclass():
        result = func(*args, **kwargs)
        if type(result) in (Tensor, SumView) and result._is_view():
            return result.as_subclass(SumView)
    return result


def _wrapped(matrix: Tensor, parts: tuple[Part, ...], label: str) -> AdaptedWeight:
    made: AdaptedWeight = torch.Tensor._make_wrapper_subclass(
        AdaptedWeight, matrix.shape, strides=matrix.stride(), dtype=matrix.dtype, device=matrix.device)
    made.__dict__.update(getattr(matrix, "__dict__", {}))  # what users attach to a Parameter
    made.matrix, made.parts, made.label = matrix, parts, label
    made._is_param = True  # isinstance(layer.weight, nn.Parameter), as ever
    return made


class _Join(torch.autograd.Function):
    """(W, the parts' factors) -> AdaptedWeight; the backward pass is that of the sum, for uses that need all of it."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, about: Any, *factors: Tensor) -> Tensor:
        ctx.parts = about[0]
        ctx.save_for_backward(*factors)
        return _wrapped(matrix, *about)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        factors, gradients = ctx.saved_tensors, []
        for i, part in enumerate(ctx.parts):
            left, right = factors[2 * i], factors[2 * i + 1]
            block = gradient.narrow(part.axis, part.start, part.size).to(left.dtype)
            gradients += [part.scale * (block @ right.mT), part.scale * (left.mT @ block)]
        return gradient if ctx.needs_input_grad[0] else None, None, *gradients


def _writes(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name in _WRITING or name.endswith("_") and not name.endswith("__")


_WRITING = frozenset("""__set__ __setitem__ __delitem__ __iadd__ __isub__ __imul__ __itruediv__ __ifloordiv__ __imod__
    __ipow__ __iand__ __ior__ __ixor__ __ilshift__ __irshift__""".split())


def _asking(function: types.FunctionType) -> list[str]:
    """The names by which a Python function of torch asks whether an argument overrides it."""
    return [name for name in function.__code__.co_names if name.startswith("has_torch_function")
            and name in function.__globals__ and "__class__" not in function.__code__.co_freevars]


def _without_asking(function: types.FunctionType, names: list[str]) -> types.FunctionType:
    """The function as it runs on plain tensors, so that what it calls meets this class one by one."""
    twin = types.FunctionType(function.__code__, {**function.__globals__, **dict.fromkeys(names, _no)},
                              function.__name__, function.__defaults__, function.__closure__)
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


def _no(*_: Any) -> bool:
    return False


# What gives the same matrix in another place, dtype or order, or some of its rows: {function: how}.
_Same = Callable[[AdaptedWeight, Any, tuple[Any, ...], dict[str, Any]], Any]


def _cast(weight: AdaptedWeight, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return weight.of_same(func(weight.matrix, *args, **kwargs), weight.parts)


def _detached(weight: AdaptedWeight, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return weight.of_same(weight.matrix.detach(), [part.detached for part in weight.parts])


def _transposed(weight: AdaptedWeight, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    matrix = func(weight.matrix, *args, **kwargs)
    if matrix.shape == weight.matrix.mT.shape and matrix.stride() == weight.matrix.mT.stride():
        return weight.of_same(matrix, [part.transposed for part in weight.parts])
    if matrix.shape == weight.matrix.shape and matrix.stride() == weight.matrix.stride():
        return weight
    return _on_sum(weight, func, args, kwargs)


def _items(weight: AdaptedWeight, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Some matrices of a stack (..., m, n), or the rows of one that a slice takes."""
    plain = isinstance(args[0], (int, slice, list)) or isinstance(args[0], Tensor) and (
        args[0].ndim < 2 and (args[0].dtype != torch.bool or args[0].ndim == 1))
    if weight.ndim > 2 and plain:
        parts = [part._replace(left=part.left[args[0]], right=part.right[args[0]]) for part in weight.parts]
        return weight.of_same(weight.matrix[args[0]], parts)
    if isinstance(args[0], slice) and args[0].step in (None, 1):
        start, stop, _ = args[0].indices(weight.shape[0])
        return _rows(weight, start, max(stop - start, 0))
    return _on_sum(weight, func, args, kwargs)


def _pieces(weight: AdaptedWeight, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """chunk and split by rows."""
    lengths = [piece.shape[0] for piece in func(weight.matrix, *args, **kwargs)]
    dim = kwargs.get("dim", args[1] if args[1:] else 0)
    if weight.ndim != 2 or dim not in (0, -2):
        return _on_sum(weight, func, args, kwargs)
    return tuple(_rows(weight, sum(lengths[:i]), length) for i, length in enumerate(lengths))


def _rows(weight: AdaptedWeight, start: int, length: int) -> Tensor:
    """The rows [start, start + length) of one matrix."""
    return weight.of_same(weight.matrix.narrow(0, start, length), rows_of(weight.parts, start, length))


def _on_sum(weight: AdaptedWeight, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _plainly(func, (weight, *args), kwargs)


def _named(*names: str) -> list[Any]:
    """These functions of torch and methods of Tensor, as they call __torch_function__."""
    found = [getattr(holder, name, None) for name in names for holder in (torch, Tensor)]
    return [getattr(value, "__get__") if isinstance(value, types.GetSetDescriptorType) else value
            for value in found if value is not None]


_SAME: dict[Any, _Same] = {
    **dict.fromkeys(_named(*"to float double half bfloat16 type type_as contiguous clone cuda cpu".split()), _cast),
    **dict.fromkeys(_named("detach", "data"), _detached),
    **dict.fromkeys(_named("T", "mT", "t", "transpose", "swapaxes", "permute"), _transposed),
    **dict.fromkeys(_named("__getitem__"), _items),
    **dict.fromkeys(_named("chunk", "split", "split_with_sizes"), _pieces),
}
_FLAG = _named("requires_grad")
_GRADIENT = _named("grad_fn")


def _right_product(
    y: Tensor, x: Tensor, parts: Sequence[Part], times: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """y = x M, plus the parts of M: y + sum s (x L) R; x (..., m), M (..., m, n). `times` is the product's way."""
    for part in parts:
        block = dropped(x.narrow(-1, part.start, part.size) if part.axis == -2 else x, part.dropout)
        h = times(block, part.left.to(x.device, x.dtype))
        added = times(h, part.right.to(x.device, h.dtype))
        y = torch.add(y, padded(added, -1, part.start, y.shape[-1]) if part.axis == -1 else added, alpha=part.scale)
    return y


def _left_product(y: Tensor, x: Tensor, parts: Sequence[Part]) -> Tensor:
    """y = M x, plus the parts of M: y + sum s L (R x); M (..., m, n), x (..., n, k)."""
    for part in parts:
        block = dropped(x.narrow(-2, part.start, part.size) if part.axis == -1 else x, part.dropout)
        h = part.right.to(x.device, x.dtype) @ block
        added = part.left.to(x.device, h.dtype) @ h
        y = torch.add(y, padded(added, -2, part.start, y.shape[-2]) if part.axis == -2 else added, alpha=part.scale)
    return y


def _by_rule(rule: Rule, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, weight = rule.operands(args, kwargs)
    if isinstance(weight, AdaptedWeight) and isinstance(x, Tensor) and not isinstance(x, AdaptedWeight):
        parts = weight.parts if rule.transposed else [part.transposed for part in weight.parts]
        return _right_product(_with_matrix(weight, func, args, kwargs), x, parts, torch.matmul)
    if isinstance(x, AdaptedWeight) and type(weight) is Tensor and weight.ndim > 1 and rule.transposed:
        return _left_product(_with_matrix(x, func, args, kwargs), weight, x.parts)
    return None


def _with_matrix(weight: AdaptedWeight, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The same call with W in the place of this W + sum s L R, which may not be the only one."""
    def matrix(value: Any) -> Any:
        return weight.matrix if value is weight else value

    return func(*tree_map(matrix, args), **tree_map(matrix, kwargs))


def _grouped(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """x M for groups of rows of x, each with its own matrix; the kernel wants ranks that are multiples of 16 bytes."""
    x, weight = (*args, None, None)[:2]
    if not isinstance(weight, AdaptedWeight) or not isinstance(x, Tensor) or isinstance(x, AdaptedWeight):
        return None
    more = {name: kwargs[name] for name in kwargs if name in ("offs", "out_dtype")}

    def even(part: Part) -> Part:
        missing = -part.left.shape[-1] % 8
        return part._replace(left=F.pad(part.left, (0, missing)), right=F.pad(part.right, (0, 0, 0, missing)))

    def times(x: Tensor, matrix: Tensor) -> Tensor:
        result: Tensor = func(x, matrix, *args[2:], **more)
        return result

    return _right_product(_with_matrix(weight, func, args, kwargs), x, [even(part) for part in weight.parts], times)


def _lookup(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Rows of a matrix by their numbers: W[i] + s L[i] R."""
    weight, indices, padding, scaled, sparse = (*args, None, None, -1, False, False)[:5] if len(args) < 3 else args
    if kwargs or not isinstance(weight, AdaptedWeight) or padding >= 0 or scaled or sparse:
        return None  # the gradient has rules of its own
    rows = func(weight.matrix, indices, *args[2:], **kwargs)
    for part in weight.parts:
        if part.size != weight.shape[part.axis]:
            return None
        h = func(part.left.to(rows.dtype), indices, *args[2:], **kwargs)
        rows = torch.add(rows, h @ part.right.to(rows.dtype), alpha=part.scale)
    return rows


_Product = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
_METHODS = {operator.matmul: Tensor.__matmul__}
_PRODUCTS: dict[Any, _Product] = {
    **{getattr(Tensor, rule.target) if isinstance(rule.target, str) else _METHODS.get(rule.target, rule.target):
       functools.partial(_by_rule, rule) for rule in RULES.values()},
    torch._grouped_mm: _grouped,
    torch.embedding: _lookup,
}
