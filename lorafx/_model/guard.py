"""Refuses models whose rewrite would not be sound: wrapped, compiled, patched, lazy, or adapted."""

import types
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from .._errors import AdapterError, UnsupportedModelError
from .._graph.dispatched import (
    is_accelerates, is_dispatched_graph, is_patched, offloads_below
)
from .._graph.loaded import loaded
from .._graph.modules import LorafxModule, all_modules, hooks, named_modules
from .._graph.scan import MODULE_STATE, values_in
from .._kernels.private import compiled_call
from .record import find_injection
from .zero import check_not_managed


# (module, class, what it is, what to do). A class is looked up only where its module is loaded, so
# that nothing is imported for it.
FOREIGN = (
    ("torch.nn.parallel.distributed", "DistributedDataParallel",
     "wrapped for data-parallel training", "inject into model.module and wrap the result"),
    ("torch.nn.parallel.data_parallel", "DataParallel",
     "wrapped for data-parallel training", "inject into model.module and wrap the result"),
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel",
     "sharded by FSDP", "inject first and shard the result"),
    ("torch.distributed.fsdp._fully_shard._fully_shard", "FSDPModule",
     "sharded by FSDP", "inject first and shard the result"),
    ("torch._dynamo.eval_frame", "OptimizedModule",
     "compiled", "inject into model._orig_mod and compile the result"),
    ("torch.jit._script", "ScriptModule",
     "a TorchScript module", "inject into the Python model it came from"),
    ("peft.peft_model", "PeftModel",
     "adapted by PEFT", "start from the base model, model.unload()"),
    ("peft.tuners.tuners_utils", "BaseTuner",
     "adapted by PEFT", "start from the base model, model.unload()"),
    ("peft.tuners.tuners_utils", "BaseTunerLayer",
     "adapted by PEFT", "start from the base model, model.unload()"),
)

# (module, what it does with a layer whose forward it replaces or hooks to, what to do)
PATCHERS = (
    ("transformers.distributed.", "split over processes by transformers (tp_plan)",
     "load it without tp_plan, inject, and split the result by torch's parallelize_module"),
    ("transformers.integrations.tensor_parallel", "split over processes by transformers (tp_plan)",
     "load it without tp_plan, inject, and split the result by torch's parallelize_module"),
)


def check_model(model: nn.Module) -> None:
    """Raise unless the model is one that `inject` can copy and rewrite."""
    if find_injection(model) is not None:
        raise AdapterError(f"This {type(model).__name__} is injected already: lorafx.add gives it "
                           "another adapter.")
    check_not_managed(model)
    foreign: list[tuple[type, str, str]] = []
    for where, name, what, instead in FOREIGN:
        found = loaded(where, name)
        if found is not None:
            foreign.append((found, what, instead))
    members = {*model.modules(), *model.parameters()}
    for path, module in model.named_modules():
        label = (f"'{path}' ({type(module).__name__})" if path
                 else f"This {type(module).__name__}")
        for cls, what, instead in foreign:
            if isinstance(module, cls):
                raise UnsupportedModelError(f"{label} is {what}: {instead}.")
        if find_injection(module) is not None or isinstance(module, LorafxModule):
            raise UnsupportedModelError(f"{label} is part of an injected model: eject that, or "
                                        "inject only the whole.")
        for function in (vars(module).get("forward"), *hooks(module)):
            made_in = str(getattr(getattr(function, "func", function), "__module__", ""))
            for prefix, what, instead in PATCHERS:
                if made_in.startswith(prefix):
                    raise UnsupportedModelError(f"{label} is {what}: {instead}.")
        for name, part in _closures(module):
            if part in members:
                raise UnsupportedModelError(
                    f"{label} holds a function, {name}, that closes over a part of the model, "
                    "which a copy would still use: set it on the injected model.")
        _check_call(module, label)
        _check_tensors(module, label)


