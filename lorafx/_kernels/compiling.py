"""What compilers read of lorafx's Python: they trace it, or take tensors of any size from it."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .private import compiler_frames as frames


Function = TypeVar("Function", bound=Callable[..., Any])


class Anew(dict[Any, Any]):
    """What `property(Anew(read).__getitem__)` gives of an object: read(object), each time.

    A compiler takes a property whose getter is not Python for a slot of the object: it traces
    nothing of it, and its programs read it again at each call. That is how they take tensors from
    what a thread or a task chose, which they could not trace.
    """

    def __init__(self, read: Callable[[Any], Any]) -> None:
        super().__init__()
        self._read = read

    def __missing__(self, key: Any) -> Any:
        _keep_order()
        return self._read(key)


@functools.cache
def _keep_order() -> None:
    """Let torch look for programs in one order, in this process, from now on.

    Else it moves what a thread found to the front, past others that wait in `Anew` on their way to
    it: they would not find it, and compile it again. Where torch has no such name, they do.
    """
    with contextlib.suppress(AttributeError):
        frames._set_lru_cache(False)


def is_compiling() -> bool:
    """True if a compiler, and not an exporter, reads the Python that calls this."""
    return torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()


def end_program() -> None:
    """Let a program that a compiler traces end here; an error where it is to be whole.

    A program reads what is active when it begins. Who calls this is `not_compiled`, so that Python
    does the rest.
    """
    if torch.compiler.is_dynamo_compiling():
        from torch._dynamo import graph_break  # takes a second
        graph_break(msg=_IN_A_PROGRAM)


_IN_A_PROGRAM = (
    "A compiled function chooses adapters, and a program reads which are active when it begins: "
    "compile the model alone, and call that within lorafx.using, lorafx.rows or lorafx.disabled, "
    "or compile without fullgraph=True.")


def not_compiled_by_itself(function: Function) -> Function:
    """Let no compiler start at a function, but at those that it calls; within others it is inlined.

    Where torch has no such names, it is compiled with the others.
    """
    with contextlib.suppress(AttributeError):
        _skip(function, frames._FrameAction.DEFAULT)
    return function


def not_compiled(function: Function) -> Function:
    """The same, and let no compiler start at those that it calls either."""
    with contextlib.suppress(AttributeError):
        _skip(function, frames._FrameAction.SKIP)
    return function


def _skip(function: Any, called: Any) -> None:
    strategy = frames._FrameExecStrategy(frames._FrameAction.SKIP, called)
    frames.set_code_exec_strategy(function.__code__, strategy)


not_compiled(Anew.__missing__)


def mark_dynamic(tensor: Tensor, axis: int) -> Tensor:
    """Let compiled programs take this tensor with any number, two or more, along an axis."""
    from torch._dynamo import maybe_mark_dynamic  # takes a second
    maybe_mark_dynamic(tensor, axis % tensor.ndim)
    return tensor
