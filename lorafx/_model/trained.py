"""What adapters train whole: copies of a base module's tensors, which stand in their places."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .._adapter.names import split_block
from .._errors import UnsupportedModelError
from .._graph.modules import LorafxModule
from .choice import Choice, Selection
from .held import Held
from .shards import is_sharded, spread_like


class Copies(Held):
    """What one adapter has in the place of a base module's tensors: its parameters and buffers.

    What the base has in several places, as a head tied to an embedding, is held in the first of
    them. `elsewhere` says of the others who holds it: {name: (copies, name there)}. What stands in
    the place of some rows is named by them too, `weight[100:103]`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.elsewhere: dict[str, tuple["Copies", str]] = {}
        # {name: the rows in whose place it stands}, where that is not all of a tensor
        self.rows: dict[str, tuple[range, ...]] = {}
        # {name: in whose place the base was spread over processes, so that this was too}
        self.spread_by: dict[str, Trained] = {}

    def reset_parameters(self) -> None:
        """Nothing, for loops that call it: `lorafx.reset_parameters` copies the base's values."""

    def holders(self) -> dict[str, tuple["Copies", str]]:
        """{name of a tensor of the base module: who holds what stands there, and its name there}"""
        own = (*self._parameters, *self._buffers)
        return {name: (self, name) for name in own} | self.elsewhere

    def holder(self, name: str) -> tuple["Copies", str] | None:
        """The same for one tensor; None if nothing stands in its place."""
        if name in self._parameters or name in self._buffers:
            return self, name
        return self.elsewhere.get(name)

    def holders_for(self, name: str) -> list[tuple["Copies", str]]:
        """Who holds what stands in the place of a tensor, or of some of its rows."""
        return [found for key, found in self.holders().items() if split_block(key)[0] == name]

    def held(self, name: str) -> Tensor:
        """A tensor that is held here."""
        tensor = self._parameters.get(name, self._buffers.get(name))
        assert tensor is not None
        return tensor

    def spread(self, name: str, weight: Tensor | None, by: "Trained") -> None:
        """Spread a Parameter over processes as the base's is, in the place of which it stands."""
        old = self._parameters.get(name)
        if old is None or weight is None or not is_sharded(weight):
            return
        if not is_sharded(old):
            new = nn.Parameter(spread_like(weight, old.detach()), old.requires_grad)
            self._parameters[name], self.spread_by[name] = new, by
            return
        here, there = weight.placements, old.placements  # type: ignore[attr-defined]
        if self.spread_by.get(name, by) is not by and here != there:
            raise UnsupportedModelError(
                "A tensor that an adapter trains whole has two names, as a head tied to an "
                f"embedding, and would be spread over processes in two ways, {there} and {here}: "
                "choose one.")

    def check_all_spread(self, name: str, base: Any) -> None:
        """Raise if a tensor was spread over processes under another name of it, not under this."""
        if not torch.compiler.is_compiling() and name in self.spread_by and not is_sharded(base):
            raise UnsupportedModelError(
                "A tensor that an adapter trains whole has two names, as a head tied to an "
                "embedding, and was spread over processes under one of them: spread both in the "
                "same way.")


class Trained(LorafxModule):
    """What adapters train of one base module's tensors, a set for each adapter."""

    def __init__(self, choice: Choice) -> None:
        super().__init__()
        self.choice = choice

    def sets(self) -> dict[str, Copies]:
        """{adapter: its copies}."""
        return {name: copies for name, copies in self._modules.items()
                if isinstance(copies, Copies)}

    def holders(self, name: str, selection: Selection | None = None) -> list[tuple[Copies, str]]:
        """Who holds what stands now in the place of a tensor of the base, or of some of its rows.
        """
        found: list[tuple[Copies, str]] = []
        if selection is None:
            selection = self.choice.now
        for adapter in selection.weights:
            copies = selection.held(self, adapter)
            if copies is not None:
                found += copies.holders_for(name)
        return found

    def spread(self, name: str, weight: Tensor | None) -> None:
        """Spread all that stands in the place of one base tensor over processes as that is."""
        for copies in self.sets().values():
            found = copies.holder(name)
            if found is not None:
                found[0].spread(found[1], weight, self)

    def having(self, adapters: Iterable[str]) -> tuple[str, ...]:
        """Those among these adapters that have a set."""
        return tuple(name for name in adapters if name in self._modules)
