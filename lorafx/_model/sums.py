"""The sum W + sum s L R as a plain tensor: a temporary, into whose views nothing may be written."""

from typing import Any

from torch import Tensor

from .._errors import AdaptedWeightError
from .._kernels.private import without_torch_function
from .torch_functions import Args, Kwargs, writes_in_place

WRITING_IS_LOST = (
    "Something writes into {}, which is adapted: what Python reads of it is W + s B A, and what is "
    "written there would be lost. Write into W, `frozen_...` of the same module, load a "
    "state_dict, or do it before lorafx.inject.")
SPREADING_IS_LOST = (
    "{} is adapted, and is to be spread over processes, so that the base would hold W + s B A: use "
    "parallelize_module or distribute_module, spread `frozen_...` of the same module, or do it "
    "before lorafx.inject.")


class SumView(Tensor):
    """A view of the sum W + sum s L R, into which nothing may be written."""

    @classmethod
    def __torch_function__(cls, func: Any, types_: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        in_place = args and isinstance(args[0], cls) and writes_in_place(func)
        if in_place or isinstance(kwargs.get("out"), cls):
            raise AdaptedWeightError(WRITING_IS_LOST.format("a view of a weight"))
        return plainly(func, args, kwargs)


def plainly(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Return what a call gives on plain tensors; it is one, but a view remains unwritable."""
    with without_torch_function():
        result = func(*args, **kwargs)
        if type(result) in (Tensor, SumView) and result._is_view():
            return result.as_subclass(SumView)
    return result
