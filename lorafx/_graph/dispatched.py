"""What accelerate puts on modules: hooks that bring weights where they are used, before each call.

It sets a forward on an instance, a partial function around the one that the instance had. Its
classes and functions are looked up only where it has been loaded: nothing is imported for it.
"""

import collections
import copy
import functools
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

HOOK = "_hf_hook"  # the attribute in which accelerate keeps what it puts on a module


def accelerates_hooks(module: nn.Module) -> list[Any]:
    """The hooks that accelerate has put on a module, in the order in which they run."""
    hook = vars(module).get(HOOK)
    accelerate: Any = None if hook is None else sys.modules.get("accelerate.hooks")
    if accelerate is None or not isinstance(hook, accelerate.ModelHook):
        return []
    return list(_one_by_one(hook, accelerate.SequentialHook))


def _one_by_one(hook: Any, sequence: type) -> Iterator[Any]:
    if isinstance(hook, sequence):
        for held in hook.hooks:  # type: ignore[attr-defined]
            yield from _one_by_one(held, sequence)
    else:
        yield hook


def is_accelerates(value: Any) -> bool:
    """True for a function that accelerate made for one module, and sets on it."""
    function = value.func if isinstance(value, functools.partial) else value
    if not isinstance(function, types.FunctionType):
        return False
    made_in: str = function.__globals__.get("__name__", "")
    return made_in in ("accelerate.hooks", "accelerate.big_modeling")


def runs_class_forward(module: nn.Module) -> bool:
    """True if an instance has no forward but its class's, maybe bound in an attribute."""
    return "forward" not in module.__dict__ or _is_own(module, module.__dict__["forward"])


def is_patched(module: nn.Module) -> bool:
    """True if an instance has a forward that is not its class's, nor accelerate's around that."""
    held = vars(module)
    if runs_class_forward(module):
        return False
    around = accelerates_hooks(module) and is_accelerates(held["forward"])
    return not around or not _is_own(module, held.get("_old_forward"))


def is_dispatched_graph(module: nn.Module) -> bool:
    """True for a GraphModule of fx's: accelerate replaces the forward of its class."""
    return isinstance(vars(type(module)).get("forward"), functools.partial)


def _is_own(module: nn.Module, forward: Any) -> bool:
    return _is_method_of(module, forward, type(module).forward)


def _is_method_of(module: nn.Module, method: Any, function: Any) -> bool:
    bound = isinstance(method, types.MethodType) and method.__self__ is module
    return bound and method.__func__ is function


def rebind(module: nn.Module, before: Any) -> None:
    """Let what an instance holds of the forward of a class that it had be that of its class now."""
    for name in ("forward", "_old_forward"):
        if _is_method_of(module, vars(module).get(name), before.forward):
            vars(module)[name] = types.MethodType(type(module).forward, module)


def shared_by_copies(module: nn.Module) -> Iterator[Any]:
    """What copies of a module share, beside its weights: the weights that are away."""
    accelerate: Any = sys.modules.get("accelerate.hooks")
    for hook in accelerates_hooks(module):
        if isinstance(hook, accelerate.AlignDevicesHook):
            yield hook.weights_map
        elif isinstance(hook, accelerate.CpuOffload):
            yield hook.prev_module_hook  # of another model


def rebind_copy(module: nn.Module, twin: nn.Module, memo: dict[int, Any]) -> None:
    """Let accelerate's functions on a copy, made with this memo, be the copy's own."""
    rebind(twin, type(module))
    for name, value in vars(module).items():
        if isinstance(value, types.FunctionType) and is_accelerates(value):
            vars(twin)[name] = _on_copy(value, memo)


def _on_copy(function: types.FunctionType, memo: dict[int, Any]) -> types.FunctionType:
    """A function with copies of what it closes over, where a deepcopy has the function itself."""
    cells = [types.CellType(copy.deepcopy(cell.cell_contents, memo))
             for cell in function.__closure__ or ()]
    twin = types.FunctionType(function.__code__, function.__globals__, function.__name__,
                              function.__defaults__, tuple(cells))
    twin.__dict__.update(copy.deepcopy(function.__dict__, memo))
    return twin


def offloads_below(module: nn.Module) -> bool:
    """True if a hook at a module brings the tensors of all modules below it from elsewhere."""
    return any(hook.place_submodules for hook in _offloading(module))


def is_bringing_all() -> bool:
    """True if such a hook is walking over modules now."""
    accelerate: Any = sys.modules.get("accelerate.hooks")
    frame = None if accelerate is None else sys._getframe(1)
    while frame is not None and frame.f_globals is not vars(accelerate):
        frame = frame.f_back
    hook = None if frame is None else frame.f_locals.get("self")
    if hook is None or not isinstance(hook, accelerate.AlignDevicesHook):
        return False
    return bool(hook.offload and hook.place_submodules)


def _offloading(module: nn.Module) -> list[Any]:
    """accelerate's hooks that bring a module's tensors for a call, and take them away after it."""
    found = accelerates_hooks(module)
    if not found:
        return []
    align: Any = sys.modules["accelerate.hooks"].AlignDevicesHook
    return [hook for hook in found if isinstance(hook, align) and hook.offload]


def _bringing(module: nn.Module, name: str) -> list[Any]:
    """Those hooks of them that bring a tensor of this name, and not parameters alone."""
    is_buffer = name in module._buffers
    return [hook for hook in _offloading(module) if hook.offload_buffers or not is_buffer]


def is_offloaded(module: nn.Module) -> bool:
    """True if a module's own parameters are new ones in each call, which accelerate brings."""
    return bool(_offloading(module))


def offloaded_parameters(modules: Iterable[nn.Module]) -> set[nn.Parameter]:
    """The parameters of these modules in whose place accelerate puts new ones for each call."""
    found: set[nn.Parameter] = set()
    for module in modules if "accelerate.hooks" in sys.modules else ():
        for hook in _offloading(module):
            found.update(module.parameters(recurse=hook.place_submodules))
    return found


def device_in_use(module: nn.Module, tensor: Tensor) -> torch.device:
    """Where a tensor of a module is while the module is called."""
    for hook in _offloading(module):
        if hook.execution_device is not None:
            return torch.device(hook.execution_device)
    return tensor.device


def value_of(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A tensor that a module has under this name, or what accelerate brings in its place."""
    for hook in _bringing(module, name):
        found: Tensor = hook.weights_map[name]
        return found.to(device_in_use(module, tensor), tensor.dtype)
    return tensor


def put(module: nn.Module, name: str, tensor: Tensor) -> bool:
    """Let accelerate bring another tensor in the place of one, from memory; False if it does not.

    Other models that share the weights keep theirs. What accelerate knows of the one that was tied,
    by its address, is not for this one.
    """
    hooks = _bringing(module, name)
    for hook in hooks:
        hook.tied_params_map, hook.tied_params_names = None, set()
        hook.weights_map = collections.ChainMap({name: tensor.detach().cpu()}, hook.weights_map)
    return bool(hooks)
