"""One adapter's A and B at a site, a module whose tensors hooks and sharding find."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._adapter.config import INITS, LoRAConfig
from .._errors import AdapterError
from .._graph.dispatched import is_bringing_all, is_offloaded
from .._graph.modules import is_bare
from .scaled import Scaled
from .shards import (
    agreed, gathered_for_use, is_sharded, reduced_for_use, spread_beside, spread_evenly, spread_like
)


class Factors(Scaled):
    """One adapter at one site: A (rank, in), B (out, rank) and the scale s; or stacks of A and B.

    A stack has one for each expert. `rounding`, `dropout` and `share_dropout` are as in its config.
    """

    gathers = False  # True: A and B are spread, and nobody else gathers them for forward
    _brought = False  # True: a hook at a module above may put new A and B here for each call

    def __init__(self, A: Tensor, B: Tensor, scale: float, config: LoRAConfig) -> None:
        super().__init__()
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)
        self.shapes = tuple(A.shape), tuple(B.shape)
        self.scale = scale
        self.init, self.rounding = config.init, config.rounding
        self.dropout, self.share_dropout = config.dropout, config.share_dropout
        self.missing = self.new = self.on_meta

    def forward(self) -> tuple[Tensor, Tensor]:
        """A and B, for hooks that put them in place before a module's forward."""
        return self.A, self.B

    def tensors(self) -> tuple[Tensor, Tensor]:
        """A and B, by way of `forward` where something is hooked to it or patches it."""
        bare = is_bare(self)
        if bare:
            held = self._parameters  # which is read in half the time of self.A
            A, B = held.get("A"), held.get("B")
        if not bare or A is None or B is None:
            A, B = self()
        if self._brought or not bare and is_offloaded(self):  # accelerate's are not bare
            for name, tensor in zip("AB", (A, B)):
                refuse_gradients(self, name, tensor)
        if self.gathers:
            return gathered_for_use(A), gathered_for_use(B)
        if type(A) is type(B) is nn.Parameter:
            return A, B
        return reduced_for_use(A), reduced_for_use(B)

    def plain(self) -> tuple[Tensor, Tensor] | None:
        """A and B, or None if there is more to do than to read them, or they may have no values."""
        if self.missing or self.gathers or self._brought or not is_bare(self):
            return None
        A, B = self._parameters.get("A"), self._parameters.get("B")
        if type(A) is not nn.Parameter or type(B) is not nn.Parameter:
            return None
        return None if A.is_inference() or B.is_inference() else (A, B)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if self.new and not self.on_meta:
            self.draw()
        return self

    def reset_parameters(self) -> None:
        """As layers of torch have it, for loops that give what was on meta its first values.

        What came from a file before the base was there is kept.
        """
        if not self.came_first:
            self.draw()

    def named_modules(
        self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """As ever; where accelerate brings all tensors below a module, A and B are among them."""
        if is_bringing_all():
            self._brought = True
        yield from super().named_modules(memo, prefix, remove_duplicate)

    @torch.no_grad()
    def draw(self) -> None:
        """Draw A, from torch's default generator, and set B to zero, as `inject` does."""
        drawn = torch.empty(self.shapes[0], dtype=self.A.dtype, device=self.A.device)
        if drawn.numel() and not drawn.is_meta:
            INITS[self.init](drawn)
            self.A.copy_(spread_like(self.A, drawn))
            self.B.zero_()
            self.missing = self.new = False

    def spread(self, weight: Tensor | None, transposed: bool, rows: bool) -> None:
        """Spread A and B over processes as the weight beside them is.

        Those that came before the weight had values go to its device.
        """
        A: Tensor = self.A
        B: Tensor = self.B
        there = weight is not None and not weight.is_meta
        waits = self.came_first and there and not is_sharded(A)
        if waits and weight is not None and A.device != weight.device:
            A, B = A.detach().to(weight.device), B.detach().to(weight.device)
        A, B = spread_beside(weight, A, B, transposed, rows)
        if A is not self.A:
            trains = self.A.requires_grad
            self.A, self.B = nn.Parameter(A, trains), nn.Parameter(B, trains)

    def agree(self, mesh: Any) -> None:
        """Let A and B, where each process has all of them, be what the first of a mesh has."""
        for factor in (self.A, self.B):
            if not is_sharded(factor) and not factor.is_meta:
                factor.data = agreed(factor.detach(), mesh)

    def spread_apart(self, mesh: Any) -> None:
        """Spread A and B evenly over the processes of a mesh, and gather them at each use."""
        self.A = nn.Parameter(spread_evenly(self.A, mesh), self.A.requires_grad)
        self.B = nn.Parameter(spread_evenly(self.B, mesh), self.B.requires_grad)
        self.gathers = True

    def extra_repr(self) -> str:
        dropout = f", dropout={self.dropout:g}" if self.dropout else ""
        return f"rank={self.shapes[0][-2]}, scale={self.scale:g}{dropout}"

    @property
    def dropping(self) -> float:
        """The probability of dropout now: none in eval."""
        return self.dropout if self.training else 0.0


def refuse_gradients(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Let a gradient be an error that reaches a tensor which the module then no longer has."""
    def check(gradient: Tensor) -> None:
        if module._parameters[name] is not tensor:
            raise AdapterError(OFFLOADED)

    if tensor.requires_grad and torch.is_grad_enabled():
        tensor.register_hook(check)  # type: ignore[no-untyped-call]


OFFLOADED = (
    "accelerate offloads the A and B of this model, and brings new ones for each call, so that "
    "training would not reach them: dispatch the base model first, and then inject, or load the "
    "adapter.")
