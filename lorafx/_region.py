"""The region class, an `fx.GraphModule` that keeps its user's class, and the copy of a model that shares weights."""

import abc
import copy
import functools
import itertools
import linecache
import types
import typing
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from ._errors import UnsupportedModelError

M = TypeVar("M", bound=nn.Module)

# What `fx.GraphModule` keeps on an instance beside the module's own attributes.
_STATE: dict[str, Any] = {
    "meta": dict, "_replace_hooks": list, "_create_node_hooks": list, "_erase_node_hooks": list,
    "_deepcopy_hooks": list, "_tracer_extras": dict, "_tracer_cls": lambda: None, "shape_env": lambda: None}
_RESERVED = frozenset({*_STATE, "graph", "_graph", "code", "_code", "recompile", "_user_class"})
_COPYING = ("__deepcopy__", "__copy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__new__")


class Region(fx.GraphModule):
    """A module whose forward is generated from `graph`. Its class derives from the user's, which keeps precedence.

    All regions of one user class with the same code share one class, made by `recompile`: compiled layer by layer,
    they share one compiled forward too.
    """

    _user_class: type[nn.Module]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Calling the class makes what it always made: a plain instance of the user's class."""
        return cls._user_class(*args, **kwargs)

    def recompile(self) -> fx.graph.PythonCode:
        """Swap in the class that holds the forward generated from the graph as it is now."""
        code = self._graph.python_code(root_module="self")
        self.__class__ = _region_class(self._user_class, code)
        return code

    __str__ = nn.Module.__repr__

    def _replicate_for_data_parallel(self) -> Any:
        """As nn.Module does it, but for its call of __new__: a replica has no parameters of its own."""
        twin = copy.copy(self)
        own = {"_parameters": {}, "_buffers": self._buffers.copy(), "_modules": self._modules.copy()}
        twin.__dict__.update(own, _is_replica=True)
        return twin

    def __copy__(self) -> "Region":
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> "Region":
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        _copy_attributes(self, twin, memo)
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return _blank, (self._user_class,), self.__dict__, None, None, _restore


def _blank(user_class: type[nn.Module]) -> nn.Module:
    return object.__new__(user_class)


def _restore(module: nn.Module, state: dict[str, Any]) -> None:
    module.__dict__.update(state)
    convert(module, state["_graph"])


def convert(module: nn.Module, graph: fx.Graph) -> None:
    """Make this very module a region: its forward is now the graph's."""
    module.__dict__.update({name: make() for name, make in _STATE.items()} | module.__dict__)
    module.__dict__["_graph"] = graph
    graph.owning_module = module  # type: ignore[assignment]
    module.__class__ = _region_class(type(module), graph.python_code(root_module="self"))


def revert(module: Region) -> None:
    """Undo `convert`: the user's class, and no attribute of a region."""
    module.__class__ = module._user_class  # type: ignore[assignment]
    for name in (*_STATE, "_graph"):
        del module.__dict__[name]


def why_not_region(module: nn.Module) -> str | None:
    """Why this module could not become a region even though its forward can be traced, or None."""
    taken = sorted(_RESERVED & (vars(module).keys() | module._modules.keys() | module._parameters.keys()))
    if taken:
        return f"its attribute '{taken[0]}' is one that a graph module needs"
    return _why_not_class(type(module))  # type: ignore[arg-type]


@functools.lru_cache(maxsize=None)
def _why_not_class(user_class: type[nn.Module]) -> str | None:
    for name in (*sorted(_RESERVED), *_COPYING, "__getattribute__", "__init_subclass__"):
        definers = [c for c in user_class.__mro__ if name in vars(c) and c not in (nn.Module, typing.Generic, object)]
        if definers:
            return f"{definers[0].__name__} defines '{name}' itself"
    if type(user_class) not in (type, abc.ABCMeta):
        return f"its class has a metaclass of its own, {type(user_class).__name__}"
    try:
        blank = object.__new__(user_class)
        blank.__class__ = _make_class(user_class, {})
    except TypeError as error:
        return f"its class cannot be derived from ({error})"
    return None


def _make_class(user_class: type[nn.Module], namespace: dict[str, Any]) -> type[Region]:
    namespace |= {"__module__": user_class.__module__, "__qualname__": user_class.__qualname__,
                  "__doc__": user_class.__doc__, "_user_class": user_class}
    made: type[Region] = types.new_class(user_class.__name__, (user_class, Region),
                                         exec_body=lambda n: n.update(namespace))
    return made


