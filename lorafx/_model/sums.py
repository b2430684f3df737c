"""Temporaries that stand for a weight, the sum W + sum s L R or a cast: nobody writes into them."""

from typing import Any

from torch import Tensor

from .._errors import AdaptedWeightError
from .._kernels.compiling import not_compiled
from .._kernels.private import without_torch_function
from .torch_functions import Args, Kwargs, functions_named, writes_in_place

WRITING_IS_LOST = (
    "Something writes into {}, which is adapted: what Python reads of it is W + s B A, and what is "
    "written there would be lost. Write into W, `frozen_...` of the same module, load a "
    "state_dict, or do it before lorafx.inject.")
SPREADING_IS_LOST = (
    "{} is adapted, and is to be spread over processes, so that the base would hold W + s B A: use "
    "parallelize_module or distribute_module, spread `frozen_...` of the same module, or do it "
    "before lorafx.inject.")
CAST_IS_LOST = (
    "Something writes into a weight that an adapter trains in another dtype than the base's, or of "
    "which it trains some rows: what Python reads of it is a copy, and what is written there would "
    "be lost. "
    "Write into `<module>.trained.<adapter>.<name>`, which lorafx.named_parameters(model) has, or "
    "do it before lorafx.inject.")


class SumView(Tensor):
    """A view of the sum W + sum s L R, into which nothing may be written."""

    @classmethod
    @not_compiled
    def __torch_function__(cls, func: Any, types_: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _writes(cls, func, args, kwargs):
            raise AdaptedWeightError(WRITING_IS_LOST.format("a view of a weight"))
        return plainly(func, args, kwargs)


class TrainedCast(Tensor):
    """What an adapter trains of a module, in the base's dtype, and views of it; not to write into.
    """

    @classmethod
    @not_compiled
    def __torch_function__(cls, func: Any, types_: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _writes(cls, func, args, kwargs):
            raise AdaptedWeightError(CAST_IS_LOST)
        with without_torch_function():
            result = func(*args, **kwargs)
            if type(result) is Tensor and (result._is_view() or func in _SAME_MEMORY):
                return result.as_subclass(cls)
        return result


_SAME_MEMORY = functions_named("detach", "data")


def _writes(cls: type[Tensor], func: Any, args: Args, kwargs: Kwargs) -> bool:
    """True if a call writes into a tensor of this class."""
    in_place = args and isinstance(args[0], cls) and writes_in_place(func)
    return bool(in_place) or isinstance(kwargs.get("out"), cls)


def plainly(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Return what a call gives on plain tensors; it is one, but a view remains unwritable."""
    with without_torch_function():
        result = func(*args, **kwargs)
        if type(result) in (Tensor, SumView) and result._is_view():
            return result.as_subclass(SumView)
    return result
