"""What compiled programs read of a tensor that adapters train: plain ones, anew at each call."""

import operator
from collections.abc import Mapping, Sequence
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
    """A tensor that stands for the base's, and what stands for n >= 2 of its rows, where there may
    be such.

    Each requires grad if anything does that adapters have there. Where what adapters have is of
    another dtype, the tensor is theirs, and `used` says whether it stands there, or the base's.
    """

    tensor: Tensor
    used: Tensor | None = None  # a bool
    numbers: Tensor | None = None  # of these rows, (n)
    rows: Tensor | None = None  # (n, ...)


class _Made(NamedTuple):
    """A Standing, and what it is made of: these tensors, as they were then."""

    sources: Sequence[Tensor]
    state: Sequence[Any]
    standing: Standing


def standing(owner: nn.Module, attribute: str) -> tuple[()] | Standing | None:
    """What stands now at a module for its tensor; () where adapters train no part of that.

    None where there is more to do than to read it, or rows are trained of a tensor of one.
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
    if not _is_plain(base) or of_rows and len(base) < 2:
        return None
    now, rows = base, dict[tuple[range, ...], Tensor]()
    for copies, name in found:
        held = copies.held(name)
        if copies.missing or value_of(copies, name, held) is not held or not _is_plain(held):
            return None
        copies.check_all_spread(name, base)
        if name in copies.rows:
            rows[copies.rows[name]] = held
        else:
            now = held
    wide = [held for _, held in whole if held.dtype != base.dtype and held.device == base.device]
    needs = _needs(trained, whole) or base.requires_grad, _needs(trained, of_rows)
    sources = [now, *rows.values(), *wide[:1]]
    copied = of_rows and _is_copy(rows, of_rows[0][1].dtype)
    state = [needs, [_state(source) for source in sources],
             copied and [source._version for source in sources]]
    kept = selection.kept.setdefault(trained, {})
    made = kept.get((attribute, *found))
    if made is None or made.state != state or not all(map(operator.is_, made.sources, sources)):
        with torch.inference_mode(False), torch.enable_grad():
            standing = _standing_for(now, base, wide, needs[0])
            if of_rows:
                numbers, own = _rows(now, rows, of_rows[0][1].dtype)
                standing = standing._replace(
                    numbers=mark_dynamic(torch.tensor(numbers, device=base.device), 0),
                    rows=mark_dynamic(alias(own, any(needs)), 0))
        made = kept[attribute, *found] = _Made(sources, state, standing)
    return made.standing  # type: ignore[no-any-return]


def _standing_for(now: Tensor, base: Tensor, wide: Sequence[Tensor], needs: bool) -> Standing:
    """The Standing of a whole tensor, in the dtype that adapters have it in, if any does."""
    if not wide or now is not base:
        used = None if now.dtype == base.dtype else torch.tensor(True, device=base.device)
        return Standing(alias(now, needs), used)
    unused = wide[0].detach()  # its owner gets no gradient
    return Standing(alias(unused, needs), torch.tensor(False, device=base.device))


def _rows(
    now: Tensor, rows: Mapping[tuple[range, ...], Tensor], dtype: torch.dtype
) -> tuple[list[int], Tensor]:
    """The numbers of two or more rows of a tensor, and what stands there: itself, if nothing else.
    """
    numbers = [number for ranges in rows for several in ranges for number in several]
    pieces = [*rows.values()]
    if not _is_copy(rows, dtype):
        return numbers, pieces[0]
    others = [number for number in range(2) if number not in numbers][:max(2 - len(numbers), 0)]
    pieces += [now[number:number + 1] for number in others]
    return numbers + others, torch.cat([piece.to(dtype) for piece in pieces])


def _is_copy(rows: Mapping[tuple[range, ...], Tensor], dtype: torch.dtype) -> bool:
    """True where what stands for rows is not one tensor of one adapter."""
    return len(rows) != 1 or any(len(held) < 2 or held.dtype != dtype for held in rows.values())


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
