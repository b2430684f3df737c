"""The copy of a model's structure on the same weights."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from .._errors import UnsupportedModelError
from .._graph.dispatched import rebind_copy, shared_by_copies
from .._graph.modules import all_modules
from .._kernels.private import make_subclass, storage_key
from .fsdp import FSDPCopy, own_class, state_without_fsdp
from .places import base_parameters
from .quantised import twins_of_records
from .regions import EJECTING, is_plain_graph, users_class, users_state
from .root import GraphCall
from .shards import local_part


M = TypeVar("M", bound=nn.Module)


def keep_attributes(module: fx.GraphModule) -> None:
    """Let copies and pickles of an injected GraphModule keep what its graph does not read.

    Its class is its own, made by fx for this one instance, and pins what calls of it use.
    """
    cls: Any = type(module)
    cls._wrapped_call = GraphCall(cls._wrapped_call)
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


def share(model: M, ejecting: bool = False) -> M:
    """A copy of the model's structure on the same weights.

    Its Parameters are new ones on the old storage, its other tensors are cloned. `ejecting` undoes
    `make_region` and `adapt_attribute` in the copy, and leaves out what lorafx added to these
    modules. A model that FSDP2 shards is gathered, and the copy a plain one.
    """
    memo: dict[int, Any] = {}
    fsdp = FSDPCopy(model, memo)
    modules = [module for _, module in all_modules(model)]
    storages = set()
    for parameter in _all(module._parameters for module in modules):
        storages.add(storage_key(parameter.untyped_storage()))
        if id(parameter) not in memo:
            memo[id(parameter)] = same_kind(parameter, parameter.detach())
    for buffer in _all(module._buffers for module in modules):  # a parameter's view stays one
        if storage_key(buffer.untyped_storage()) in storages:
            memo[id(buffer)] = buffer.detach()
    for module in modules:
        _note_twins(module, memo)
    graphs = [module for module in modules if is_plain_graph(module)]
    for module in graphs:  # their own deepcopy drops hooks and plain attributes
        cls = own_class(type(module))
        memo[id(module)] = cls.__new__(cls)
    sharded = [module for module in fsdp.modules if module not in graphs]
    for module in sharded:
        memo[id(module)] = object.__new__(users_class(module))
    token = EJECTING.set(ejecting)
    try:
        with CopyNonLeaves():
            for module in graphs:
                _copy_attributes(module, memo[id(module)], memo)
            for module in sharded:
                memo[id(module)].__dict__.update(copy.deepcopy(users_state(module), memo))
            twin = copy.deepcopy(model, memo)
    except (TypeError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"This {type(model).__name__} cannot be copied: {error}. Remove the attribute that "
            "holds it, or give its class a __deepcopy__.") from error
    finally:
        EJECTING.reset(token)
    for module in graphs:
        memo[id(module)].recompile()
    fsdp.finish(twin)
    for copied in modules:
        if id(copied) in memo:
            rebind_copy(copied, memo[id(copied)], memo)
    # a packed one knows its layer, and how it is packed
    for parameter in _all(module._parameters for _, module in all_modules(twin)):
        for name, value in vars(parameter).items():
            vars(parameter)[name] = memo.get(id(value), value)
    _check_shared(model, twin, fsdp.gathered)
    return twin


def same_kind(parameter: nn.Parameter, data: Tensor) -> nn.Parameter:
    """A Parameter of the same class, flags and attributes, on other data."""
    cls = type(parameter)  # of a Parameter that holds a tensor of a class of its own, that class
    of_its_own = not issubclass(cls, nn.Parameter)
    twin: nn.Parameter = (nn.Parameter(data, parameter.requires_grad) if of_its_own
                          else make_subclass(cls, data, parameter.requires_grad))
    twin.__dict__.update(parameter.__dict__)
    return twin


def _all(tables: Iterable[Mapping[str, Any]]) -> Iterator[Any]:
    """The tensors in these tables."""
    for table in tables:
        yield from (tensor for tensor in table.values() if tensor is not None)


def _note_twins(module: nn.Module, memo: dict[int, Any]) -> None:
    """Note what a copy of a module has in the place of what is no tensor of its own."""
    memo |= twins_of_records(module)
    for value in shared_by_copies(module):
        memo[id(value)] = value
    for value in vars(module).values():  # its dozen of tables of hooks, which deepcopy is slow at
        if type(value) in (OrderedDict, set) and not value:
            memo.setdefault(id(value), type(value)())


def _copy_attributes(module: nn.Module, twin: nn.Module, memo: dict[int, Any]) -> None:
    twin.__dict__.update(copy.deepcopy(state_without_fsdp(module), memo))
    twin.__dict__["_graph"].owning_module = twin


def _check_shared(model: nn.Module, twin: nn.Module, gathered: set[nn.Parameter]) -> None:
    """Raise unless the copy has all weights of the model, on the same storage.

    A class with a __deepcopy__ of its own may have made new weights; training those would waste
    memory unseen.
    """
    twins = base_parameters(twin)
    for name, parameter in base_parameters(model).items():
        if parameter in gathered:
            continue
        if name not in twins or _storages_of(twins[name]) != _storages_of(parameter):
            raise UnsupportedModelError(
                f"Copying this {type(model).__name__} did not keep the weight '{name}': some class "
                "on the way has a __deepcopy__ that makes new weights. Let it pass `memo` on to "
                "copy.deepcopy.")


def _storages_of(tensor: Any) -> list[int]:
    """The storage of a tensor, or those of the tensors that it is made of."""
    tensor = local_part(tensor)
    flatten = getattr(tensor, "__tensor_flatten__", None)  # torch's protocol of wrapping classes
    if flatten is None:
        return [storage_key(tensor.untyped_storage())]
    found: list[int] = []
    for name in flatten()[0]:
        found += _storages_of(getattr(tensor, name))
    return found


class CopyNonLeaves(TorchFunctionMode):
    """Lets deepcopy copy tensors that autograd made, as caches and weight_norm hold, by value."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            return memo.setdefault(id(tensor), tensor.detach().clone())
        return func(*args, **(kwargs or {}))
