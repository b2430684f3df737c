"""The classes of injected modules: a region is an `fx.GraphModule` that keeps its user's class."""

import abc
import contextvars
import copy
import functools
import itertools
import linecache
import types
import weakref
from collections.abc import Iterator
from typing import Any, TypeGuard

from torch import Tensor, fx, nn

from .._graph.functions import package
from .._graph.modules import LorafxModule
from .branches import spread
from .layer_calls import call_layer
from .lower import LinearForward, forward_of, lower
from .quantised import PackedLayer
from .readers import GENERATED, Answer, answer
from .reading import FROZEN_PREFIX, adapted, adapted_names, base_or_trained, branches_beside


# What `fx.GraphModule` keeps on an instance beside the module's own attributes.
_STATE: dict[str, Any] = {
    "meta": dict, "_replace_hooks": list, "_create_node_hooks": list, "_erase_node_hooks": list,
    "_deepcopy_hooks": list, "_tracer_extras": dict, "_tracer_cls": lambda: None,
    "shape_env": lambda: None,
    "_joining": lambda: True}  # this one is ours
_RESERVED = frozenset({
    *_STATE, "graph", "_graph", "code", "_code", "recompile", "_user_class", "_linear"})
_COPYING = frozenset("""
    __deepcopy__ __copy__ __reduce__ __reduce_ex__ __getstate__ __setstate__ __new__
    __getattribute__ __init_subclass__
""".split())
EJECTING = contextvars.ContextVar("ejecting", default=False)  # True: copies are the user's classes'


