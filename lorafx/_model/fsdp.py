"""Models that FSDP2 (`fully_shard`) shards: their own parameters, classes, and plain copies."""

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import AdapterError, UnsupportedModelError
from .._graph.loaded import loaded
from .._graph.modules import LorafxModule
from .._kernels.private import composable_keys
from .shards import gathered, is_sharded


_MADE_BY = "torch.distributed.fsdp."  # the modules of the hooks that it registers
_MARKS = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")  # that it leaves on modules
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks",
          "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")


def _mixin() -> Any:
    """The class that a sharded module's class has over its own; None if FSDP was not imported."""
    return loaded("torch.distributed.fsdp", "FSDPModule")


def fsdp_modules(model: nn.Module) -> Iterator[Any]:
    """The modules of a model that `fully_shard` was called on."""
    mixin = _mixin()  # has a subclass as soon as one module of this process is sharded
    for module in model.modules() if mixin is not None and mixin.__subclasses__() else ():
        if isinstance(module, mixin):
            yield module


def settle(model: nn.Module) -> None:
    """Let a sharded model hold its own parameters, not what a forward pass gathered or cast."""
    for module in fsdp_modules(model):
        module.reshard()


def notice_what_trains(model: nn.Module) -> None:
    """Let FSDP2 reduce gradients in the dtype of what trains now, which it notes only once."""
    for module in fsdp_modules(model):
        try:
            _note_dtypes(module)
        except AssertionError as error:
            raise AdapterError(
                f"FSDP reduces the gradients of a module together, so that adapters of several "
                f"dtypes cannot train at once ({error}): activate one of them, or give all the "
                "same dtype.") from error


def managed_modules(model: nn.Module) -> set[nn.Module]:
    """All modules whose parameters FSDP2 gathers for their forward passes."""
    found: set[nn.Module] = set()
    for module in fsdp_modules(model):
        found.update(module.modules())
    return found


def own_class(cls: Any) -> Any:
    """The class that `fully_shard` derived this one from, or itself."""
    mixin = _mixin()
    return cls.__bases__[-1] if mixin is not None and issubclass(cls, mixin) else cls


_CLASSES: weakref.WeakValueDictionary[Any, type] = weakref.WeakValueDictionary()


def change_class(module: nn.Module, cls: type) -> None:
    """Give a module another class of its own; where FSDP2 put its mixin over it, that stays."""
    sharded: Any = type(module)
    if own_class(sharded) is not sharded:
        key = sharded, cls
        made = _CLASSES.get(key)
        if made is None:
            contents = {name: value for name, value in vars(sharded).items()
                        if name not in ("__dict__", "__weakref__")}
            bases = (*sharded.__bases__[:-1], cls)
            made = _CLASSES[key] = type(sharded)(sharded.__name__, bases, contents)
        cls = made
    module.__class__ = cls


def check_beside(weight: Tensor, site: str, adapter: str) -> None:
    """Raise unless what trains beside a weight can be spread as FSDP2 spreads it, and it alone."""
    order = ("lorafx.add or lorafx.load it before the model is sharded, then parallelize_module, "
             "then fully_shard.")
    if not is_sharded(weight):
        raise UnsupportedModelError(
            f"Gradients of adapter {adapter!r} at '{site}' would not be reduced, as FSDP ignores "
            f"the weight there: {order}")
    if _is_split_twice(weight):
        raise UnsupportedModelError(
            f"Adapter {adapter!r} cannot be put into this model now, as tensor parallelism splits "
            f"'{site}' and FSDP splits it again: {order}")


def _is_split_twice(weight: Tensor) -> bool:
    """True if others split it too than FSDP2, which replicates and splits along the last axis."""
    others = weight.placements[:-1]  # type: ignore[attr-defined]
    return weight.device_mesh.ndim > 2 or not all(  # type: ignore[attr-defined]
        placement.is_replicate() for placement in others)


class FSDPCopy:
    """What it takes to copy a model that FSDP2 shards as a plain one.

    Made with deepcopy's memo, in which it puts whole parameters; `modules` are those to copy by
    their `state_without_fsdp`, and `finish` cleans the copy.
    """

    def __init__(self, model: nn.Module, memo: dict[int, Any]) -> None:
        self.modules = list(fsdp_modules(model))
        settle(model)
        for module in self.modules:  # what its hooks are bound to is not to be copied
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
                if _is_fsdps(hook):
                    state = getattr(hook, "__self__", None)
                    memo[id(state)] = state
        self.gathered: set[nn.Parameter] = set()
        for module in managed_modules(model):
            if not isinstance(module, LorafxModule):
                self.gathered.update(filter(is_sharded, module.parameters(recurse=False)))
        for parameter in model.parameters():  # in this order in each process
            if parameter in self.gathered:
                memo[id(parameter)] = nn.Parameter(_whole(parameter), parameter.requires_grad)

    def finish(self, twin: nn.Module) -> None:
        """Take away from the copy what `fully_shard` hooked to its modules and marked them with."""
        for module in twin.modules() if self.modules else ():
            for table in _HOOKS:
                hooks: dict[int, Any] = vars(module)[table]
                for number in [number for number, hook in hooks.items() if _is_fsdps(hook)]:
                    del hooks[number]
            for mark in _MARKS:
                vars(module).pop(mark, None)


def _whole(parameter: nn.Parameter) -> Tensor:
    if _is_split_twice(parameter):
        raise UnsupportedModelError(
            "A model cannot be taken out of FSDP where tensor parallelism splits its weights too: "
            "lorafx.save the adapter, lorafx.load it into the base in one process, merge there.")
    try:
        return gathered(parameter.detach())
    except torch.OutOfMemoryError as error:
        raise UnsupportedModelError(
            "The whole model does not fit into the memory of one process: lorafx.save the adapter "
            "and fold it into the base's files, `lorafx merge BASE ADAPTER -o MERGED`.") from error


def _is_fsdps(hook: Any) -> bool:
    return f"{getattr(hook, '__module__', '')}.".startswith(_MADE_BY)


def state_without_fsdp(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module but for what `fully_shard` keeps for itself."""
    keys = {*_MARKS, *(composable_keys() if _mixin() is not None else ())}
    # without what .compile() made, which would run this one
    state = nn.Module.__getstate__(module)  # type: ignore[no-untyped-call]
    return {name: value for name, value in state.items() if name not in keys}


def _note_dtypes(module: Any) -> None:
    """Let a module of FSDP2's see the dtypes of what trains again; AssertionError for several.

    Without these: it goes by what it saw in its first forward pass, and says so if that is wrong.
    """
    try:
        groups = module._get_fsdp_state()._fsdp_param_groups
        notes = [group._init_mp_dtypes for group in groups]
    except AttributeError:
        return
    for note in notes:
        note()
