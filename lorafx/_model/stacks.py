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


def stack_of(branch: Any, selection: Selection, compiled: bool) -> Stack | None:
    """The stack of a branch; None where each adapter's factors are to be asked for by themselves.

    Compiled programs take it, whatever its ranks: it has two at least, the least that a compiler
    takes for any number, and requires grad if anything at the branch does.
    """
    rows = [selection.weights] if selection.rows is None else selection.rows
    used, parts = [], []
    for name in selection.weights:
        factors = branch._modules.get(name)
        if factors is None:
            continue
        pair = factors.plain()
        if pair is None or selection.rows is not None and pair[0].ndim > 2:
            return None
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
    key = (compiled, gradients, needs, *_key(parts, compiled))
    made = selection.made.get(branch)
    if made is None or made[0] != key:
        with torch.inference_mode(False), torch.set_grad_enabled(gradients):
            gate: Tensor | Gates
            if selection.rows is None:
                A, B, gate = _stacked(parts, compiled)
            else:
                A, B, gate = _stacked_for_rows(parts, selection)
            if compiled:
                A, B = mark_dynamic(_alias(A, needs[0]), -2), mark_dynamic(_alias(B, needs[1]), -1)
                for tensor in (gate,) if isinstance(gate, Tensor) else gate:
                    mark_dynamic(tensor, -1)
        like = used[0] if used else branch.any_factors()
        told = (like.dropping, like.share_dropout, like.rounding) if used else (0.0, False, False)
        made = selection.made[branch] = key, Stack(A, B, gate, *told)
    stack: Stack = made[1]
    return stack


def _key(parts: Sequence[_Part], compiled: bool) -> tuple[Any, ...]:
    """What a stack was made of: memory, and where it is a copy, as that was."""
    key: list[Any] = []
    for A, B, shares in parts:
        key += [A.data_ptr(), B.data_ptr(), A.shape, A.requires_grad, B.requires_grad, shares]
        if _is_copy(parts, compiled):
            key += [A._version, B._version]
    return tuple(key)


def _is_copy(parts: Sequence[_Part], compiled: bool) -> bool:
    rows = len(parts[0].shares) > 1
    return len(parts) > 1 or rows or compiled and parts[0].A.shape[-2] < 2


def _stacked(parts: Sequence[_Part], compiled: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and the gate of all parts, for all rows alike."""
    gate = _gate(parts)[0].clone()  # compilers ask about what a view is of
    if not _is_copy(parts, compiled):
        return parts[0].A, parts[0].B, gate
    A = torch.cat([part.A for part in parts], dim=-2)
    B = torch.cat([part.B for part in parts], dim=-1)
    missing = 2 - A.shape[-2] if compiled else 0
    if missing > 0:
        A, B, gate = F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing)), F.pad(gate, (0, missing))
    return A, B, gate


def _gate(parts: Sequence[_Part]) -> Tensor:
    """w s of each rank, (N, R), for all rows or each."""
    like = parts[0].B
    wide = torch.promote_types(like.dtype, torch.float32)
    gates = []
    for A, _, of_rows in parts:
        gates.append(torch.tensor(of_rows, dtype=wide).unsqueeze(-1).expand(-1, A.shape[-2]))
    return torch.cat(gates, dim=-1).to(like.device)


def _stacked_for_rows(
    parts: Sequence[_Part], selection: Selection
) -> tuple[Tensor, Tensor, Gates]:
    """A (R, in), B (out, R) and the gates of a batch's rows, which many branches share."""
    key = tuple([(part.A.shape[0], part.shares, part.B.dtype, part.B.device) for part in parts])
    gates = selection.gates.get(key)
    if gates is None:
        gates = selection.gates[key] = Gates.of(F.pad(_gate(parts), (1, 0)))
    A, B = stacked_factors([part.A for part in parts], [part.B for part in parts])
    return A, B.t(), gates


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
