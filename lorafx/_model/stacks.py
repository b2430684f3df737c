"""The factors of all adapters that a branch uses at once, as one A and one B."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._kernels.compiling import mark_dynamic
from .._kernels.gates import gates_of
from .._kernels.mixed import Gates, stacked_factors
from .choice import Selection


class Stack(NamedTuple):
    """A (..., R, in) and B (..., out, R) of all adapters together, R the sum of their ranks.

    `gate`, (R) or for each row of a batch (N, R), is the weight and scale of each rank. `rates`,
    (K), are the probabilities of dropout of K adapters, that then have R / K ranks each.
    """

    A: Tensor
    B: Tensor
    gate: Tensor | Gates
    rates: Tensor | None = None
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
    drops: bool  # out, in compiled programs, if only with a probability of 0
    needs: tuple[bool, bool]  # of a gradient, in compiled programs


class _Held(NamedTuple):
    """An adapter's factors at a branch, and what was read of them."""

    name: str
    factors: Any
    pair: tuple[Tensor, Tensor]  # A and B
    scale: float
    dropout: float


class _Made(NamedTuple):
    """A stack, and what it is good for: the form, the factors, and as they were then."""

    form: _Form
    held: Sequence[_Held]
    absent: Sequence[str]  # adapters that have no factors there
    state: Sequence[Any]
    memory: Sequence[Tensor]  # theirs, held so that no other tensor comes to the same address
    stack: Stack

    @property
    def trains(self) -> bool:
        """True if a gradient will be asked of the factors."""
        return self.stack.A.requires_grad or self.stack.B.requires_grad

    def holds(self, form: _Form, branch: Any, selection: Selection) -> bool:
        """True if it would be made in the same way now. It is asked at each call of a branch.

        Versions do not tell of what is written into `.data`, as some optimizers do: what trains is
        copied at each call, which is once a step, but in compiled programs, which read it often.
        """
        if form != self.form or not form.compiled and self.trains:
            return False
        for name, factors, (A, B), scale, dropout in self.held:
            if selection.held(branch, name) is not factors or factors.scale != scale:
                return False
            tensors = factors._parameters
            if tensors.get("A") is not A or tensors.get("B") is not B:
                return False
            if (dropout or factors.dropout) and factors.dropping != dropout:
                return False
        for name in self.absent:
            if selection.held(branch, name) is not None:
                return False
        return self.state == _state([held.pair for held in self.held], form)


def stack_of(branch: Any, selection: Selection, compiled: bool) -> Stack | None:
    """The stack of a branch; None where each adapter's factors are to be asked for by themselves.

    Compiled programs take it, whatever its ranks: it has two at least, the least that a compiler
    takes for any number, requires grad if anything at the branch does, and drops out in training if
    any adapter does.
    """
    # a compiler traces parts without gradients, whose inputs are read with them at each call
    gradients = compiled or torch.is_grad_enabled()
    needs = branch.needs(selection) if compiled else (False, False)
    drops = compiled and branch.training and branch.choice.drops
    form = _Form(compiled, selection.rows is not None, gradients, drops, needs)
    made = selection.made.get(branch)
    if made is None or not made.holds(form, branch, selection):
        with torch.inference_mode(False), torch.set_grad_enabled(gradients):
            made = _make(branch, selection, form)
        if made is None:
            return None
        selection.made[branch] = made
    stack: Stack = made.stack
    return stack


def is_copied(branch: Any, selection: Selection) -> bool:
    """True if the stack that was last read of a branch is not in the memory of its factors."""
    made = selection.made.get(branch)
    if made is None or not made.held:
        return False
    return _is_copy([held.pair for held in made.held], made.form)


def _make(branch: Any, selection: Selection, form: _Form) -> _Made | None:
    rows = [selection.weights] if selection.rows is None else selection.rows
    held, absent, parts = [], [], []
    for name in selection.weights:
        factors = selection.held(branch, name)
        if factors is None:
            absent.append(name)
            continue
        pair = factors.plain()
        if pair is None or form.rows and pair[0].ndim > 2:
            return None
        held.append(_Held(name, factors, pair, factors.scale, factors.dropping))
        shares = tuple([row.get(name, 0.0) * factors.scale for row in rows])
        parts.append(_Part(pair[0], pair[1], shares))
    pairs, rates = [each.pair for each in held], [each.dropout for each in held]
    if any(rates) and not form.drops:
        return None  # each drops out elements of its own
    memory = [tensor.detach() for pair in pairs for tensor in pair]
    if not parts:
        nothing = branch.nothing() if form.compiled else None
        if nothing is None:
            return None
        parts.append(_Part(nothing[0], nothing[1], (0.0,) * len(rows)))
    if form.drops and len(parts) == 1 and (form.rows or len(selection.weights) > 1):
        # compilers take 1 for a constant: others of these adapters are at other branches
        parts.append(parts[0]._replace(shares=(0.0,) * len(rows)))
    kept = selection.kept.setdefault(branch, {})
    A, B = _kept(kept, tuple([each.name for each in held]), parts, form, memory)
    apart = None
    if form.drops:
        rates += [0.0] * (len(parts) - len(rates))
        rate = torch.tensor(rates, dtype=torch.float32, device=B.device)  # 0 may be an integer
        apart = mark_dynamic(rate, 0)
    rounding = held[0].factors.rounding if held else False
    stack = Stack(A, B, _gate(parts, form, selection), apart, rounding)
    return _Made(form, held, absent, _state(pairs, form), memory, stack)


