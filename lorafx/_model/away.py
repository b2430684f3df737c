"""Ties of weights that accelerate keeps elsewhere: each module has one of its own, on meta."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .._adapter.adapter import Adapter
from .._adapter.names import split_block
from .._errors import UnsupportedModelError
from .._graph.dispatched import is_offloaded
from .._graph.modules import submodule
from .program import Program


def check_ties_are_seen(program: Program, adapter: Adapter) -> None:
    """Raise where a matrix that an adapter trains may be tied to one, and one of them is away.

    What was tied has the same values. An adapter that is for one of a tied pair by itself trains
    that alone, but for rows of it.
    """
    names = []
    for name in adapter.trained:
        whole, block = split_block(name)
        if block or not adapter.untied:
            names.append(whole)
    for other, theirs in _others(program, adapter, names):
        for name in names:
            ours = program.base_parameters.get(name)
            if ours is None or ours.shape != theirs.shape or ours is theirs:
                continue
            if _is_away(program, name) or _is_away(program, other):
                if _have_same_values(program.base_value(name), program.base_value(other)):
                    raise UnsupportedModelError(
                        f"'{name}' cannot be trained here, since '{other}' has the same values and "
                        "accelerate has offloaded one of them, so that it is not seen if they are "
                        "tied: inject or load first and offload the result, or dispatch by "
                        "accelerate.dispatch_model, which keeps ties.")


def _others(
    program: Program, adapter: Adapter, names: list[str]
) -> Iterator[tuple[str, nn.Parameter]]:
    """The matrices of a model that an adapter does not train, if it trains some."""
    trained = {split_block(name)[0] for name in adapter.trained}
    for name, parameter in program.base_parameters.items() if names else ():
        if parameter.ndim > 1 and name not in trained:
            yield name, parameter


def _is_away(program: Program, name: str) -> bool:
    return is_offloaded(submodule(program.model, name.rpartition(".")[0]))


def _have_same_values(one: Tensor, other: Tensor) -> bool:
    """True of values that are not all the same one, as zeros are."""
    if one.is_meta or other.is_meta or one.dtype != other.dtype:
        return False
    return torch.equal(one, other.to(one.device)) and bool((one != one.flatten()[0]).any())
