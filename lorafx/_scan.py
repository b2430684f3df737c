"""Which weights the Python of a graph break may use by itself, past the modules that own them.

A branch lives in the graph of the module that makes the linear call. Where Python does `F.linear(x, self.proj.weight)`
in a module that cannot be traced, no branch would be in the way, so such weights must be found and left alone. The
bytecode of `forward`, and of the methods and same-file functions that it reaches, is searched for weights that it
reads, layers that it hands on by name, and methods of its children other than forward.
What is not found: layers that Python fetches by other ways (`get_submodule`, a container, all of `self`) and hands to
functions of other files, and weights fetched through `self.parameters()`, which is how most code asks for a device.
"""

import contextlib
import dis
import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from ._rules import METADATA
from ._watch import instructions

_LOADS = ("LOAD_ATTR", "LOAD_METHOD")
_QUESTIONS = frozenset({"isinstance", "type", "hasattr", "id", "enumerate", "reversed", "zip", "len"})
# What only looks at a value, or gives it to a variable that is followed in its turn.
_ASKING = frozenset({"GET_ITER", "TO_BOOL", "UNARY_NOT", "IS_OP", "STORE_FAST", "POP_TOP"})
ITEM = "*"  # in a chain: any item of a container
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
            if name != "forward" and _is_method(below, name):
                yield from _used_by(below, name, attributes)
    for chain in chains:
        yield from _resolved(module, chain, attributes)


def _resolved(start: nn.Module, chain: Chain, attributes: frozenset[str]) -> Iterator[Weight]:
    """The weights that a chain of attributes of this very module comes to, if it does."""
    waiting = [(start, chain.names)]
    while waiting:
        module, names = waiting.pop()
        if not names:
            if module is not start and chain.use == "value":
                yield from _own(module, attributes)
            continue
        name, rest = names[0], names[1:]
        children = [module._modules.get(name)] if name != ITEM else list(module._modules.values())
        waiting += [(child, rest) for child in children if child is not None]
        if name == ITEM and chain.use == "value":
            yield from _own(module, attributes)  # the items of a ParameterList
        elif name in module._parameters:
            if rest[0] not in METADATA if rest else chain.use != "asked":
                yield module, name
        elif not any(children) and not rest and chain.use == "called" and module is not start:
            if name in _FETCHES:
                yield from _own(module, attributes)
            elif name != "forward" and _is_method(module, name):
                yield from _used_by(module, name, attributes)


def _is_method(module: nn.Module, name: str) -> bool:
    """Whether a name is a method that the module's author wrote: torch's own do other things than linear calls."""
    method = inspect.getattr_static(type(module), name, None)
    return isinstance(method, types.FunctionType) and method.__module__.partition(".")[0] != "torch"


def _own(module: nn.Module, attributes: frozenset[str]) -> Iterator[Weight]:
    return ((module, name) for name in module._parameters if name in attributes)


def weights_kept(module: nn.Module, attributes: frozenset[str]) -> Iterator[Weight]:
    """The weights that plain attributes of any module hold: in a list, a bound method or a partial function."""
    below = {id(parameter): (m, name) for m in module.modules() for name, parameter in m._parameters.items()}
    for name, value in vars(module).items():
        for held in reached(value) if name not in TABLES else ():
            if isinstance(held, nn.Parameter) and id(held) in below:
                yield below[id(held)]
            elif isinstance(held, types.MethodType) and isinstance(held.__self__, nn.Module):
                yield from _own(held.__self__, attributes)


