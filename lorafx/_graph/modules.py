"""Helpers on trees of modules, which tell what lorafx added from what the user wrote."""

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize


class LorafxModule(nn.Module):
    """A module that lorafx added to the model, no part of the program that the user wrote."""


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The module registered at a path, whatever a property of the same name may say."""
    for name in path.split(".") if path else ():
        found = model._modules[name]
        assert found is not None
        model = found
    return model


def hooks(module: nn.Module) -> list[Any]:
    """The functions that are hooked to a module's forward and backward."""
    tables = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return [hook for table in tables for hook in table.values()]


def users_modules(model: nn.Module) -> dict[str, nn.Module]:
    """{path: module} of all that lorafx did not add, under every name."""
    return {path: module for path, module in model.named_modules(remove_duplicate=False) if not isinstance(module, LorafxModule)}


def tensor_names(module: nn.Module) -> list[str]:
    """The attributes of a module that hold a tensor."""
    computed = list(module.parametrizations) if parametrize.is_parametrized(module) else []  # type: ignore[arg-type]
    plain = [name for name, value in vars(module).items() if isinstance(value, Tensor)]
    tensors = [name for name, value in (*module._parameters.items(), *module._buffers.items()) if value is not None]
    return [*tensors, *computed, *plain]