_CLASSES: weakref.WeakValueDictionary[Any, type[Region]] = weakref.WeakValueDictionary()
_SERIAL = itertools.count()


def _region_class(user_class: type[nn.Module], code: fx.graph.PythonCode) -> type[Region]:
    key = user_class, code.src, tuple(sorted((name, id(value)) for name, value in code.globals.items()))
    if key not in _CLASSES:
        filename = f"<lorafx {user_class.__qualname__} {next(_SERIAL)}>"
        source = code.src.strip() + "\n"
        linecache.cache[filename] = len(source), None, source.splitlines(keepends=True), filename
        names = dict(code.globals)
        exec(compile(source, filename, "exec"), names)
        made = _make_class(user_class, {"forward": names["forward"], "_code": source, "_lineno_map": code._lineno_map,
                                        "_prologue_start": code._prologue_start})
        weakref.finalize(made, linecache.cache.pop, filename, None)
        _CLASSES[key] = made
        return made
    return _CLASSES[key]


def keep_attributes(module: fx.GraphModule) -> None:
    """Let copies and pickles of a caller's GraphModule keep the attributes that its graph does not read.

    Its class is its own, made by fx for this one instance.
    """
    cls: Any = type(module)
    cls.__deepcopy__ = _deepcopy_graph_module
    cls.__reduce__ = _reduce_graph_module


def _deepcopy_graph_module(module: fx.GraphModule, memo: dict[int, Any]) -> fx.GraphModule:
    twin = type(module).__new__(type(module))
    memo[id(module)] = twin
    _copy_attributes(module, twin, memo)
    twin.recompile()
    keep_attributes(twin)
    return twin


def _reduce_graph_module(module: fx.GraphModule) -> tuple[Any, ...]:
    return _rebuilt, fx.GraphModule.__reduce__(module)


def _rebuilt(rebuild: Callable[..., fx.GraphModule], arguments: tuple[Any, ...]) -> fx.GraphModule:
    module = rebuild(*arguments)
    keep_attributes(module)
    return module


def share(model: M) -> M:
    """A copy of the model's structure on the same weights: new Parameters on the old storage, other tensors cloned."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = same_kind(parameter, parameter.detach())
    storages = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    for buffer in model.buffers():  # a view of a parameter stays one
        if buffer.untyped_storage()._cdata in storages:
            memo[id(buffer)] = buffer.detach()
    graphs = [m for m in model.modules() if isinstance(m, fx.GraphModule) and not isinstance(m, Region)]
    for module in graphs:  # their own deepcopy drops hooks and plain attributes
        memo[id(module)] = type(module).__new__(type(module))
    try:
        with _CopyNonLeaves():
            for module in graphs:
                _copy_attributes(module, memo[id(module)], memo)
            twin = copy.deepcopy(model, memo)
    except (TypeError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"This {type(model).__name__} cannot be copied: {error}. Remove the attribute that holds it, or give its "
            "class a __deepcopy__.") from error
    for module in graphs:
        memo[id(module)].recompile()
    _check_shared(model, twin)
    return twin


def same_kind(parameter: nn.Parameter, data: Tensor) -> nn.Parameter:
    """A Parameter of the same class, flags and attributes, on other data."""
    twin = torch.Tensor._make_subclass(type(parameter), data, parameter.requires_grad)
    twin.__dict__.update(parameter.__dict__)
    return twin


def _copy_attributes(module: nn.Module, twin: nn.Module, memo: dict[int, Any]) -> None:
    twin.__dict__.update(copy.deepcopy(module.__dict__, memo))
    twin.__dict__["_graph"].owning_module = twin


def _check_shared(model: nn.Module, twin: nn.Module) -> None:
    """A class with a __deepcopy__ of its own may have made new weights; training those would waste memory unseen."""
    twins = dict(twin.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in twins or twins[name].untyped_storage()._cdata != parameter.untyped_storage()._cdata:
            raise UnsupportedModelError(
                f"Copying this {type(model).__name__} did not keep the weight '{name}': some class on the way has a "
                "__deepcopy__ that makes new weights. Let it pass `memo` on to copy.deepcopy.")


class _CopyNonLeaves(TorchFunctionMode):
    """Lets deepcopy pass over tensors that an autograd graph made (caches, old-style weight_norm), by their values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            return memo.setdefault(id(tensor), tensor.detach().clone())
        return func(*args, **(kwargs or {}))
