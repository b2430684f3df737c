"""What Python reads of an adapted weight: W + sum s B A, as a tensor that multiplies by its parts.

A branch lives in a graph, beside the linear call that uses its weight. Python that no graph holds
reads the weight itself, `layer.weight`, and must see the adapter too. It gets an `AdaptedWeight`:
products with it, its transposes and its rows are computed in parts, x W^T + s (x A^T) B^T, which no
dtype rounds away; whatever else is done with it, is done with the sum.
"""

import functools
import operator
import types
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .._errors import AdaptedWeightError
from .._graph.rules import RULES, Rule
from .._kernels.addend import Addend
from .._kernels.compiling import not_compiled
from .._kernels.private import grouped_mm, tree_iter, tree_map, wrapper_subclass, writes
from .._kernels.weights import rows_of, whole
from .quantised_tensors import dense
from .readers import Answer, answer, reader
from .sums import SPREADING_IS_LOST, WRITING_IS_LOST, plainly
from .torch_functions import Args, Kwargs, functions_named, without_override, writes_in_place


NARROW = (torch.float16, torch.bfloat16)


class AdaptedWeight(Tensor):
    """W + sum s L R, not computed: `matrix` is W, and `label` what to call it in errors."""

    matrix: Tensor
    addends: tuple[Addend, ...]
    label: str

    @staticmethod
    def of(matrix: Tensor, addends: Sequence[Addend], label: str) -> Tensor:
        """The tensor, differentiable in W and the factors."""
        factors = [factor for addend in addends for factor in addend[:2]]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (matrix, *factors)):
            made: Tensor = _MakeAdaptedWeight.apply(  # type: ignore[no-untyped-call]
                matrix, (tuple(addends), label), *factors)
            return made
        return _wrapped(matrix, tuple(addends), label)

    def of_same(self, matrix: Tensor, addends: Sequence[Addend]) -> Tensor:
        """A part, a transpose or a cast of this tensor."""
        return AdaptedWeight.of(matrix, addends, self.label)

    def whole(self) -> Tensor:
        """The sum; refused if it would round the adapter away."""
        if self.matrix.dtype in NARROW and not all(addend.rounding for addend in self.addends):
            raise AdaptedWeightError(
                f"Python needs {self.label} as a whole, but rounding W + s B A to "
                f"{self.matrix.dtype} would lose most of a small adapter: cast the model to "
                "float32, exclude this site, or accept it with rounding=True.")
        if any(addend.dropout for addend in self.addends):
            raise AdaptedWeightError(
                f"Python needs {self.label} as a whole, where there is no input of which an "
                "adapter could drop elements: exclude this site, or inject with dropout=0.")
        return whole(dense(self.matrix), self.addends)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.whole().detach().clone()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"AdaptedWeight({self.label}, shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    @not_compiled
    def __torch_function__(cls, func: Any, types_: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], cls) and writes_in_place(func):
            args[0]._refuse_writing()
        if func in _FLAG:
            return args[0].matrix.requires_grad  # as the base's Python would see it
        if func in _SPREADING and answer() is Answer.LAYER:  # by distribute_tensor
            raise AdaptedWeightError(SPREADING_IS_LOST.format(args[0].label.capitalize()))
        if func is Tensor.data_ptr:
            raise AdaptedWeightError(
                f"A kernel asks for the memory of {args[0].label}, but it is adapted, and "
                "W + s B A is nowhere in memory: exclude this site.")
        in_python = without_override(func)
        if in_python is not None:
            return in_python(*args, **kwargs)
        if func in _SAME and args and isinstance(args[0], cls):
            return _SAME[func](args[0], func, args[1:], kwargs)
        if func in _PRODUCTS:
            result = _PRODUCTS[func](func, args, kwargs)
            if result is not None:
                return result
        if func in _GRADIENT and _is_registering(reader()):
            raise AdaptedWeightError(
                f"{args[0].label.capitalize()} is adapted, so that what Python reads of it cannot "
                "be another module's Parameter: tie weights before lorafx.inject.")
        return plainly(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types_: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """What reaches an operator gets the sum, or W if only W's shape matters."""
        name = func.overloadpacket.__name__
        if writes(func):
            for value in tree_iter((args[:1], kwargs)):
                if isinstance(value, cls):
                    value._refuse_writing()
        if name in ("detach", "alias"):
            return _wrapped(args[0].matrix, args[0].addends, args[0].label)
        only_shape = name.startswith("new_") or name.endswith("_like")

        def plain(value: Any) -> Any:
            if not isinstance(value, cls):
                return value
            return value.matrix if only_shape else value.whole()

        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))

    def _refuse_writing(self) -> NoReturn:
        raise AdaptedWeightError(WRITING_IS_LOST.format(self.label))


