"""Trees of modules: what the user wrote, apart from what lorafx added, and where tensors are."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils import parametrize


class LorafxModule(nn.Module):
    """A module that lorafx added to the model, not part of the program that the user wrote."""


class Place(NamedTuple):
    """Where a tensor is: the module that owns it and the attribute that holds it."""

    module: nn.Module
    attribute: str


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The module registered at a path, even where a property has the same name."""
    if not path:
        return model
    for name in path.split("."):
        child = model._modules[name]
        assert child is not None
        model = child
    return model


def hooks(module: nn.Module) -> list[Any]:
    """The functions that are hooked to a module's forward and backward."""
    tables = (module._forward_hooks, module._forward_pre_hooks,
              module._backward_hooks, module._backward_pre_hooks)
    return [hook for table in tables for hook in table.values()]


def users_modules(model: nn.Module) -> dict[str, nn.Module]:
    """{path: module} of all that lorafx did not add, under every name."""
    modules = model.named_modules(remove_duplicate=False)
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
