"""What a model does with weights in the Python of graph breaks and in plain attributes."""

import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from .body import ITEM, Chain, Product
from .dispatched import HOOK
from .functions import closure_values, package
from .modules import Place
from .rules import SWAPS_BY_NAME
from .source import analysis_of


def products_of(module: nn.Module, method: str = "forward") -> Iterator[tuple[Place, Product]]:
    """The weights that the module's Python uses in linear calls of its own."""
    for product in analysis_of(module, method).products:
        for place, rest in _tensors_along(module, product.chain):
            if ITEM in rest and _dimensions(place) < 3:
                continue  # rows looked up in a table
            swapped = sum(name in SWAPS_BY_NAME for name in rest) % 2 == 1
            yield place, product._replace(transposed=product.transposed != swapped)
    for child, name in _methods_called(module, method):
        yield from products_of(child, name)


def modules_fetched(module: nn.Module, method: str = "forward") -> Iterator[nn.Module]:
    """The modules whose weights the module's Python fetches past their attributes."""
    for chain in analysis_of(module, method).fetches:
        yield from _modules_at(module, chain)
    for child, name in _methods_called(module, method):
        yield from modules_fetched(child, name)


def _methods_called(module: nn.Module, method: str) -> Iterator[tuple[nn.Module, str]]:
    """(child, name) of the methods that users wrote and that this one calls of children."""
    first = module._modules.keys() | {ITEM}
    for chain in analysis_of(module, method).calls:
        if chain[0] not in first and len(chain) > 1:  # most, and a forward may have 10^5
            continue
        *owner, name = chain
        for child in _modules_at(module, tuple(owner)):
            function = inspect.getattr_static(type(child), name, None)
            if isinstance(function, types.FunctionType) and package(function) != "torch":
                yield child, name


def _modules_at(module: nn.Module, chain: Chain) -> list[nn.Module]:
    """The modules to which a chain of attributes and items leads."""
    found = [module]
    for name in chain:
        children: list[nn.Module | None] = []
        for parent in found:
            if name == ITEM:
                children += parent._modules.values()
            else:
                children.append(parent._modules.get(name))
        found = [child for child in children if child is not None]
    return found


def _tensors_along(module: nn.Module, chain: Chain) -> Iterator[tuple[Place, Chain]]:
    """Each tensor that a chain comes by, and what follows it in the chain."""
    for at, name in enumerate(chain):
        for owner in _modules_at(module, chain[:at]):
            registered = name in owner._parameters or name in owner._buffers
            if name == ITEM:
                attributes = list(owner._parameters)
            elif registered or parametrize.is_parametrized(owner, name):
                attributes = [name]
            else:
                attributes = []
            for attribute in attributes:
                yield Place(owner, attribute), chain[at + 1:]


def _dimensions(place: Place) -> int:
    tensor = place.module._parameters.get(place.attribute)
    return 2 if tensor is None else tensor.ndim


MODULE_STATE = frozenset(vars(nn.Module()))  # nn.Module's own: parameters, submodules, hooks


def weights_in_attributes(module: nn.Module) -> Iterator[Place]:
    """The weights that plain attributes hold: in a list, a bound method or a partial function."""
    found: set[int] = set()
    for name, value in vars(module).items():
        if name not in MODULE_STATE and name != HOOK:
            for part in values_in(value):
                if isinstance(part, nn.Parameter):
                    found.add(id(part))
    if not found:
        return
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if id(parameter) in found:
                yield Place(owner, name)


def values_in(value: Any, depth: int = 4) -> Iterator[Any]:
    """A value and what it holds: items, attributes, a partial's arguments, closures, defaults."""
    yield value
    if depth == 0:
        return
    parts: list[Any] = []
    if isinstance(value, (list, tuple, set, frozenset)):
        parts = list(value)
    elif isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, functools.partial):
        parts = [value.func, value.args, value.keywords]
    elif isinstance(value, types.FunctionType):
        parts = [*closure_values(value), value.__defaults__, value.__kwdefaults__]
    elif not isinstance(value, _OPAQUE):
        parts = list(getattr(value, "__dict__", {}).values())
    for part in parts:
        yield from values_in(part, depth - 1)


_OPAQUE = (nn.Module, torch.Tensor, type, types.ModuleType, types.MethodType)
