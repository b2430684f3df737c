"""Python functions as objects: their package, what they wrap and close over, and their source."""

import ast
import contextlib
import functools
import inspect
import textwrap
import types
from collections.abc import Iterator
from typing import Any


def package(function: Any) -> str:
    """The top-level package that a function is of."""
    return (function.__module__ or "").partition(".")[0]


def why_not_defined(cls: type, names: frozenset[str]) -> str | None:
    """Why a class cannot be derived from if nobody but nn.Module may define these methods, or None.

    A parametrized class has copying methods of torch's that do no more than ours.
    """
    for name in sorted(names):
        for definer in cls.__mro__:
            value = vars(definer).get(name)
            function = value if isinstance(value, types.FunctionType) else definer
            if value is not None and package(function) not in _STANDARD:
                return f"{definer.__name__} defines '{name}' itself"
    return None


_STANDARD = ("torch", "typing", "builtins", "lorafx")


def closure_values(function: types.FunctionType) -> Iterator[Any]:
    """Yield what a function closes over, but for cells that are empty yet."""
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):
            yield cell.cell_contents


def free_variable(function: types.FunctionType, name: str) -> Any:
    """The value of a variable that a function closes over, or None."""
    names = function.__code__.co_freevars
    if name in names:
        with contextlib.suppress(ValueError):
            return (function.__closure__ or ())[names.index(name)].cell_contents
    return None


def unwrapped(attribute: object) -> list[types.FunctionType]:
    """The function of an attribute and all that it wraps.

    Properties, static and class methods are unwrapped, and decorators' closures are looked into.
    """
    if isinstance(attribute, property):
        attribute = attribute.fget
    if isinstance(attribute, functools.cached_property):
        attribute = attribute.func
    if isinstance(attribute, (staticmethod, classmethod)):
        attribute = attribute.__func__
    if not isinstance(attribute, types.FunctionType):
        return []
    functions = [attribute]
    for value in closure_values(attribute):
        if value is not attribute:
            functions += unwrapped(value)
    return functions


@functools.lru_cache(maxsize=None)
def syntax_tree(code: types.CodeType) -> ast.AST | None:
    """The syntax tree of a function, or None if its source cannot be found."""
    try:
        parsed = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, SyntaxError, TypeError):
        return None
    for node in ast.walk(parsed):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            if getattr(node, "name", "<lambda>") == code.co_name:
                return node
    return None
