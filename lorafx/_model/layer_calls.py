"""What a layer with a packed weight computes: x W^T + b in its own way, and what branches add."""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .._graph.modules import is_bare
from .._kernels.linears import add_beside
from .._kernels.through import through
from .fsdp import change_class
from .packings import Packing, ReadsW, packing_of
from .quantised import PackedLayer
from .reading import branches_beside
from .regions import EJECTING, Adapted, make_class, users_class


def call_layer(
    layer: nn.Module, forward: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """Return what the layer's own `forward` gives, and sum s (x A^T) B^T; x is the first argument.

    The gradient for x is dY W of the dequantised W where the table knows how to read that, else
    what the layer's operators give.
    """
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    rest = {name: value for name, value in kwargs.items() if value is not x}

    def product(x: Tensor) -> Tensor:
        return forward(layer, x, *args[1:], **(kwargs if args else rest))

    row = packing_of(layer)
    if row is None:
        y = product(x)
    else:
        y = through(x, product, _reader(layer, row, x), row.derives(layer))
    branches = branches_beside(layer, "weight")
    if all(map(is_bare, branches)):
        return add_beside(x, y, [addend for branch in branches for addend in branch.addends(None)])
    for branch in branches:
        y = branch(x, y)
    return y


class Called(Adapted, PackedLayer):
    """A layer that computes x W^T + b by itself from a packed W: that, and what branches add."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return call_layer(self, self._user_class.forward, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        if EJECTING.get():
            return super().__reduce__()
        return _blank, (self._user_class,), self.__dict__


def adapt_layer(module: nn.Module) -> None:
    """Let a layer that computes x W^T + b by itself add what the branches beside W do."""
    if not isinstance(module, Called):
        change_class(module, _derived(users_class(module)))


def _blank(user_class: type[nn.Module]) -> nn.Module:
    return object.__new__(_derived(user_class))


_CLASSES: weakref.WeakValueDictionary[Any, type[Adapted]] = weakref.WeakValueDictionary()


def _derived(user_class: type[nn.Module]) -> type[Adapted]:
    made = _CLASSES.get(user_class)
    if made is None:
        namespace = {"forward": Called.forward, "__reduce__": Called.__reduce__}
        made = _CLASSES[user_class] = make_class(user_class, Called, namespace)
    return made


def _reader(layer: nn.Module, row: Packing, x: Tensor) -> Callable[[], ReadsW]:
    """What gives, when it is asked, what reads W in the dtype in which x is multiplied."""
    return lambda: row.reads(layer, row.dtype(layer) or x.dtype)
