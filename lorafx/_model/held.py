"""Modules that hold an adapter's tensors, which never are memory that nobody has written to."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from .._errors import AdapterError
from .._graph.modules import LorafxModule
from .shards import local_part


class Held(LorafxModule):
    """A module of tensors that keep their values whatever moves or casts them, to_empty too.

    Tensors that had none, on the meta device, are NaN when they get memory, until something gives
    them values, as `reset_parameters` does.
    """

    missing = False  # True where there may be no values, and not only for now
    new = False  # True until it first has values
    came_first = False  # True if values came from a file while the weight beside had none yet

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(_keeping(fn), recurse)  # type: ignore[no-untyped-call]
        self.missing = self.missing or self.on_meta
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        names = (*self._parameters, *self._buffers)
        if all(f"{prefix}{name}" in state_dict for name in names) and not self.on_meta:
            self.missing = self.new = False

    @property
    def on_meta(self) -> bool:
        """True if a tensor is on the meta device, where none has values."""
        return any(tensor.is_meta for tensor in (*self.parameters(), *self.buffers()))

    def check(self, tensors: Collection[Tensor], beside: Tensor | None, doing: str) -> None:
        """Raise unless these tensors have values, or the weight beside them has none either."""
        if any(tensor.is_meta for tensor in tensors):
            if beside is None or not beside.is_meta:
                raise AdapterError(
                    f"The adapter's tensors are still on the meta device, and {doing} needs their "
                    "values: call model.to_empty(device=...) or load the base with "
                    "load_state_dict(..., assign=True), then lorafx.reset_parameters(model), or "
                    "load the adapter.")
        elif self.missing:
            if any(map(_lacks_values, tensors)):
                raise AdapterError(
                    f"The adapter's tensors have no values since they were on the meta device, and "
                    f"{doing} needs them: load the base and then the adapter, or let "
                    "lorafx.reset_parameters(model) make it anew.")
            self.missing = self.new = False


def _keeping(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function of a tensor as `Module._apply` takes it, of which the result has values."""

    @torch.no_grad()
    def apply(tensor: Tensor) -> Tensor:
        made = fn(tensor)
        if made is tensor or made.is_meta or made.shape != tensor.shape:
            return made
        if not tensor.is_meta:
            return made.copy_(tensor)
        return made.fill_(torch.nan) if made.is_floating_point() else made.zero_()

    return apply


@torch.no_grad()
def _lacks_values(tensor: Tensor) -> bool:
    return bool(local_part(tensor).isnan().any())
