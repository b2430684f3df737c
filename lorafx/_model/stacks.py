"""The factors of all adapters that a branch uses at once, as one A and one B."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._kernels.private import mark_dynamic
from .choice import Selection


class Stack(NamedTuple):
    """A (..., R, in) and B (..., out, R) of all adapters together, R the sum of their ranks.

    `gate`, (R) or for each row of a batch (N, R), is the weight and scale of each rank.
    """

    A: Tensor
    B: Tensor
    gate: Tensor
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
    parts: list[_Part] = []
    used = []
    rows = [selection.weights] if selection.rows is None else selection.rows
    for name in selection.weights:
        factors = branch._modules.get(name)
        if factors is None:
            continue
        pair = factors.plain()
        if pair is None:
            return None
        used.append(factors)
        shares = tuple([row.get(name, 0.0) * factors.scale for row in rows])
        parts.append(_Part(*pair, shares))
    drops = any([factors.dropping for factors in used])
    if drops and (len(parts) > 1 or selection.rows is not None):
        return None
    if not parts:
        nothing = branch.nothing() if compiled else None
        if nothing is None:
            return None
        parts = [_Part(*nothing, (0.0,) * len(rows))]
    needs = branch.needs() if compiled and torch.is_grad_enabled() else None
    key = _key(parts, compiled, needs)
    made = selection.made.get(branch)
    if made is None or made[0] != key:
        with torch.inference_mode(False), torch.set_grad_enabled(torch.is_grad_enabled()):
            A, B, gate = _stacked(parts, compiled, selection.rows is not None)
            if compiled:
                A, B = _alias(A, needs and needs[0]), _alias(B, needs and needs[1])
                for tensor, axis in ((A, A.ndim - 2), (B, B.ndim - 1), (gate, gate.ndim - 1)):
                    mark_dynamic(tensor, axis)
        first = used[0] if used else branch.any_factors()
        stack = Stack(A, B, gate, used[0].dropping if used else 0.0,
                      *((first.share_dropout, first.rounding) if first else (False, False)))
        made = selection.made[branch] = key, stack
    return made[1]  # type: ignore[no-any-return]


def _key(parts: list[_Part], compiled: bool, needs: Any) -> list[Any]:
    """What a stack is good for: the memory that it was made of, and where it is a copy, as it was.
    """
    key: list[Any] = [compiled, needs, torch.is_grad_enabled()]
    for A, B, shares in parts:
        key += [A.data_ptr(), B.data_ptr(), A.shape, A.requires_grad, B.requires_grad, shares]
        if _copies(parts, compiled):
            key += [A._version, B._version]
    return key


def _copies(parts: list[_Part], compiled: bool) -> bool:
    return len(parts) > 1 or compiled and parts[0].A.shape[-2] < 2


def _stacked(parts: list[_Part], compiled: bool, rows: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and the gate of all parts."""
    wide = torch.float64 if parts[0].B.dtype == torch.float64 else torch.float32
    gates = []
    for A, _, shares in parts:
        gate = torch.tensor(shares, dtype=wide).unsqueeze(-1).expand(-1, A.shape[-2])
        gates.append(gate if rows else gate[0])
    gate = torch.cat(gates, dim=-1).to(parts[0].A.device)
    if not _copies(parts, compiled):
        return parts[0].A, parts[0].B, gate
    A = torch.cat([part.A for part in parts], dim=-2)
    B = torch.cat([part.B for part in parts], dim=-1)
    missing = 2 - A.shape[-2] if compiled else 0
    if missing > 0:
        A, B, gate = F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing)), F.pad(gate, (0, missing))
    return A, B, gate


def _alias(tensor: Tensor, needs: bool | None) -> Tensor:
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
