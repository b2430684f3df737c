"""The classes of injected modules: a region is an `fx.GraphModule` that keeps its user's class."""

import abc
import contextvars
import copy
import functools
import inspect
import linecache
import types
import weakref
from collections.abc import Iterator
from typing import Any, TypeGuard

from torch import fx, nn

from .._graph.dispatched import rebind
from .._graph.functions import why_not_defined
from .._graph.modules import LorafxModule
from .branches import spread
from .direct import LinearForward
from .fsdp import change_class, own_class, state_without_fsdp
from .generated import (
    adapted_property, compiled, frozen_property, resetting_base, standing_property
)
from .lower import forward_of, lower
from .readers import Answer, answer, can_spread
from .reading import FROZEN_PREFIX, STANDING_PREFIX, adapted_names, branches_beside, followers
from .rebinding import watch_registered
from .record import RECORD
from .root import Root, forward_of_torch
from .shards import check_meshes
from .trained import Trained


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
    __getattribute__
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

    def _hidden(self) -> set[nn.Module]:
        """What is not there for who replaces the tensors of this module."""
        spreading = can_spread() and answer(nn.Module.__module__) is Answer.LAYER
        return followers(self) if spreading else set()

    def named_modules(
        self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """As ever; but who replaces the tensors of layers finds nothing of lorafx's in them."""
        memo = set() if memo is None else memo
        memo.update(self._hidden())
        yield from super().named_modules(memo, prefix, remove_duplicate)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """As ever, but for the same."""
        hidden = self._hidden()
        yield from (item for item in super().named_children() if item[1] not in hidden)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As ever; where W is now spread over processes, what adapters have in its place is too."""
        beside = branches_beside(self, name) if name in self._adapted else []
        check_meshes(param, [factor for branch in beside for factor in branch.parameters()])
        if name in self._adapted and name not in vars(self):
            self._parameters.setdefault(name, None)  # else a set of `trained` is taken for it
        super().register_parameter(name, param)
        for branch in beside:
            spread(branch, param)
        trained = self._modules.get("trained")
        if isinstance(trained, Trained):
            trained.spread(name, param)

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
            state = nn.Module.__getstate__(self)  # type: ignore[no-untyped-call]
            return _blank, (self._user_class, self._adapted), state
        return object.__new__, (self._user_class,), users_state(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        watch_registered(self)
        if "_graph" in state:
            make_region(self, state["_graph"], state["_joining"])
        elif RECORD in state:
            pin_calls(self)


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


def users_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before lorafx and FSDP2 derived others from it."""
    cls: type[nn.Module] = own_class(type(module))
    return getattr(cls, "_user_class", cls)


def users_state(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module but for those that lorafx and FSDP2 added."""
    ours = (*_STATE, "_graph") if isinstance(module, Region) else ()
    state = {name: value for name, value in state_without_fsdp(module).items()
             if name not in ours}
    state["_modules"] = {name: child for name, child in module._modules.items()
                         if not isinstance(child, LorafxModule)}
    return state


def is_plain_graph(module: nn.Module) -> TypeGuard[fx.GraphModule]:
    """True for a GraphModule of the caller's, which is not a region."""
    return isinstance(module, fx.GraphModule) and not isinstance(module, Region)


def _blank(user_class: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    return object.__new__(_derived(user_class, names))


def make_region(module: nn.Module, graph: fx.Graph, join: bool) -> None:
    """Make this very module a region: its forward is now the graph's.

    `join`: compute linear calls on one value together.
    """
    for name, make in _STATE.items():
        module.__dict__.setdefault(name, make())
    module.__dict__.update(_graph=graph, _joining=join)
    graph.owning_module = module  # type: ignore[assignment]
    lowered = lower(module, graph, join)
    code = lowered.python_code(root_module="self")
    if lowered is not graph:
        code._lineno_map = {}  # from lines to nodes of `graph`, for a compiler's messages
    _derive(module, adapted_names(module), code, forward_of(lowered))


def adapt_attribute(module: nn.Module, attribute: str) -> None:
    """Let Python read this tensor of a module as adapted, and as it is under its frozen name."""
    if attribute not in adapted_names(module):
        _derive(module, (*adapted_names(module), attribute))


def pin_calls(model: nn.Module) -> None:
    """Let each call of an injected model use to its end what was active when it began."""
    _derive(model, adapted_names(model))


def _derive(
    module: nn.Module, names: tuple[str, ...], code: fx.graph.PythonCode | None = None,
    forward: LinearForward | None = None,
) -> None:
    """Give a module the class for these adapted names and, if this is new, a generated forward."""
    cls: Any = own_class(type(module))
    if code is None and issubclass(cls, Region):
        code, forward = cls._python_code, cls._linear
    made = _derived(users_class(module), names, code, forward, RECORD in vars(module))
    change_class(module, made)
    rebind(module, cls)
    watch_registered(module)


def why_not_region(module: nn.Module) -> str | None:
    """Why this module could not become a region even though its forward can be traced, or None."""
    attributes = vars(module).keys() | module._modules.keys() | module._parameters.keys()
    taken = sorted(_RESERVED & attributes)
    if taken:
        return f"its attribute '{taken[0]}' is one that a graph module needs"
    return why_not_defined(users_class(module), _RESERVED) or why_not_adapted(module)


def why_not_adapted(module: nn.Module) -> str | None:
    """Why no class can be derived from this module's, or None."""
    return _why_not_derived(own_class(type(module)))


@functools.lru_cache(maxsize=None)
def _why_not_derived(user_class: type) -> str | None:
    if issubclass(user_class, Adapted):
        return None
    if type(user_class) not in (type, abc.ABCMeta):
        return f"its class has a metaclass of its own, {type(user_class).__name__}"
    defined = why_not_defined(user_class, _COPYING)
    if defined is not None:
        return defined
    try:
        blank = object.__new__(user_class)
        blank.__class__ = make_class(user_class, Region, {})
    except TypeError as error:
        return f"its class cannot be derived from ({error})"
    return None


class _Unannounced:
    """Comes first among the bases of a class, so that no `__init_subclass__` hears of that."""

    def __init_subclass__(cls) -> None:
        pass


def make_class(
    user_class: type, base: type[Adapted], namespace: dict[str, Any], is_root: bool = False
) -> type[Adapted]:
    """A class of the same name that derives from the user's and, in second place, from a base."""
    contents = {name: value for name, value in vars(Adapted).items() if name in _COPYING}
    # compilers fix the shapes of all that they reach through classes of torch's own layers
    module = user_class.__module__
    contents |= {"__module__": __name__ if module.startswith("torch.") else module,
                 "__qualname__": user_class.__qualname__, "__doc__": user_class.__doc__,
                 "_user_class": user_class, **namespace}
    plain = issubclass(base, user_class)  # as of a plain nn.Module
    bases: tuple[type, ...] = (base,) if plain else (_Unannounced, user_class, base)
    if is_root:
        bases, contents = (Root, *bases), forward_of_torch(user_class) | contents
    made: type[Adapted] = types.new_class(
        user_class.__name__, bases, exec_body=lambda own: own.update(contents))
    return made


_CLASSES: weakref.WeakValueDictionary[Any, type[Adapted]] = weakref.WeakValueDictionary()


def _derived(
    user_class: type[nn.Module], names: tuple[str, ...], code: fx.graph.PythonCode | None = None,
    forward: LinearForward | None = None, is_root: bool = False,
) -> type[Adapted]:
    """The class, one for each user class, set of adapted names and generated forward."""
    source: Any = None
    if code is not None:
        identities = sorted((name, id(value)) for name, value in code.globals.items())
        source = code.src, tuple(identities)
    key = user_class, names, source, is_root
    if key not in _CLASSES:
        namespace: dict[str, Any] = {"_adapted": names}
        for name in names:
            namespace[name] = adapted_property(name)
            namespace[FROZEN_PREFIX + name] = frozen_property(name)
            namespace[STANDING_PREFIX + name] = standing_property(name)
        reset = getattr(user_class, "reset_parameters", None)
        if isinstance(reset, types.FunctionType):
            namespace["reset_parameters"] = resetting_base(reset)
        if code is not None:
            namespace |= compiled(user_class, code, forward) | {"_linear": forward}
        base = Adapted if code is None else Region
        made = make_class(user_class, base, namespace, is_root)
        if code is not None:
            filename = inspect.unwrap(namespace["forward"]).__code__.co_filename
            weakref.finalize(made, linecache.cache.pop, filename, None)
        _CLASSES[key] = made
        return made
    return _CLASSES[key]