def _is_registering(frame: types.FrameType | None) -> bool:
    """True if this is the frame in which nn.Module registers a Parameter."""
    return frame is not None and frame.f_code is nn.Module.register_parameter.__code__


def _wrapped(matrix: Tensor, addends: tuple[Addend, ...], label: str) -> AdaptedWeight:
    made: AdaptedWeight = wrapper_subclass(
        AdaptedWeight, matrix.shape, strides=matrix.stride(), dtype=matrix.dtype,
        device=matrix.device)
    made.__dict__.update(getattr(matrix, "__dict__", {}))  # what users attach to a Parameter
    made.matrix, made.addends, made.label = matrix, addends, label
    made._is_param = True  # isinstance(layer.weight, nn.Parameter), as ever
    return made


class _MakeAdaptedWeight(torch.autograd.Function):
    """(W, L, R, L, R, ...) -> AdaptedWeight; its backward pass is that of the sum."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, about: Any, *factors: Tensor) -> Tensor:
        ctx.addends = about[0]
        ctx.save_for_backward(*factors)
        return _wrapped(matrix, *about)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        factors, gradients = iter(ctx.saved_tensors), list[Tensor]()
        for addend in ctx.addends:
            addend = addend._replace(left=next(factors), right=next(factors))
            gradients += addend.gradients(gradient)
        return gradient if ctx.needs_input_grad[0] else None, None, *gradients


# What gives the same matrix in another place, dtype or order, or some of its rows: {function: how}.
_Same = Callable[[AdaptedWeight, Any, Args, Kwargs], Any]


def _cast(weight: AdaptedWeight, func: Any, args: Args, kwargs: Kwargs) -> Any:
    return weight.of_same(func(weight.matrix, *args, **kwargs), weight.addends)


def _detached(weight: AdaptedWeight, func: Any, args: Args, kwargs: Kwargs) -> Any:
    return weight.of_same(weight.matrix.detach(), [a.detached for a in weight.addends])


def _transposed(weight: AdaptedWeight, func: Any, args: Args, kwargs: Kwargs) -> Any:
    matrix = func(weight.matrix, *args, **kwargs)
    if matrix.shape == weight.matrix.mT.shape and matrix.stride() == weight.matrix.mT.stride():
        return weight.of_same(matrix, [a.transposed for a in weight.addends])
    if matrix.shape == weight.matrix.shape and matrix.stride() == weight.matrix.stride():
        return weight
    return _on_sum(weight, func, args, kwargs)


def _items(weight: AdaptedWeight, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Some matrices of a stack (..., m, n), or the rows of one that a slice takes."""
    plain = isinstance(args[0], (int, slice, list)) or isinstance(args[0], Tensor) and (
        args[0].ndim < 2 and (args[0].dtype != torch.bool or args[0].ndim == 1))
    if weight.ndim > 2 and plain:
        addends = [addend.of_stack(args[0]) for addend in weight.addends]
        return weight.of_same(weight.matrix[args[0]], addends)
    if isinstance(args[0], slice) and args[0].step in (None, 1):
        start, stop, _ = args[0].indices(weight.shape[0])
        return _rows(weight, start, max(stop - start, 0))
    return _on_sum(weight, func, args, kwargs)


