"""The scale of A and B in a model's state_dict, so that its checkpoints are whole adapters."""

from typing import Any

import torch
from torch import Tensor

from .._errors import AdapterError
from .held import Held
from .shards import local_part, whole_beside


class Scaled(Held):
    """A and B whose state_dict has `s`, their scale, where it is not 1, and checks it on loading.

    As a number it is not what `to` and `half` cast, nor what optimizers and wrappers look for.
    """

    scale: float

    @property
    def s(self) -> Tensor:
        """The scale, float64: on the CPU, or where A is spread over processes, in each of them."""
        return whole_beside(
            self._parameters["A"], torch.tensor(self.scale, dtype=torch.float64))

    @s.setter
    def s(self, value: Tensor) -> None:
        """The same again, for `torch.func.functional_call(model, model.state_dict(), x)`."""
        problem = self._difference(value)
        if problem:
            raise AdapterError(f"The scale {problem}")

    def _difference(self, value: Tensor) -> str:
        """What to say where this is not the scale, else nothing."""
        if value.is_meta:
            return ""
        there = local_part(value).cpu()
        here = torch.tensor(self.scale, dtype=torch.float64)
        if torch.equal(there, here.to(there.dtype)):
            return ""
        return (f"is {there.tolist()}, and here it is {self.scale:g}: make this adapter with the "
                "alpha and rank of the one that was saved.")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.scale != 1:
            destination[f"{prefix}s"] = self.s

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:
        key = f"{prefix}s"
        rest = {name: value for name, value in state_dict.items() if name != key}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing, unexpected, errors)
        problem = self._difference(state_dict[key]) if key in state_dict else ""
        if problem:
            errors.append(f"{key}, the scale, {problem}")
