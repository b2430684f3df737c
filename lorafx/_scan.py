"""Which weights the Python of a graph break reads by itself, past the modules that own them.

A branch lives in the graph of the module that makes the linear call. Where Python does `F.linear(x, self.proj.weight)`
in a module that cannot be traced, no branch would be in the way, so such weights must be found and left alone. The
bytecode of `forward`, and of the methods and same-file functions that it reaches, is searched for attribute reads.
"""

import dis
import functools
import types
from collections.abc import Iterable, Iterator

from torch import nn

from ._rules import METADATA

_ATTRIBUTE = ("LOAD_ATTR", "LOAD_METHOD")
# Asking these of a weight computes nothing with it.
_QUESTIONS = frozenset({"isinstance", "type", "hasattr", "id"})


ANYWHERE = "*"  # the owner of a weight that is read off something other than an attribute of self


def weights_read(module: nn.Module, attributes: frozenset[str]) -> frozenset[str]:
    """Dotted paths below the module (`proj.weight`, `*.weight`) of the tensors that its own Python uses.

    Only attributes of these names are looked for.
    """
    return _reads_of_class(type(module), attributes)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=None)
def _reads_of_class(cls: type[nn.Module], attributes: frozenset[str]) -> frozenset[str]:
    return frozenset(path for code in _reachable(cls) for path in _reads(code, attributes))


def _reachable(cls: type[nn.Module]) -> Iterator[types.CodeType]:
    """The code of forward, of the methods it names and of the functions of its file that it names, transitively."""
    seen: set[types.CodeType] = set()
    waiting = [_code(getattr(cls, "forward", None))]
    while waiting:
        code = waiting.pop()
        if code is None or code in seen:
            continue
        seen.add(code)
        yield code
        waiting += [const for const in code.co_consts if isinstance(const, types.CodeType)]
        for name in code.co_names:
            for base in cls.__mro__:
                if base not in (nn.Module, object) and name in vars(base):
                    waiting.append(_code(vars(base)[name]))
                globals_ = _globals(vars(base).get("forward"))
                if name in globals_ and getattr(globals_[name], "__module__", None) == base.__module__:
                    waiting.append(_code(globals_[name]))


def _code(function: object) -> types.CodeType | None:
    if isinstance(function, property):
        function = function.fget
    while isinstance(function, (staticmethod, classmethod)):
        function = function.__func__
    function = _unwrapped(function)
    return function.__code__ if isinstance(function, types.FunctionType) else None


def _unwrapped(function: object) -> object:
    while isinstance(function, types.FunctionType) and "__wrapped__" in vars(function):
        function = vars(function)["__wrapped__"]
    return function


def _globals(function: object) -> dict[str, object]:
    function = _unwrapped(function)
    return function.__globals__ if isinstance(function, types.FunctionType) else {}


def _reads(code: types.CodeType, attributes: Iterable[str]) -> Iterator[str]:
    instructions = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "EXTENDED_ARG", "PRECALL")]
    for i, instruction in enumerate(instructions):
        if instruction.opname not in _ATTRIBUTE or instruction.argval not in attributes:
            continue
        if i + 1 < len(instructions) and instructions[i + 1].opname in _ATTRIBUTE:
            if instructions[i + 1].argval in METADATA:
                continue
        start = i
        while instructions[start - 1].opname in _ATTRIBUTE:
            start -= 1
        base, before = instructions[start - 1], instructions[start - 2]
        if before.opname == "LOAD_GLOBAL" and before.argval in _QUESTIONS:
            continue
        rooted = base.opname.startswith("LOAD_FAST") and code.co_varnames[:1] == (base.argval,)
        path = ".".join(instructions[k].argval for k in range(start, i + 1))
        yield path if rooted else f"{ANYWHERE}.{instruction.argval}"
