"""Trees of modules: what the user wrote, apart from what lorafx added, and where tensors are."""

import types
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._kernels.private import any_global_hook, compiled_call
from .dispatched import runs_class_forward
from .loaded import loaded


LAST_CHANGE: list[list[None]] = [[]]  # another list since something was set on a LorafxModule


class LorafxModule(nn.Module):
    """A module that lorafx added to the model, not part of the program that the user wrote.

    Each change of an attribute or a submodule of one is told in `LAST_CHANGE`. What is written into
    its tables (of tensors, hooks or modules) or its __dict__ past their methods is not.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        self._changed()

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        self._changed()

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As nn.Module has it."""
        super().add_module(name, module)
        self._changed()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._changed()

    def _changed(self) -> None:
        LAST_CHANGE[0] = []  # what compilers can trace, and do again at each call


class Place(NamedTuple):
    """Where a tensor is: the module that owns it and the attribute that holds it."""

    module: nn.Module
    attribute: str


# (module, class, child): a module of this class stands for its child, and adds no name to a path.
# A class is looked up only where its module is loaded, so that nothing is imported for it.
WRAPPERS = (
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel",
     "_fsdp_wrapped_module"),
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper",
     "_checkpoint_wrapped_module"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
)


def _wrappers() -> list[tuple[type, str]]:
    """(class, child) of the wrappers that this process can have."""
    found = []
    for where, name, child in WRAPPERS:
        cls = loaded(where, name)
        if cls is not None:
            found.append((cls, child))
    return found


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that stands behind wrappers, or itself."""
    return _behind(module, _wrappers())


def _behind(module: nn.Module, wrappers: list[tuple[type, str]]) -> nn.Module:
    inside = _inside(module, wrappers)
    return module if inside is None else _behind(inside, wrappers)


def _inside(module: nn.Module, wrappers: list[tuple[type, str]]) -> nn.Module | None:
    """What a wrapper wraps; None for what is no wrapper."""
    for cls, name in wrappers:
        if isinstance(module, cls) and module._modules.get(name) is not None:
            return module._modules[name]
    return None


def wrappers_of(model: nn.Module) -> list[nn.Module]:
    """The wrappers around what stands behind them, the outermost first."""
    wrappers, found = _wrappers(), []
    inside = _inside(model, wrappers)
    while inside is not None:
        found.append(model)
        model, inside = inside, _inside(inside, wrappers)
    return found


def named_modules(model: nn.Module, every_name: bool = False) -> list[tuple[str, nn.Module]]:
    """(path, module) as nn.Module has them, of what stands behind wrappers.

    With `every_name` a module stands under each of its names.
    """
    return _walk(model, _wrappers(), every_name)


def all_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) as nn.Module has them, of wrappers too: what is held, whoever asks."""
    return _walk(model, [], False)


def _walk(
    model: nn.Module, wrappers: list[tuple[type, str]], every_name: bool
) -> list[tuple[str, nn.Module]]:
    found: list[tuple[str, nn.Module]] = []
    seen: set[nn.Module] = set()
    classes = tuple([cls for cls, _ in wrappers])
    no_wrappers: set[type] = set()  # to ask about a class takes as long as all else here

    def walk(path: str, module: nn.Module) -> None:
        if type(module) not in no_wrappers:
            if isinstance(module, classes):
                module = _behind(module, wrappers)
            else:
                no_wrappers.add(type(module))
        if module in seen and not every_name:
            return
        seen.add(module)
        found.append((path, module))
        for name, child in module._modules.items():
            if child is not None:
                walk(f"{path}.{name}" if path else name, child)

    walk("", model)
    return found


def outermost(model: nn.Module, classes: tuple[type[nn.Module], ...]) -> list[nn.Module]:
    """The modules of these classes, each once, but for those below one of them.

    It takes a tenth of the time of `named_modules`, which makes paths.
    """
    found: list[nn.Module] = []
    seen: set[nn.Module] = set()
    ahead: list[nn.Module] = [model]
    while ahead:
        module = ahead.pop()
        if module in seen:
            continue
        seen.add(module)
        if isinstance(module, classes):
            found.append(module)
        else:
            ahead += [child for child in reversed(module._modules.values()) if child is not None]
    return found


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The module at a path, even where a property has the same name, behind all wrappers."""
    wrappers = _wrappers()
    model = _behind(model, wrappers)
    for name in path.split(".") if path else ():
        child = model._modules[name]
        assert child is not None
        model = _behind(child, wrappers)
    return model


def is_bare(module: nn.Module) -> bool:
    """True if calling a module does what its class's forward does and nothing more."""
    # not asked of the class: compilers compare the classes of all modules of which it is
    call = module.__call__
    if any_global_hook() or not isinstance(call, types.MethodType):
        return False
    if call.__func__ is not nn.Module.__call__:  # `getattr` with a default gives that to a compiler
        return False
    return not _hooked(module) and runs_class_forward(module) and compiled_call(module) is None


def _hooked(module: nn.Module) -> Any:
    return (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
            or module._backward_pre_hooks)


def hooks(module: nn.Module) -> list[Any]:
    """The functions that are hooked to a module's forward and backward."""
    tables = (module._forward_hooks, module._forward_pre_hooks,
              module._backward_hooks, module._backward_pre_hooks)
    return [hook for table in tables for hook in table.values()]


def users_modules(model: nn.Module) -> dict[str, nn.Module]:
    """{path: module} of all that lorafx did not add, under every name."""
    modules = named_modules(model, every_name=True)
    return {path: module for path, module in modules if not isinstance(module, LorafxModule)}


def paths_of(modules: Mapping[str, nn.Module]) -> dict[nn.Module, list[str]]:
    """{module: its paths} in the order of these modules."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in modules.items():
        paths.setdefault(module, []).append(path)
    return paths


def tensor_names(module: nn.Module) -> list[str]:
    """The attributes of a module that hold a tensor."""
    registered = (*module._parameters.items(), *module._buffers.items())
    names = [name for name, tensor in registered if tensor is not None]
    if parametrize.is_parametrized(module):
        names += module.parametrizations  # type: ignore[arg-type]
    names += [name for name, value in vars(module).items() if isinstance(value, Tensor)]
    return names
