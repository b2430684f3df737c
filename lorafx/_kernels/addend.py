"""The addend of a matrix, s L R, and its mathematics: what the rest of lorafx knows of a branch.

Of a weight W (out, in), L is B (out, rank) and R is A (rank, in). Another kind of branch would be
another class with these methods, in a file of its own: its part of a linear call's output, of a
product with the matrix on either side, of the matrix itself, dense or in place, its gradients, and
its norm. `fused` and `merged` compute the same for many addends at once, out of the reach of
autograd.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .again import Proven, again
from .compiled import first_half, halves_apart
from .dropout import dropped
from .gates import gated, rows_of_batch, scaled
from .mixed import Gates, mixed
from .private import runs_as_called
from .tensors import PLAIN


class Addend(NamedTuple):
    """s L R, an addend of a matrix (..., m, n), or of a block of its rows or columns.

    The block begins at `start` along `axis`, -2 or -1.
    """

    left: Tensor  # (..., m, rank)
    right: Tensor  # (..., rank, n)
    scale: float
    axis: int = -2
    start: int = 0
    dropout: float = 0.0  # of what the matrix is multiplied with
    shared: bool = False  # calls that share x may drop out the same elements for all addends
    rounding: bool = False  # the sum may be rounded to a narrow dtype
    proven: Proven | None = None  # what may be computed again at its site; None: all is kept
    # probabilities of dropout of K equal shares of the ranks, (K), in the place of `dropout`
    rates: Tensor | None = None
    # x R^T is multiplied by these, (rank), or of the rows of a batch each by its own, (N, rank)
    gates: Tensor | Gates | None = None

    @property
    def transposed(self) -> "Addend":
        """The addend of the transposed matrix."""
        return self._replace(left=self.right.mT, right=self.left.mT, axis=-3 - self.axis)

    @property
    def detached(self) -> "Addend":
        """The addend without a gradient."""
        return self._replace(left=self.left.detach(), right=self.right.detach())

    @property
    def size(self) -> int:
        """The length of the block along its axis."""
        return int(self.left.shape[-2] if self.axis == -2 else self.right.shape[-1])

    @property
    def requires_grad(self) -> bool:
        """True if a factor requires grad."""
        return self.left.requires_grad or self.right.requires_grad

    @property
    def is_apart(self) -> bool:
        """True if it drops out, or rows of a batch go through it by themselves."""
        drops = self.dropout > 0 or self.rates is not None
        return drops or isinstance(self.gates, Gates)

    def of_stack(self, index: Any) -> "Addend":
        """The addend of some matrices of a stack, (..., m, n)."""
        left = scaled(self.left, self.gates)
        return self._replace(left=left[index], gates=None, right=self.right[index])

    def with_rank_multiple_of(self, count: int) -> "Addend":
        """The same addend with zeros in its factors."""
        missing = -self.left.shape[-1] % count
        left = F.pad(scaled(self.left, self.gates), (0, missing))
        return self._replace(left=left, right=F.pad(self.right, (0, 0, 0, missing)), gates=None)

    def block_of(self, matrix: Tensor) -> Tensor:
        """The view of a matrix, (..., m, n), to which this is added."""
        return matrix.narrow(self.axis, self.start, self.size)

    def rows(self, start: int, length: int) -> "Addend | None":
        """The addend of the rows [start, start + length) of the matrix; None if it has none."""
        if self.axis == -1:
            return self._replace(left=self.left.narrow(-2, start, length))
        first, last = max(start, self.start), min(start + length, self.start + self.size)
        if first >= last:
            return None
        left = self.left.narrow(-2, first - self.start, last - first)
        return self._replace(left=left, start=first - start)

    # A linear call, y = x M^T with M (out, in) and x (..., in).

    def add_to_output(self, y: Tensor, x: Tensor, fresh: bool = False) -> Tensor:
        """y + s (x R^T) L^T, in y's dtype; a y that is `fresh`, nobody else's, may be written into.

        The factors are cast to x's dtype, never x to theirs: they are the narrow side, so that no
        copy of an activation is saved for the backward pass.
        """
        if isinstance(self.gates, Gates) and self.axis == -2 and self.size == y.size(-1):
            gates = rows_of_batch(self.gates, x)
            return mixed(x, y, self.right, self.left.t(), gates, fresh, self.proven)
        if self.axis == -1 and self.size != x.size(-1):
            x = x.narrow(-1, self.start, self.size)
        right, recompute = self.right.to(x.dtype), self.proven is not None
        if self.rates is not None:
            return self.add_half(y, halves_apart(x, right, self.rates, recompute))
        return self.add_half(y, first_half(dropped(x, self.dropout), right, recompute))

    def add_half(self, y: Tensor, h: Tensor) -> Tensor:
        """y + s h L^T for h = x R^T, (..., rank).

        L is scaled, before it is cast: inductor of torch 2.13 loses the alpha of a sum.
        """
        h = h if self.gates is None else gated(h, self.gates)
        left = (self.left if self.scale == 1 else self.left * self.scale).to(h.dtype)
        length = left.shape[0]
        if length == y.size(-1):
            return torch.add(y, F.linear(h, left))
        end = self.start + length
        block = torch.add(y.narrow(-1, self.start, length), F.linear(h, left))
        return torch.cat([y[..., :self.start], block, y[..., end:]], dim=-1)

    def add_into_output(self, y: Tensor, rows: Tensor) -> Tensor:
        """y += s h L^T in place, y (N, out), for a left of all out rows; h = rows R^T, (N, rank).
        """
        h = F.linear(rows, self.right)
        y.addmm_(h, self.left.t(), alpha=self.scale)
        return h

    # The matrix M, (..., m, n), as it is multiplied.

    def add_right_product(
        self, y: Tensor, x: Tensor, multiply: Callable[[Tensor, Tensor], Tensor] = torch.matmul
    ) -> Tensor:
        """y + s (x L) R, x (..., m), for y = x M; `multiply` is how x M was computed."""
        if self.axis == -2:
            x = x.narrow(-1, self.start, self.size)
        x = dropped(x, self.dropout)
        left = self.left.to(x.device, x.dtype)
        trains = torch.is_grad_enabled() and left.requires_grad
        trains = trains and type(x) in PLAIN and type(left) in PLAIN
        as_called = not torch.compiler.is_compiling() and runs_as_called()
        instead = again(x, self.proven) if trains and as_called else None
        h = multiply(x, left)  # (..., rank)
        if instead is not None:
            instead.stand_in_product(h)
        h = h if self.gates is None else gated(h, self.gates)
        added = multiply(h, self.right.to(x.device, h.dtype))
        if self.axis == -1:
            added = padded(added, -1, self.start, y.shape[-1])
        return torch.add(y, added, alpha=self.scale)

    def add_left_product(self, y: Tensor, x: Tensor) -> Tensor:
        """y + s L (R x), x (..., n, k), for y = M x."""
        if self.axis == -1:
            x = x.narrow(-2, self.start, self.size)
        h = self.right.to(x.device, x.dtype) @ dropped(x, self.dropout)  # (..., rank, k)
        added = scaled(self.left, self.gates).to(x.device, h.dtype) @ h
        if self.axis == -2:
            added = padded(added, -2, self.start, y.shape[-2])
        return torch.add(y, added, alpha=self.scale)

    def add_to_chosen_rows(self, rows: Tensor, choose: Callable[[Tensor], Tensor]) -> Tensor:
        """M[i] + s L[i] R for `rows` = M[i]; `choose` takes these rows of any such matrix."""
        h = choose(scaled(self.left, self.gates).to(rows.dtype))  # (..., rank)
        return torch.add(rows, h @ self.right.to(rows.dtype), alpha=self.scale)

    # The matrix itself.

    def dense(self, dtype: torch.dtype) -> Tensor:
        """s L R, (..., m, n), computed in this dtype."""
        return self.scale * (scaled(self.left, self.gates).to(dtype) @ self.right.to(dtype))

    def add_into(self, matrix: Tensor) -> None:
        """M += s L R in place, in the block that it is for; all of one dtype."""
        block = self.block_of(matrix)
        add = block.addmm_ if block.ndim == 2 else block.baddbmm_
        add(self.left, self.right, alpha=self.scale)

    def gradients(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """(dL, dR) = (s G R^T, s L^T G), where G is the gradient of the matrix, (..., m, n)."""
        block = self.block_of(gradient).to(self.left.dtype)
        return self.scale * (block @ self.right.mT), self.scale * (self.left.mT @ block)


def padded(block: Tensor, axis: int, start: int, length: int) -> Tensor:
    """Return a block among zeros, so that the axis, -1 or -2, has this length."""
    after = length - start - block.shape[axis]
    if block.shape[axis] == length:
        return block
    return F.pad(block, (0, 0) * (-1 - axis) + (start, after))


def norm(addends: Sequence[Addend]) -> float:
    """Return the Frobenius norm of sum s L R, all of one shape, in float64."""
    return float(torch.linalg.vector_norm(_core(addends)))


def singular_values(addends: Sequence[Addend]) -> Tensor:
    """Return those of sum s L R, all of one shape, in float64, (..., ranks), from large to small.

    Where the ranks together are more than m or n, there are as many as the smaller of these.
    """
    values: Tensor = torch.linalg.svdvals(_core(addends))
    return values


def _core(addends: Sequence[Addend]) -> Tensor:
    """A small matrix with the singular values of sum s L R, but for zeros.

    The sum is L R with the L's side by side, (..., m, ranks), and the R's stacked, (..., ranks, n).
    With L = Q1 R1 and R^T = Q2 R2 it is R1 R2^T, which loses no digits as Gram matrices would.
    """
    left = torch.cat([addend.scale * addend.left.double() for addend in addends], -1)
    right = torch.cat([addend.right.double() for addend in addends], -2)
    return _triangle(left) @ _triangle(right.mT).mT


def _triangle(tall: Tensor) -> Tensor:
    """R of a matrix Q R."""
    return torch.linalg.qr(tall, mode="r").R if tall.numel() else tall[..., :0, :]
