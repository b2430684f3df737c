"""How functions of torch meet a subclass of Tensor: which write, and how to run Python ones."""

import types
from typing import Any

import torch
from torch import Tensor

Args = tuple[Any, ...]  # of a call
Kwargs = dict[str, Any]
_WRITING = frozenset("""__set__ __setitem__ __delitem__ __iadd__ __isub__ __imul__ __itruediv__
    __ifloordiv__ __imod__ __ipow__ __iand__ __ior__ __ixor__ __ilshift__ __irshift__""".split())


def writes_in_place(func: Any) -> bool:
    """True if, by its name, a function of torch or Tensor writes into its first argument."""
    name = getattr(func, "__name__", "")
    return name in _WRITING or name.endswith("_") and not name.endswith("__")


def functions_named(*names: str) -> list[Any]:
    """Return these functions of torch and methods of Tensor, as they call __torch_function__."""
    found = []
    for name in names:
        for holder in (torch, Tensor):
            value = getattr(holder, name, None)
            if isinstance(value, types.GetSetDescriptorType):
                found.append(getattr(value, "__get__"))
            elif value is not None:
                found.append(value)
    return found


def without_override(func: Any) -> types.FunctionType | None:
    """Return a Python function of torch as it runs on plain tensors.

    What it calls meets the subclass in its place. None if it does not ask whether an argument
    overrides it, or is not written in Python.
    """
    if not isinstance(func, types.FunctionType) or "__class__" in func.__code__.co_freevars:
        return None
    asked = [name for name in func.__code__.co_names
             if name.startswith("has_torch_function") and name in func.__globals__]
    if not asked:
        return None
    names = {**func.__globals__, **dict.fromkeys(asked, _no)}
    twin = types.FunctionType(
        func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
    twin.__kwdefaults__ = func.__kwdefaults__
    return twin


def _no(*_: Any) -> bool:
    return False
