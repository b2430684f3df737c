"""Which weights the Python of a graph break may use by itself, past the modules that own them.

A branch lives in the graph of the module that makes the linear call. Where Python does `F.linear(x, self.proj.weight)`
in a module that cannot be traced, no branch would be in the way, so such weights must be found and left alone. The
bytecode of `forward`, and of the methods and same-file functions that it reaches, is searched for weights that it
reads, layers that it hands on by name, and methods of its children other than forward.
What is not found: layers that Python fetches by other ways (a loop variable, `get_submodule`, all of `self`) and hands
to functions of other files, and weights fetched through `self.parameters()`, which is how most code asks for a device.
"""

import dis
import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from ._rules import METADATA

_LOADS = ("LOAD_ATTR", "LOAD_METHOD")
_QUESTIONS = frozenset({"isinstance", "type", "hasattr", "id"})
# Methods of nn.Module that give its weights away.
_FETCHES = frozenset({"state_dict", "get_parameter", "named_parameters", "parameters"})

Weight = tuple[nn.Module, str]  # owner, attribute


class Chain(NamedTuple):
    """`self.a.b` in bytecode: the names, and whether it is "called", "asked" something, or used as a "value"."""

    names: tuple[str, ...]
    use: str


def weights_used(module: nn.Module, attributes: frozenset[str]) -> set[Weight]:
    """The weights, under one of these attribute names, that the module's own Python may use by itself."""
    return set(_used_by(module, "forward", attributes))


def _used_by(module: nn.Module, method: str, attributes: frozenset[str]) -> Iterator[Weight]:
    cls: Any = type(module)
    chains, elsewhere = _facts(cls, method, attributes)
    for below in module.modules() if elsewhere else ():
        yield from ((below, name) for name in below._parameters if name in elsewhere)
        for name in elsewhere if below is not module else ():
            if name != "forward" and name not in vars(nn.Module) and _is_method(below, name):
                yield from _used_by(below, name, attributes)
    for chain in chains:
        yield from _resolved(module, chain, attributes)


def _resolved(start: nn.Module, chain: Chain, attributes: frozenset[str]) -> Iterator[Weight]:
    """The weights that a chain of attributes of this very module comes to, if it does."""
    module = start
    for position, name in enumerate(chain.names):
        child, last = module._modules.get(name), position == len(chain.names) - 1
        if child is not None:
            module = child
        elif name in module._parameters:
            if chain.use != "asked" if last else chain.names[position + 1] not in METADATA:
                yield module, name
            return
        elif last and chain.use == "called" and module is not start:
            if name in _FETCHES:
                yield from _own(module, attributes)
            elif name != "forward" and _is_method(module, name):
                yield from _used_by(module, name, attributes)
            return
        else:
            return
    if module is not start and chain.use == "value":
        yield from _own(module, attributes)


def _is_method(module: nn.Module, name: str) -> bool:
    return isinstance(inspect.getattr_static(type(module), name, None), types.FunctionType)


def _own(module: nn.Module, attributes: frozenset[str]) -> Iterator[Weight]:
    return ((module, name) for name in module._parameters if name in attributes)


def weights_kept(module: nn.Module, attributes: frozenset[str]) -> Iterator[Weight]:
    """The weights that plain attributes of any module hold: in a list, a bound method or a partial function."""
    below = {id(parameter): (m, name) for m in module.modules() for name, parameter in m._parameters.items()}
    for name, value in vars(module).items():
        for held in reached(value) if name not in _TABLES else ():
            if isinstance(held, nn.Parameter) and id(held) in below:
                yield below[id(held)]
            elif isinstance(held, types.MethodType) and isinstance(held.__self__, nn.Module):
                yield from _own(held.__self__, attributes)


_TABLES = frozenset(vars(nn.Module()))  # nn.Module's own: parameters, submodules, hooks


def reached(value: Any, depth: int = 4) -> Iterator[Any]:
    """A value and what it holds: items, arguments of a partial, closures and defaults of a function, attributes."""
    yield value
    parts: list[Any] = []
    if isinstance(value, (list, tuple, set, frozenset)):
        parts = list(value)
    elif isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, functools.partial):
        parts = [value.func, value.args, value.keywords]
    elif isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if not _empty(cell)]
        parts = [*cells, value.__defaults__, value.__kwdefaults__]
    elif not isinstance(value, (nn.Module, torch.Tensor, type, types.ModuleType, types.MethodType)):
        parts = list(getattr(value, "__dict__", {}).values())
    for part in parts if depth else ():
        yield from reached(part, depth - 1)