TABLES = frozenset(vars(nn.Module()))  # nn.Module's own: parameters, submodules, hooks


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
        parts = [*_enclosed(value), value.__defaults__, value.__kwdefaults__]
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
    """The chains that start at self or at a local variable that stands for a part of it, and the other attributes."""
    steps = instructions(code)
    reads = list(_reads(steps))
    roots: dict[str, set[tuple[str, ...]]] = {} if self_name is None else {self_name: {()}}
    for _ in range(3):  # an alias of an alias of an alias
        for start, end, names in reads:
            for base in tuple(roots.get(steps[start].argval, ())) if _is_local(steps[start]) else ():
                for variable, more in _assigned(steps, start, end):
                    roots.setdefault(variable, set()).add((*base, *names, *more)[:8])
    chains, elsewhere = set(), set()
    for start, end, names in reads:
        found = roots.get(steps[start].argval, set()) if _is_local(steps[start]) else set()
        item, use = _use(steps, start, end)
        chains |= {Chain((*base, *names, *item), use) for base in found if base or names}
        if not found:
            elsewhere |= {name for name, after in zip(names, (*names[1:], None)) if after not in METADATA}
    return chains, elsewhere


def _is_local(step: dis.Instruction) -> bool:
    return step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) and isinstance(step.argval, str)


def _reads(steps: list[dis.Instruction]) -> Iterator[tuple[int, int, tuple[str, ...]]]:
    """(start, end, names) of each local variable with the attributes read of it, and of attributes of anything else."""
    at = 0
    while at < len(steps):
        start = at
        at += 1
        while at < len(steps) and steps[at].opname in _LOADS:
            at += 1
        names = tuple(step.argval for step in steps[start + (steps[start].opname not in _LOADS):at])
        if names or _is_local(steps[start]):
            yield start, at, names


# (the function whose first argument the value is, the instructions after it, of which the last stores the value or an
# item of it in a variable, and which of the two).
_ASSIGNMENTS: tuple[tuple[str | None, str, tuple[str, ...]], ...] = (
    (None, "STORE_FAST", ()),
    (None, "LOAD_CONST BINARY_SUBSCR STORE_FAST", (ITEM,)),
    (None, "LOAD_FAST BINARY_SUBSCR STORE_FAST", (ITEM,)),
    (None, "GET_ITER FOR_ITER STORE_FAST", (ITEM,)),
    ("reversed", "CALL GET_ITER FOR_ITER STORE_FAST", (ITEM,)),
    ("enumerate", "CALL GET_ITER FOR_ITER UNPACK_SEQUENCE STORE_FAST STORE_FAST", (ITEM,)),
)


def _assigned(steps: list[dis.Instruction], start: int, end: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(variable, ITEM or nothing) for what is stored of the value that ends before `end`, or of its items in a loop."""
    given_to = steps[start - 1].argval if steps[start - 1].opname == "LOAD_GLOBAL" else None
    for function, opnames, more in _ASSIGNMENTS:
        after = steps[end:end + len(opnames.split())]
        if [step.opname for step in after] == opnames.split() and function in (None, given_to):
            yield after[-1].argval, more


def _use(steps: list[dis.Instruction], start: int, end: int) -> tuple[tuple[str, ...], str]:
    """Whether an item of the chain is taken, and what is done with it."""
    item: tuple[str, ...] = ()
    method = steps[end - 1]
    opnames = [step.opname for step in steps[end:end + 2]] + ["", ""]
    if opnames[1] == "BINARY_SUBSCR" and opnames[0] in ("LOAD_CONST", "LOAD_FAST"):
        item, end = (ITEM,), end + 2
        if steps[end].opname in _LOADS:
            return item, "asked"  # what is read of it is found as an attribute of anything
    before, after = steps[start - 1], steps[end] if end < len(steps) else steps[-1]
    if method.opname == "LOAD_METHOD" or "NULL|self" in method.argrepr or "PUSH_NULL" in (before.opname, after.opname):
        return item, "called"
    compared = after.opname == "LOAD_CONST" and end + 1 < len(steps) and steps[end + 1].opname == "IS_OP"
    asked = before.opname == "LOAD_GLOBAL" and before.argval in _QUESTIONS
    if asked or compared or "JUMP" in after.opname or after.opname in _ASKING:
        return item, "asked"
    return item, "value"


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
    held = [value for value in _enclosed(function) if value is not function]
    return [function, *(inner for value in held for inner in _codes_with_globals(value))]


def _enclosed(function: types.FunctionType) -> Iterator[Any]:
    """What a function closes over, but for cells that are empty yet."""
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):
            yield cell.cell_contents