def _state(pairs: Sequence[tuple[Tensor, Tensor]], form: _Form) -> list[Any]:
    """What a stack was made of: memory, and as that was where it is a copy.

    What is frozen, and yet to require grad, is such a one for autograd.
    """
    if not form.gradients:  # it is of rows, and so a copy
        return [(t._version, t.data_ptr()) for pair in pairs for t in pair]
    state: list[Any] = []
    for A, B in pairs:
        trains = A.requires_grad, B.requires_grad
        state += [A.data_ptr(), B.data_ptr(), A.shape, trains]
        if _is_copy(pairs, form) or trains != form.needs and any(form.needs):
            state += [A._version, B._version]
    return state


def _is_copy(pairs: Sequence[Any], form: _Form) -> bool:
    return len(pairs) > 1 or form.rows or form.compiled and pairs[0][0].shape[-2] < 2


KEPT = 8  # stacks of different adapters that a branch keeps


def _kept(
    kept: dict[Any, Any], names: tuple[str, ...], parts: Sequence[_Part], form: _Form,
    memory: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """A and B of adapters together, made again only where they changed."""
    state = _state([(part.A, part.B) for part in parts], form)
    found = kept.get((form, names))
    if found is None or found[0] != state:
        found = state, _stacked(parts, form), memory
        if form.compiled or not form.gradients:
            kept[form, names] = found
            for oldest in [*kept][:-KEPT]:
                kept.pop(oldest, None)
    pair: tuple[Tensor, Tensor] = found[1]
    return pair


def _stacked(parts: Sequence[_Part], form: _Form) -> tuple[Tensor, Tensor]:
    """A and B of all parts; for rows, a rank of zeros stands before them where none drop out."""
    A, B = parts[0].A, parts[0].B
    if form.rows and not form.drops:
        A, B = stacked_factors([part.A for part in parts], [part.B for part in parts])
        B = B.t()
    elif _is_copy(parts, form):
        missing = _missing(parts, form)
        A = torch.cat([F.pad(part.A, (0, 0, 0, count)) for part, count in zip(parts, missing)], -2)
        B = torch.cat([F.pad(part.B, (0, count)) for part, count in zip(parts, missing)], -1)
    if not form.compiled:
        return A, B
    A, B = alias(A, form.needs[0]), alias(B, form.needs[1])
    return mark_dynamic(A, -2), mark_dynamic(B, -1)


def _missing(parts: Sequence[_Part], form: _Form) -> list[int]:
    """How many ranks of zeros each part lacks of two, and of the others' where they drop out."""
    ranks = [part.A.shape[-2] for part in parts]
    if form.compiled and (form.drops or len(parts) == 1):
        return [max(2, *ranks) - rank for rank in ranks]
    return [0] * len(parts)


def _gate(parts: Sequence[_Part], form: _Form, selection: Selection) -> Tensor | Gates:
    """w s of each rank, for all rows or each; branches share it, but in compiled programs."""
    like = parts[0].B
    key = [(part.A.shape[-2], part.shares) for part in parts], like.dtype, like.device
    for known, gate in () if form.compiled else selection.gates:
        if known == key:
            return gate  # type: ignore[no-any-return]
    missing = _missing(parts, form)
    dense = torch.cat([F.pad(gates_of(part.shares, part.A), (0, count))
                       for part, count in zip(parts, missing)], dim=-1)
    made: Tensor | Gates
    if form.rows and not form.drops:
        made = Gates.of(F.pad(dense, (1, 0)))
        tensors: Sequence[Tensor] = made
    else:
        # no view: compilers ask about what a view is of
        made = (dense if form.rows else dense[0]).clone()
        tensors = [made]
    if form.compiled:
        for tensor in tensors:
            mark_dynamic(tensor, -1)
    else:
        selection.gates.append((key, made))
    return made


def alias(tensor: Tensor, needs: bool) -> Tensor:
    """The same memory as a tensor that may be marked, and requires grad if that is needed."""
    if not needs:
        return tensor.detach()
    made = tensor.view_as(tensor)
    if made.grad_fn is None:  # a view of what is frozen, maybe by another thread just now
        needing = torch.zeros((), requires_grad=True)
        made = _Frozen.apply(tensor, needing)  # type: ignore[no-untyped-call]
    return made


class _Frozen(torch.autograd.Function):
    """(tensor, _) -> the tensor, of which a gradient is asked, and given to nobody."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, needing: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None