@functools.lru_cache(maxsize=None)
def _facts(cls: type, method: str, attributes: frozenset[str]) -> tuple[frozenset[Chain], frozenset[str]]:
    """The chains that start at self, and all attributes that are read of something else, in all code reached."""
    chains: set[Chain] = set()
    elsewhere: set[str] = set()
    for code, self_name in _reachable(cls, method):
        found, read = _chains(code, self_name)
        chains |= found
        elsewhere |= read
        fetched = {chain.names for chain in found if chain.use == "called"}
        if "_parameters" in code.co_names or fetched & {("state_dict",), ("get_parameter",), ("named_parameters",)}:
            elsewhere |= attributes
        if "getattr" in code.co_names:
            elsewhere |= attributes & {const for const in code.co_consts if isinstance(const, str)}
    return frozenset(chains), frozenset(elsewhere)


def _chains(code: types.CodeType, self_name: str | None) -> tuple[set[Chain], set[str]]:
    steps = [s for s in dis.get_instructions(code) if s.opname not in ("CACHE", "EXTENDED_ARG", "PRECALL")]
    chains, elsewhere, at = set(), set(), 0
    while at < len(steps):
        step, start = steps[at], at
        at += 1
        while at < len(steps) and steps[at].opname in _LOADS and (step.opname not in _LOADS or at == start):
            at += 1
        names = tuple(s.argval for s in steps[start + (step.opname not in _LOADS):at])
        if not names:
            continue
        if step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) and step.argval == self_name:
            chains.add(Chain(names, _use(steps, start, at)))
            continue
        for position, name in enumerate(names):
            if names[position + 1:position + 2] == () or names[position + 1] not in METADATA:
                elsewhere.add(name)
    return chains, elsewhere


def _use(steps: list[dis.Instruction], start: int, end: int) -> str:
    """What is done with the chain that ends before this step."""
    before, after = steps[start - 1], steps[end] if end < len(steps) else steps[-1]
    method = steps[end - 1]
    if method.opname == "LOAD_METHOD" or "NULL|self" in method.argrepr or "PUSH_NULL" in (before.opname, after.opname):
        return "called"
    compared = after.opname == "LOAD_CONST" and end + 1 < len(steps) and steps[end + 1].opname == "IS_OP"
    asked = before.opname == "LOAD_GLOBAL" and before.argval in _QUESTIONS
    if asked or compared or "JUMP" in after.opname or after.opname in ("GET_ITER", "TO_BOOL", "UNARY_NOT", "IS_OP"):
        return "asked"
    return "value"


def _reachable(cls: type, method: str) -> Iterator[tuple[types.CodeType, str | None]]:
    """(code, its name for self) of a method, of the methods it names and of the functions of its file that it names."""
    seen: set[types.CodeType] = set()
    waiting = [(code, True) for code in _codes(getattr(cls, method, None))]
    names_of_self: dict[types.CodeType, str] = {}
    while waiting:
        code, is_method = waiting.pop()
        if code in seen:
            continue
        seen.add(code)
        self_name = names_of_self.get(code) or (code.co_varnames[0] if is_method and code.co_varnames else None)
        yield code, self_name
        for inner in (const for const in code.co_consts if isinstance(const, types.CodeType)):
            if self_name is not None:
                names_of_self[inner] = self_name
            waiting.append((inner, False))
        for name in code.co_names:
            for base in cls.__mro__:
                if base not in (nn.Module, object) and name in vars(base):
                    waiting += [(found, True) for found in _codes(vars(base)[name])]
                for function in _codes_with_globals(vars(base).get("forward")):
                    found = function.__globals__.get(name)
                    if getattr(found, "__module__", None) == base.__module__:
                        waiting += [(code, False) for code in _codes(found)]


def _codes(function: object) -> list[types.CodeType]:
    return [function.__code__ for function in _codes_with_globals(function)]


def _codes_with_globals(function: object) -> list[types.FunctionType]:
    """A function and all that it wraps: properties, static and class methods, decorators' closures."""
    if isinstance(function, property):
        function = function.fget
    if isinstance(function, functools.cached_property):
        function = function.func
    if isinstance(function, (staticmethod, classmethod)):
        function = function.__func__
    if not isinstance(function, types.FunctionType):
        return []
    held = [cell.cell_contents for cell in function.__closure__ or () if not _empty(cell)]
    return [function, *(inner for value in held if value is not function for inner in _codes_with_globals(value))]


def _empty(cell: types.CellType) -> bool:
    try:
        cell.cell_contents
    except ValueError:
        return True
    return False