class Adapted(nn.Module):
    """A module of which Python reads adapted weights: `weight` is W + s B A, `frozen_weight` is W.

    Its class derives from the user's, which keeps precedence; `_adapted` names the tensors.
    """

    _user_class: type[nn.Module]
    _adapted: tuple[str, ...] = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Calling the class makes what it always made: a plain instance of the user's class."""
        return cls._user_class(*args, **kwargs)

    def named_modules(
        self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """As ever; but who replaces the tensors of this very layer finds no adapter in it."""
        if memo is None and answer(through=nn.Module.__module__) is Answer.LAYER:
            yield prefix, self
        else:
            yield from super().named_modules(memo, prefix, remove_duplicate)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As ever; where W is now spread over processes, the factors beside it are too."""
        super().register_parameter(name, param)
        if param is not None and name in self._adapted:
            for branch in branches_beside(self, name):
                spread(branch, param)

    def _replicate_for_data_parallel(self) -> Any:
        """As nn.Module does it, but for its call of __new__: a replica has no own parameters."""
        twin = copy.copy(self)
        twin.__dict__.update(_parameters={}, _buffers=self._buffers.copy(),
                             _modules=self._modules.copy(), _is_replica=True)
        return twin

    def __copy__(self) -> "Adapted":
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    # By __reduce__: a parent that hands its child's attributes on must not hand this on.
    __deepcopy__ = None

    def __reduce__(self) -> tuple[Any, ...]:
        if not EJECTING.get():
            called = isinstance(self, Called)
            return _blank, (self._user_class, self._adapted, called), self.__dict__
        ours = (*_STATE, "_graph") if isinstance(self, Region) else ()
        state = {name: value for name, value in self.__dict__.items() if name not in ours}
        state["_modules"] = {name: child for name, child in self._modules.items()
                             if not isinstance(child, LorafxModule)}
        return object.__new__, (self._user_class,), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if "_graph" in state:
            make_region(self, state["_graph"], state["_joining"])


class Region(Adapted, fx.GraphModule):  # type: ignore[misc]  # copies are made in another way
    """A module whose forward is generated from `graph`, as it is lowered; `code` shows it.

    All regions of one user class with the same code share one class, made by `recompile`: compiled
    layer by layer, they share one compiled forward too.
    """

    _python_code: fx.graph.PythonCode
    _linear: LinearForward | None = None  # what it computes, if that is one linear call and no more

    def recompile(self) -> fx.graph.PythonCode:
        """Swap in the class that holds the forward generated from the graph as it is now."""
        make_region(self, self._graph, self.__dict__["_joining"])
        return type(self)._python_code

    __str__ = nn.Module.__repr__


class Called(Adapted, PackedLayer):
    """A layer that computes x W^T + b by itself from a packed W: that, and what branches add."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return call_layer(self, self._user_class.forward, args, kwargs)


def is_plain_graph(module: nn.Module) -> TypeGuard[fx.GraphModule]:
    """True for a GraphModule of the caller's, which is not a region."""
    return isinstance(module, fx.GraphModule) and not isinstance(module, Region)


def _blank(
    user_class: type[nn.Module], names: tuple[str, ...], called: bool = False
) -> nn.Module:
    return object.__new__(_derived_call(user_class) if called else _derived(user_class, names))


def make_region(module: nn.Module, graph: fx.Graph, join: bool) -> None:
    """Make this very module a region: its forward is now the graph's.

    `join`: compute linear calls on one value together.
    """
    for name, make in _STATE.items():
        module.__dict__.setdefault(name, make())
    module.__dict__.update(_graph=graph, _joining=join)
    graph.owning_module = module  # type: ignore[assignment]
    cls: Any = type(module)
    lowered = lower(module, graph, join)
    code = lowered.python_code(root_module="self")
    if lowered is not graph:
        code._lineno_map = {}  # from lines to nodes of `graph`, for a compiler's messages
    user_class = getattr(cls, "_user_class", cls)
    module.__class__ = _derived(user_class, adapted_names(module), code, forward_of(lowered))


def adapt_attribute(module: nn.Module, attribute: str) -> None:
    """Let Python read this tensor of a module as adapted, and as it is under its frozen name."""
    cls: Any = type(module)
    if attribute in adapted_names(module):
        return
    names, user_class = (*adapted_names(module), attribute), getattr(cls, "_user_class", cls)
    if issubclass(cls, Region):
        module.__class__ = _derived(user_class, names, cls._python_code, cls._linear)
    else:
        module.__class__ = _derived(user_class, names)


def adapt_layer(module: nn.Module) -> None:
    """Let a layer that computes x W^T + b by itself add what the branches beside W do."""
    if not isinstance(module, Called):
        module.__class__ = _derived_call(type(module))


def why_not_region(module: nn.Module) -> str | None:
    """Why this module could not become a region even though its forward can be traced, or None."""
    attributes = vars(module).keys() | module._modules.keys() | module._parameters.keys()
    taken = sorted(_RESERVED & attributes)
    if taken:
        return f"its attribute '{taken[0]}' is one that a graph module needs"
    return _why_not_defined(type(module), _RESERVED) or why_not_adapted(module)


def _why_not_defined(cls: type, names: frozenset[str]) -> str | None:
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


def why_not_adapted(module: nn.Module) -> str | None:
    """Why no class can be derived from this module's, or None."""
    cls: Any = type(module)
    return _why_not_derived(cls)


@functools.lru_cache(maxsize=None)
def _why_not_derived(user_class: type) -> str | None:
    if issubclass(user_class, Adapted):
        return None
    if type(user_class) not in (type, abc.ABCMeta):
        return f"its class has a metaclass of its own, {type(user_class).__name__}"
    defined = _why_not_defined(user_class, _COPYING)
    if defined is not None:
        return defined
    try:
        blank = object.__new__(user_class)
        blank.__class__ = _make_class(user_class, Region, {})
    except TypeError as error:
        return f"its class cannot be derived from ({error})"
    return None


def _make_class(user_class: type, base: type[Adapted], namespace: dict[str, Any]) -> type[Adapted]:
    contents = {name: value for name, value in vars(Adapted).items() if name in _COPYING}
    contents |= {"__module__": user_class.__module__, "__qualname__": user_class.__qualname__,
                 "__doc__": user_class.__doc__, "_user_class": user_class, **namespace}
    plain = issubclass(base, user_class)  # as of a plain nn.Module
    bases = (base,) if plain else (user_class, base)
    made: type[Adapted] = types.new_class(
        user_class.__name__, bases, exec_body=lambda own: own.update(contents))
    return made


_CLASSES: weakref.WeakValueDictionary[Any, type[Adapted]] = weakref.WeakValueDictionary()
_SERIAL = itertools.count()


def _derived(
    user_class: type[nn.Module], names: tuple[str, ...], code: fx.graph.PythonCode | None = None,
    forward: LinearForward | None = None,
) -> type[Adapted]:
    """The class, one for each user class, set of adapted names and generated forward."""
    source: Any = None
    if code is not None:
        identities = sorted((name, id(value)) for name, value in code.globals.items())
        source = code.src, tuple(identities)
    key = user_class, names, source
    if key not in _CLASSES:
        namespace: dict[str, Any] = {"_adapted": names}
        for name in names:
            namespace[name] = _adapted_property(name)
            namespace[FROZEN_PREFIX + name] = _frozen_property(name)
        if code is not None:
            namespace |= _compiled(user_class, code) | {"_linear": forward}
        made = _make_class(user_class, Adapted if code is None else Region, namespace)
        if code is not None:
            filename = namespace["forward"].__code__.co_filename
            weakref.finalize(made, linecache.cache.pop, filename, None)
        _CLASSES[key] = made
        return made
    return _CLASSES[key]


def _derived_call(user_class: type[nn.Module]) -> type[Adapted]:
    """The class of a layer that computes by itself."""
    key = user_class, (), Called
    made = _CLASSES.get(key)
    if made is None:
        namespace = {"forward": Called.forward}
        made = _CLASSES[key] = _make_class(user_class, Called, namespace)
    return made


def _compiled(user_class: type[nn.Module], code: fx.graph.PythonCode) -> dict[str, Any]:
    filename = f"{GENERATED}{user_class.__qualname__} {next(_SERIAL)}>"
    source = code.src.strip() + "\n"
    linecache.cache[filename] = len(source), None, source.splitlines(keepends=True), filename
    names = dict(code.globals)
    exec(compile(source, filename, "exec"), names)
    return {"forward": names["forward"], "_code": source, "_python_code": code,
            "_lineno_map": code._lineno_map, "_prologue_start": code._prologue_start}


def _adapted_property(name: str) -> property:
    def read(self: nn.Module) -> Tensor:
        return adapted(self, name)

    def write(self: nn.Module, value: Any) -> None:  # not a Parameter: those are registered
        vars(self)[name] = value

    def delete(self: nn.Module) -> None:
        del vars(self)[name]

    return property(read, write, delete, doc=f"{name} + s B A, over the active adapters.")


def _frozen_property(name: str) -> property:
    def read(self: nn.Module) -> Any:
        return base_or_trained(self, name)

    return property(read, doc=f"{name} without the branches beside it.")
