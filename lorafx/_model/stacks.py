"""The factors of all adapters that a branch uses at once, as one A and one B."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._kernels.compiling import mark_dynamic
from .._kernels.mixed import Gates, stacked_factors
from .choice import Selection


class Stack(NamedTuple):
    """A (..., R, in) and B (..., out, R) of all adapters together, R the sum of their ranks.

    `gate`, (R) or for each row of a batch (N, R), is the weight and scale of each rank.
    """

    A: Tensor
    B: Tensor
    gate: Tensor | Gates
    dropout: float = 0.0
    share_dropout: bool = False
    rounding: bool = False


class _Part(NamedTuple):
    """One adapter's factors at a branch; `shares` are w s, one for all rows or for each."""

    A: Tensor
    B: Tensor
    shares: tuple[float, ...]


class _Form(NamedTuple):
    """What a stack is for, but for the factors and shares that are in it."""

    compiled: bool
    rows: bool
    gradients: bool
    needs: tuple[bool, bool]  # of a gradient, in compiled programs


def stack_of(branch: Any, selection: Selection, compiled: bool) -> Stack | None:
    """The stack of a branch; None where each adapter's factors are to be asked for by themselves.

    Compiled programs take it, whatever its ranks: it has two at least, the least that a compiler
    takes for any number, and requires grad if anything at the branch does.
    """
    rows = [selection.weights] if selection.rows is None else selection.rows
    names, used, parts = [], [], []
    for name in selection.weights:
        factors = branch._modules.get(name)
        if factors is None:
            continue
        pair = factors.plain()
        if pair is None or selection.rows is not None and pair[0].ndim > 2:
            return None
        names.append(name)
        used.append(factors)
        shares = tuple([row.get(name, 0.0) * factors.scale for row in rows])
        parts.append(_Part(pair[0], pair[1], shares))
    apart = len(parts) > 1 or selection.rows is not None
    if apart and any([factors.dropping for factors in used]):
        return None
    if not parts:
        nothing = branch.nothing() if compiled else None
        if nothing is None:
            return None
        parts.append(_Part(nothing[0], nothing[1], (0.0,) * len(rows)))
    gradients = torch.is_grad_enabled()
    needs = branch.needs() if compiled and gradients else (False, False)
    form = _Form(compiled, selection.rows is not None, gradients, needs)
    key = form, _memory(parts, form), [part.shares for part in parts]
    made = selection.made.get(branch)
    if made is None or made[0] != key:
        with torch.inference_mode(False), torch.set_grad_enabled(gradients):
            A, B = _kept(branch.choice.kept.setdefault(branch, {}), tuple(names), parts, form)
            told = (used[0].dropping, used[0].share_dropout, used[0].rounding) if used else ()
            stack = Stack(A, B, _gate(parts, form, selection), *told)
        made = selection.made[branch] = key, stack
    found: Stack = made[1]
    return found


def _memory(parts: Sequence[_Part], form: _Form) -> list[Any]:
    """What a stack was made of: memory, and as that was where it is a copy.

    What is frozen, and yet to require grad, is such a one for autograd.
    """
    key: list[Any] = []
    for A, B, _ in parts:
        trains = A.requires_grad, B.requires_grad
        key += [A.data_ptr(), B.data_ptr(), A.shape, trains]
        if _is_copy(parts, form) or trains != form.needs and any(form.needs):
            key += [A._version, B._version]
    return key


def _is_copy(parts: Sequence[_Part], form: _Form) -> bool:
    return len(parts) > 1 or form.rows or form.compiled and parts[0].A.shape[-2] < 2


KEPT = 8  # stacks of different adapters that a branch keeps


def _kept(
    kept: dict[Any, Any], names: tuple[str, ...], parts: Sequence[_Part], form: _Form
) -> tuple[Tensor, Tensor]:
    """A and B of adapters together, made again only where they changed."""
    memory = _memory(parts, form)
    found = kept.get((form, names))
    if found is None or found[0] != memory:
        found = memory, _stacked(parts, form)
        if form.compiled or not form.gradients:
            kept[form, names] = found
            for oldest in [*kept][:-KEPT]:
                kept.pop(oldest, None)
    pair: tuple[Tensor, Tensor] = found[1]
    return pair


def _stacked(parts: Sequence[_Part], form: _Form) -> tuple[Tensor, Tensor]:
    """A and B of all parts; for rows, a rank of zeros stands before them."""
    A, B = parts[0].A, parts[0].B
    if form.rows:
        A, B = stacked_factors([part.A for part in parts], [part.B for part in parts])
        B = B.t()
    elif _is_copy(parts, form):
        A = torch.cat([part.A for part in parts], dim=-2)
        B = torch.cat([part.B for part in parts], dim=-1)
        missing = _missing(parts, form)
        A, B = F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))
    if not form.compiled:
        return A, B
    A, B = _alias(A, form.needs[0]), _alias(B, form.needs[1])
    return mark_dynamic(A, -2), mark_dynamic(B, -1)


def _missing(parts: Sequence[_Part], form: _Form) -> int:
    """How many ranks of zeros make a stack of two."""
    ranks = sum([part.A.shape[-2] for part in parts])
    return max(2 - ranks, 0) if form.compiled else 0


def _gate(parts: Sequence[_Part], form: _Form, selection: Selection) -> Tensor | Gates:
    """w s of each rank, for all rows or each; branches share it, but in compiled programs."""
    like = parts[0].B
    key = [(part.A.shape[-2], part.shares) for part in parts], like.dtype, like.device
    for known, gate in () if form.compiled else selection.gates:
        if known == key:
            return gate  # type: ignore[no-any-return]
    columns = []
    wide = torch.promote_types(like.dtype, torch.float32)
    for A, _, shares in parts:
        columns.append(torch.tensor(shares, dtype=wide).unsqueeze(-1).expand(-1, A.shape[-2]))
    dense = torch.cat(columns, dim=-1).to(like.device)
    made: Tensor | Gates
    if form.rows:
        made = Gates.of(F.pad(dense, (1, 0)))
        tensors: Sequence[Tensor] = made
    else:
        # no view: compilers ask about what a view is of
        made = F.pad(dense[0], (0, _missing(parts, form))).clone()
        tensors = [made]
    if form.compiled:
        for tensor in tensors:
            mark_dynamic(tensor, -1)
    else:
        selection.gates.append((key, made))
    return made


def _alias(tensor: Tensor, needs: bool) -> Tensor:
    """The same memory as a tensor that may be marked, and requires grad if that is needed."""
    if not needs:
        return tensor.detach()
    if tensor.requires_grad:
        return tensor.view_as(tensor)
    alias: Tensor = _Frozen.apply(tensor, _needing_grad())  # type: ignore[no-untyped-call]
    return alias


def _needing_grad() -> Tensor:
    return torch.zeros((), requires_grad=True)


class _Frozen(torch.autograd.Function):
    """(tensor, _) -> the tensor, of which a gradient is asked, and given to nobody."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, needing: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None