def check_each_in_its_place(model: nn.Module) -> None:
    """Raise if a hook brings all tensors below a module, A and B among them."""
    for path, module in all_modules(model):
        if offloads_below(module):
            raise UnsupportedModelError(
                f"'{path}' ({type(module).__name__}) is offloaded with all that is below it "
                "(preload_module_classes of accelerate): call "
                "accelerate.hooks.remove_hook_from_submodules(model) first.")


def check_graphs_not_dispatched(model: nn.Module) -> None:
    """Raise if the graph of a module cannot change, as accelerate has its class's forward."""
    for path, module in all_modules(model):
        if is_dispatched_graph(module):
            raise UnsupportedModelError(
                f"'{path}' is a GraphModule whose class's forward accelerate has replaced, so that "
                "its graph cannot change: call "
                "accelerate.hooks.remove_hook_from_submodules(model) first.")


def check_forwards_can_be_copied(model: nn.Module) -> None:
    """Raise if a forward that was set on a module reaches parts of the model by itself.

    A copy has such a function as it is.
    """
    members = {*model.modules(), *model.parameters()}
    for path, module in named_modules(model):
        forward = vars(module).get("forward")
        if not is_accelerates(forward) and not members.isdisjoint(_closed_over(forward)):
            label = f"'{path}' ({type(module).__name__})" if path else type(module).__name__
            raise UnsupportedModelError(
                f"{label} was given a forward that closes over a part of this model, adapters and "
                "all, which the new model would still run: take it off first (del module.forward), "
                "and set it on the new model.")


def _check_call(module: nn.Module, label: str) -> None:
    """Raise if calling a module runs something else than its class's forward."""
    if is_patched(module) and any(True for _ in module.parameters()):
        raise UnsupportedModelError(
            f"{label} has a forward of its own, patched in by another tool, which a copy would "
            "still run on the original's layers: inject before patching.")
    if is_dispatched_graph(module):
        raise UnsupportedModelError(
            f"{label} is a GraphModule whose class's forward accelerate has replaced, which graphs "
            "that change would lose: inject first and dispatch the result.")
    if offloads_below(module):
        raise UnsupportedModelError(
            f"{label} is offloaded with all that is below it (preload_module_classes of "
            "accelerate), where new A and B would be looked for too: inject first and dispatch the "
            "result.")
    if compiled_call(module) is not None:
        raise UnsupportedModelError(f"{label} is compiled: call .compile() on the injected model "
                                    "instead.")


def _check_tensors(module: nn.Module, label: str) -> None:
    """Raise if a tensor of a module has no values yet, or none that autograd can use."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
            raise UnsupportedModelError(f"{label} is lazy, its '{name}' has no shape yet: run one "
                                        "batch through the model first.")
        if tensor is not None and tensor.is_inference():
            raise UnsupportedModelError(
                f"{label} was made in inference mode, so that autograd cannot use its '{name}': "
                "load the model outside of torch.inference_mode().")


def _closures(module: nn.Module) -> Iterator[tuple[str, nn.Module | nn.Parameter]]:
    """(name, part) of each module or Parameter that a function of this module closes over.

    The functions are those in its attributes and its hooks.
    """
    values = {f"'{name}'": value for name, value in vars(module).items()
              if name not in MODULE_STATE and not is_accelerates(value)
              and value is not compiled_call(module)}
    values |= {f"hook {number}": hook for number, hook in enumerate(hooks(module))}
    for name, value in values.items():
        for part in _closed_over(value):
            yield name, part


def _closed_over(value: Any) -> Iterator[nn.Module | nn.Parameter]:
    """The modules and Parameters over which a function, or one that a value holds, closes."""
    for held in values_in(value):
        function = _bound_to(held)[0]
        if isinstance(function, types.FunctionType):
            for part in values_in(function):
                part = _bound_to(part)[1]
                if isinstance(part, (nn.Module, nn.Parameter)):
                    yield part


def _bound_to(value: Any) -> tuple[Any, Any]:
    """The function and the object of a bound method; of anything else twice itself."""
    if isinstance(value, types.MethodType):
        return value.__func__, value.__self__
    return value, value
