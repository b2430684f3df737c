"""What the classes of injected modules hold: the generated forward, and what Python reads."""

import functools
import itertools
import linecache
import types
from typing import Any

from torch import Tensor, fx, nn

from .._kernels.compiling import Anew
from .direct import LinearForward, direct_first
from .reading import FROZEN_PREFIX, RESETTING, adapted, base_or_trained
from .standing import standing


_SERIAL = itertools.count()


def compiled(
    user_class: type[nn.Module], code: fx.graph.PythonCode, linear: LinearForward | None
) -> dict[str, Any]:
    """Return what a class has of a generated forward, and of the linear call that this is if any.
    """
    filename = f"<lorafx {user_class.__qualname__} {next(_SERIAL)}>"
    source = code.src.strip() + "\n"
    linecache.cache[filename] = len(source), None, source.splitlines(keepends=True), filename
    names = dict(code.globals)
    exec(compile(source, filename, "exec"), names)
    forward = names["forward"]
    if linear is not None and linear.weight.startswith(FROZEN_PREFIX):
        weight = linear.weight.removeprefix(FROZEN_PREFIX)
        forward = direct_first(forward, linear._replace(weight=weight))
    return {"forward": forward, "_code": source, "_python_code": code,
            "_lineno_map": code._lineno_map, "_prologue_start": code._prologue_start}


def resetting_base(reset: types.FunctionType) -> Any:
    """A layer's `reset_parameters`, which gives W its first values and so must get to it."""

    @functools.wraps(reset)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        token = RESETTING.set((*RESETTING.get(), self))
        try:
            return reset(self, *args, **kwargs)
        finally:
            RESETTING.reset(token)

    return run


def adapted_property(name: str) -> property:
    """Return what stands for an adapted tensor in a class."""

    def read(self: nn.Module) -> Tensor:
        return adapted(self, name)

    def write(self: nn.Module, value: Any) -> None:  # not a Parameter: those are registered
        vars(self)[name] = value

    def delete(self: nn.Module) -> None:
        del vars(self)[name]

    return property(read, write, delete, doc=f"{name} + s B A, over the active adapters.")


def standing_property(name: str) -> property:
    """Return what stands in a class for what compiled programs read in the place of a tensor."""
    def read(self: nn.Module) -> Any:
        return standing(self, name)

    return property(Anew(read).__getitem__)


def frozen_property(name: str) -> property:
    """Return what stands in a class for a tensor without the branches beside it."""

    def read(self: nn.Module) -> Any:
        return base_or_trained(self, name)

    return property(read, doc=f"{name} without the branches beside it.")
