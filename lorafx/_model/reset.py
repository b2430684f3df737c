"""Gives an adapter the values that a new one has, where the base has values by now."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .._adapter.names import dotted, ranges_of, split_block
from .._errors import AdapterError
from .._kernels.weights import rows_at
from .branches import Branch, branches, factors_at, spread
from .factors import Factors
from .copies import same_kind
from .fsdp import settle
from .homes import home
from .places import places_of, tensor_at
from .reading import base_tensor
from .record import injection, trained_modules
from .shards import gathered, is_sharded, spread_like
from .trained import Copies


@torch.no_grad()
def reset(model: nn.Module, adapter: str, keep: bool) -> None:
    """Draw each A of an adapter in the order in which `inject` does, let each B be 0.

    What it trains whole becomes a copy of the base's. Nothing is changed unless the base beside
    has values. `keep` keeps what came from a file before that.
    """
    settle(model)
    places, held = places_of(model), branches(model)
    todo: list[Callable[[], None]] = []
    for site in injection(model).configs[adapter].targets:
        branch, place = held.get(site), places.get(split_block(site)[0])
        factors = None if branch is None else factors_at(branch, adapter)
        if branch is None or place is None or factors is None:
            raise AdapterError(f"Adapter {adapter!r} is no longer at '{site}', whose module or "
                               "weight was replaced after injection.")
        if not (keep and factors.came_first):
            weight = tensor_at(place)
            if factors.on_meta:
                _check_base(site, weight)
            todo.append(_drawing(branch, factors, weight, home(place.module, weight, True)))
    for path, owner, trained in trained_modules(model):
        copies = trained._modules.get(adapter)
        if isinstance(copies, Copies) and not (keep and copies.came_first):
            for name in copies.holders():
                _check_base(dotted(path, name), base_tensor(owner, split_block(name)[0]))
            todo.append(_copying(owner, copies))
    for action in todo:
        action()


def _check_base(name: str, weight: Tensor) -> None:
    if weight.is_meta:
        raise AdapterError(
            f"'{name}' of the base is still on the meta device, and the adapter goes where it is: "
            "call model.to_empty(device=...), or load the base with "
            "load_state_dict(..., assign=True), before lorafx.reset_parameters.")


def _drawing(
    branch: Branch, factors: Factors, weight: Tensor, device: torch.device
) -> Callable[[], None]:
    def draw() -> None:
        if factors.on_meta:
            for name, parameter in factors._parameters.items():
                assert parameter is not None
                factors._parameters[name] = nn.Parameter(
                    torch.empty_like(parameter, device=device), parameter.requires_grad)
            spread(branch, weight)
        factors.draw()

    return draw


def _copying(owner: nn.Module, copies: Copies) -> Callable[[], None]:
    def copy() -> None:
        for name, tensor in (*copies._parameters.items(), *copies._buffers.items()):
            assert tensor is not None
            attribute, block = split_block(name)
            base = base_tensor(owner, attribute)
            if block:
                base = rows_at(gathered(base), ranges_of(block))
            if not tensor.is_meta:
                values = base if is_sharded(tensor) else gathered(base)
                tensor.copy_(spread_like(tensor, values))
                continue
            new = base.detach().to(tensor.dtype, copy=True)
            if name in copies._buffers:
                copies._buffers[name] = new
            else:
                copies._parameters[name] = made = same_kind(base, new)
                made.requires_grad_(tensor.requires_grad)
        copies.missing = False

    return copy
