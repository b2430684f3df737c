"""What compiled programs read of a tensor that adapters train: plain ones, anew at each call."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._graph.dispatched import value_of
from .._kernels.compiling import mark_dynamic
from .._kernels.tensors import PLAIN
from .reading import base_tensor
from .stacks import alias
from .trained import Copies, Trained


class Standing(NamedTuple):
    """A tensor as the base's, and what stands for n >= 2 of its rows, where adapters train such.

    Each requires grad if anything does that adapters have there.
    """

    tensor: Tensor
    numbers: Tensor | None = None  # of these rows, (n)
    rows: Tensor | None = None  # (n, ...)


class _Made(NamedTuple):
    """A Standing, and what it is made of: these tensors, as they were then."""

    tensor: Tensor
    rows: Tensor
    state: tuple[Any, ...]
    standing: Standing


def standing(owner: nn.Module, attribute: str) -> tuple[()] | Standing | None:
    """What stands now at a module for its tensor; () where adapters train no part of that.

    None where there is more to do than to read it: there are no values, several adapters have rows
    of it, or one has a single row, or what some have all of others have rows of.
    """
    trained, base = owner._modules.get("trained"), base_tensor(owner, attribute)
    if not isinstance(trained, Trained) or base is None:
        return None
    choice = trained.choice
    choice.compiled = True
    selection = choice.read()
    found = trained.holders(attribute, selection)
    whole = _held(trained, attribute, found, rows=False)
    of_rows = _held(trained, attribute, found, rows=True)
    if not whole and not of_rows:
        return ()
    if len(found) > 1 or whole and of_rows or not _is_plain(base):
        return None
    tensor, rows = base, base
    for copies, name in found:
        held = copies.held(name)
        if copies.missing or value_of(copies, name, held) is not held or not _is_plain(held):
            return None
        copies.check_all_spread(name, base)
        tensor, rows = (base, held) if name in copies.rows else (held, base)
    if of_rows and len(rows) < 2:
        return None
    needs = _needs(trained, whole), _needs(trained, of_rows)
    state = _state(tensor), _state(rows), needs, rows is base and rows._version
    kept = selection.kept.setdefault(trained, {})
    made = kept.get((attribute, *found))
    if made is None or made.tensor is not tensor or made.rows is not rows or made.state != state:
        with torch.inference_mode(False), torch.enable_grad():
            standing = Standing(alias(tensor, needs[0]))
            if of_rows:
                ranges = found[0][0].rows[found[0][1]] if found else (range(2),)
                own = rows if found else rows[:2].detach().clone()
                numbers = [number for several in ranges for number in several]
                standing = Standing(
                    standing.tensor, mark_dynamic(torch.tensor(numbers, device=base.device), 0),
                    mark_dynamic(alias(own, needs[1]), 0))
        made = kept[attribute, *found] = _Made(tensor, rows, state, standing)
    return made.standing  # type: ignore[no-any-return]


def _held(
    trained: Trained, attribute: str, now: Sequence[tuple[Copies, str]], rows: bool
) -> list[tuple[str, Tensor]]:
    """(adapter, what it has) in the place of a tensor, or of rows of it, active or not.

    What is used `now`, by who began before it went, is among them.
    """
    found = [("", held) for held in now]
    for adapter, copies in trained.sets().items():
        found += [(adapter, held) for held in copies.holders_for(attribute)]
    return [(adapter, copies.held(name)) for adapter, (copies, name) in found
            if (name in copies.rows) is rows]


def _needs(trained: Trained, held: Sequence[tuple[str, Tensor]]) -> bool:
    """If a gradient may be asked of what stands in a place where adapters have these."""
    choice = trained.choice
    if any([adapter in choice.default.weights for adapter, _ in held]):
        return any([tensor.requires_grad for _, tensor in held])
    return choice.trains and any([isinstance(tensor, nn.Parameter) for _, tensor in held])


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in PLAIN and not tensor.is_inference()


def _state(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.requires_grad