def _pieces(weight: AdaptedWeight, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """chunk and split by rows."""
    lengths = [piece.shape[0] for piece in func(weight.matrix, *args, **kwargs)]
    dim = kwargs.get("dim", args[1] if args[1:] else 0)
    if weight.ndim != 2 or dim not in (0, -2):
        return _on_sum(weight, func, args, kwargs)
    return tuple(_rows(weight, sum(lengths[:i]), length) for i, length in enumerate(lengths))


def _rows(weight: AdaptedWeight, start: int, length: int) -> Tensor:
    """The rows [start, start + length) of one matrix."""
    addends = rows_of(weight.addends, start, length)
    return weight.of_same(weight.matrix.narrow(0, start, length), addends)


def _on_sum(weight: AdaptedWeight, func: Any, args: Args, kwargs: Kwargs) -> Any:
    return plainly(func, (weight, *args), kwargs)


_SAME: dict[Any, _Same] = {}
for _names, _same in (
    ("to float double half bfloat16 type type_as contiguous clone cuda cpu", _cast),
    ("detach data", _detached),
    ("T mT t transpose swapaxes permute", _transposed),
    ("__getitem__", _items),
    ("chunk split split_with_sizes", _pieces),
):
    _SAME |= dict.fromkeys(functions_named(*_names.split()), _same)
_FLAG = functions_named("requires_grad")
_GRADIENT = functions_named("grad_fn")
_SPREADING = functions_named("is_leaf", "detach")


def _by_rule(rule: Rule, func: Any, args: Args, kwargs: Kwargs) -> Any:
    x, weight = rule.operands(args, kwargs)
    if isinstance(weight, AdaptedWeight) and _is_unadapted(x):
        y = _with_matrix(weight, func, args, kwargs)
        for addend in weight.addends:
            y = (addend if rule.transposed else addend.transposed).add_right_product(y, x)
        return y
    if isinstance(x, AdaptedWeight) and type(weight) is Tensor and weight.ndim > 1:
        if rule.transposed:
            y = _with_matrix(x, func, args, kwargs)
            for addend in x.addends:
                y = addend.add_left_product(y, weight)
            return y
    return None


def _is_unadapted(x: Any) -> bool:
    return isinstance(x, Tensor) and not isinstance(x, AdaptedWeight)


def _with_matrix(weight: AdaptedWeight, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """The same call with W in the place of this W + sum s L R, which may not be the only one."""
    args, kwargs = tree_map(lambda v: weight.matrix if v is weight else v, (args, kwargs))
    return func(*args, **kwargs)


def _grouped(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """x M for groups of rows of x, each with its own matrix.

    The kernel wants ranks that are multiples of 16 bytes.
    """
    x, weight = (*args, None, None)[:2]
    if not isinstance(weight, AdaptedWeight) or not _is_unadapted(x):
        return None
    more = {name: kwargs[name] for name in kwargs if name in ("offs", "out_dtype")}

    def multiply(x: Tensor, matrix: Tensor) -> Tensor:
        return func(x, matrix, *args[2:], **more)  # type: ignore[no-any-return]

    y = _with_matrix(weight, func, args, kwargs)
    for addend in weight.addends:
        y = addend.with_rank_multiple_of(8).add_right_product(y, x, multiply)
    return y


def _lookup(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Rows of a matrix by their numbers: W[i] + s L[i] R."""
    given = (*args, None, None, -1, False, False)[:5] if len(args) < 3 else args
    weight, indices, padding, scaled, sparse = given
    if kwargs or not isinstance(weight, AdaptedWeight) or padding >= 0 or scaled or sparse:
        return None  # the gradient has rules of its own

    def choose(matrix: Tensor) -> Tensor:
        return func(matrix, indices, *args[2:], **kwargs)  # type: ignore[no-any-return]

    rows = choose(weight.matrix)
    for addend in weight.addends:
        if addend.size != weight.shape[addend.axis]:
            return None
        rows = addend.add_to_chosen_rows(rows, choose)
    return rows


def _called(target: Any) -> Any:
    """What a rule's target calls __torch_function__ as."""
    if isinstance(target, str):
        return getattr(Tensor, target)
    return Tensor.__matmul__ if target is operator.matmul else target


_Product = Callable[[Any, Args, Kwargs], Any]
_PRODUCTS: dict[Any, _Product] = {grouped_mm: _grouped, torch.embedding: _lookup}
for _rule in RULES.values():
    _PRODUCTS[_called(_rule.target)] = functools.partial(_by_rule, _rule)
