"""What the Python of a graph break does with the weights of a model."""

import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from .rules import SWAPS_BY_NAME
from .source import ITEM, Facts, Names, Product, enclosed, facts_of, package


Place = tuple[nn.Module, str]  # owner, attribute


def products(module: nn.Module, method: str = "forward") -> Iterator[tuple[Place, Product]]:
    """The weights that the module's Python uses in linear calls of its own."""
    cls: Any = type(module)
    facts = facts_of(cls, method)
    for product in facts.products:
        for owner, attribute, rest in _resolved(module, product.names):
            if ITEM in rest and _dimensions(owner, attribute) < 3:
                continue  # rows looked up in a table
            swapped = sum(name in SWAPS_BY_NAME for name in rest) % 2 == 1
            yield (owner, attribute), product._replace(transposed=product.transposed != swapped)
    for child, name in _methods(module, facts):
        yield from products(child, name)


def fetched(module: nn.Module, method: str = "forward") -> Iterator[nn.Module]:
    """The modules whose weights the module's Python fetches past their attributes."""
    cls: Any = type(module)
    facts = facts_of(cls, method)
    for names in facts.fetches:
        yield from (found for found in _modules(module, names))
    for child, name in _methods(module, facts):
        yield from fetched(child, name)


def _methods(module: nn.Module, facts: Facts) -> Iterator[tuple[nn.Module, str]]:
    for names in facts.calls:
        for child in _modules(module, names[:-1]):
            method = inspect.getattr_static(type(child), names[-1], None)
            if isinstance(method, types.FunctionType) and package(method) != "torch":
                yield child, names[-1]


def _modules(module: nn.Module, names: Names) -> list[nn.Module]:
    """The modules that a chain comes to."""
    found = [module]
    for name in names:
        found = [child for parent in found for child in (
            parent._modules.values() if name == ITEM else (parent._modules.get(name),)) if child is not None]
    return found


def _resolved(module: nn.Module, names: Names) -> Iterator[tuple[nn.Module, str, Names]]:
    """(owner, attribute, what follows) for each tensor that a chain goes through."""
    for at, name in enumerate(names):
        for owner in _modules(module, names[:at]):
            if name == ITEM:
                keys = list(owner._parameters)
            elif name in owner._parameters or name in owner._buffers or parametrize.is_parametrized(owner, name):
                keys = [name]
            else:
                keys = []
            yield from ((owner, key, names[at + 1:]) for key in keys)


def _dimensions(owner: nn.Module, attribute: str) -> int:
    tensor = owner._parameters.get(attribute)
    return 2 if tensor is None else tensor.ndim


def weights_kept(module: nn.Module) -> Iterator[Place]:
    """The weights that plain attributes of a module hold: in a list, a bound method or a partial function."""
    kept = {id(held) for name, value in vars(module).items() if name not in TABLES
            for held in reached(value) if isinstance(held, nn.Parameter)}
    for owner in module.modules() if kept else ():
        yield from ((owner, name) for name, parameter in owner._parameters.items() if id(parameter) in kept)


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
        parts = [*enclosed(value), value.__defaults__, value.__kwdefaults__]
    elif not isinstance(value, (nn.Module, torch.Tensor, type, types.ModuleType, types.MethodType)):
        parts = list(getattr(value, "__dict__", {}).values())
    for part in parts if depth else ():
        yield from reached(part, depth - 1)
