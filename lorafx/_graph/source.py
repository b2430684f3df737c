"""What the Python of a graph break does with weights, read from its source.

Python reads adapted weights of modules, so nothing here decides whether adapters are right. It
answers two questions about the code that a forward reaches. Which tensors are the weights of linear
calls, so that they are sites: `F.linear(x, self.w)`, `x @ self.experts[i]`? And which weights are
fetched past the attribute that holds them, `dict(self.named_parameters())["w"]`, so that they
cannot be adapted?
"""

import functools
import inspect
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from .body import FETCHES, SELF, Bindings, Body, Chain, Chains, MethodCall, Product
from .functions import package, syntax_tree, unwrapped


Reached = tuple[types.FunctionType, Bindings]  # a function and what its arguments may be
_MOST_FUNCTIONS = 500  # read for one method


class MethodAnalysis(NamedTuple):
    """What the code that a method reaches does.

    `products` are its linear calls, `fetches` the chains at which weights are fetched past their
    owner, `calls` the methods of children that it calls.
    """

    products: frozenset[Product]
    fetches: Chains
    calls: Chains


def analysis_of(module: nn.Module, method: str) -> MethodAnalysis:
    """Return what a method of a module does, with all code that it reaches."""
    cls: Any = type(module)
    return _analysis_of(cls, method)


@functools.lru_cache(maxsize=None)
def _analysis_of(cls: type, method: str) -> MethodAnalysis:
    products: set[Product] = set()
    fetches: set[Chain] = set()
    calls: set[Chain] = set()
    seen: set[Any] = set()
    waiting: list[Reached] = []
    reached: Iterable[Reached] = _methods(cls, method, {})
    while True:
        for function, bound in reached:
            key = function.__code__, tuple(sorted(bound.items()))
            is_ours = package(function) == __name__.partition(".")[0]  # it reads adapted weights
            if key not in seen and not is_ours and len(seen) < _MOST_FUNCTIONS:
                seen.add(key)
                waiting.append((function, bound))
        if not waiting:
            break
        function, bound = waiting.pop()
        tree = syntax_tree(function.__code__)
        if tree is None:
            reached = ()
            if FETCHES & {*function.__code__.co_names}:
                fetches.add(())
        else:
            body = Body(function, bound, tree)
            products |= body.products
            fetches |= body.fetches
            calls |= body.calls
            reached = (*body.functions, *_reached_methods(cls, function, body.methods))
    return MethodAnalysis(frozenset(products), frozenset(fetches), frozenset(calls))


def _reached_methods(
    cls: type, function: types.FunctionType, methods: list[MethodCall]
) -> Iterator[Reached]:
    """The functions that calls of methods of self come to from this function."""
    for call in methods:
        if call.by_super:
            yield from _methods(cls, call.name, {}, above=_definer(cls, function))
            continue
        arguments: Bindings = dict(call.keywords)
        if call.positional:
            method = inspect.getattr_static(cls, call.name, None)
            for first in unwrapped(method)[:1]:
                code, without_self = first.__code__, not isinstance(method, staticmethod)
                names = code.co_varnames[without_self:code.co_argcount]
                arguments = dict(zip(names, call.positional)) | arguments
        yield from _methods(cls, call.name, arguments)


def _methods(
    cls: type, name: str, arguments: Mapping[str, Chains], above: type | None = None
) -> Iterator[Reached]:
    """The methods or properties of this name that a class and its bases define.

    Those of nn.Module are known; `above` leaves out that base and all before it in the MRO.
    """
    mro = cls.__mro__
    bases = mro[mro.index(above) + 1:] if above in mro else mro
    for base in bases:
        if base in (nn.Module, object):
            continue
        for function in unwrapped(vars(base).get(name)):
            names = function.__code__.co_varnames[:function.__code__.co_argcount]
            yield function, {**arguments, names[0]: SELF} if names else {**arguments}


def _definer(cls: type, function: types.FunctionType) -> type | None:
    """The class of the MRO in which this function is a method."""
    for base in cls.__mro__:
        if function in unwrapped(vars(base).get(function.__name__)):
            return base
    return None
