"""The call of an injected model: it uses, to its end, the adapters that held when it began."""

import functools
from typing import Any

import torch
from torch import nn

from .._errors import AdapterError
from .._graph.functions import package
from .._kernels.compiling import not_compiled_by_itself
from .choice import CALLED, Selection
from .record import RECORD
from .steps import LATER


_CHOSEN = "_lorafx_chosen"  # the attribute of a replica that holds what it uses


@not_compiled_by_itself
def pinned_call(model: nn.Module, call: Any, *args: Any, **kwargs: Any) -> Any:
    """A call of an injected model, which uses to its end what held when it began."""
    state = model.__dict__
    choice = state[RECORD].choice
    called, pinned = CALLED.set((model, choice)), None
    try:
        pinned = choice.pin(state.get(_CHOSEN))
        result = call(*args, **kwargs)
        later = LATER.get(type(result))
        return result if later is None else later(choice, choice.read(), result)
    finally:
        choice.unpin(pinned)
        CALLED.reset(called)


class Root:
    """The first base of an injected model's class.

    A compiler that takes the model's forward for a part of something larger sees a plain call.
    """

    @not_compiled_by_itself
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = super().__call__  # type: ignore[misc]
        if torch.compiler.is_dynamo_compiling():
            return call(*args, **kwargs)
        return pinned_call(self, call, *args, **kwargs)  # type: ignore[arg-type]

    def _replicate_for_data_parallel(self) -> Any:
        """A replica of DataParallel's, whose thread is told nothing of the caller's context.

        It uses what holds for the caller, in the modules of its own.
        """
        selection = self.__dict__[RECORD].choice.read()
        if selection.retired:
            raise AdapterError(
                f"Adapter {[*selection.retired][0]!r} has been replaced since lorafx.using or "
                "lorafx.rows was entered, and DataParallel copies what is there now: leave that.")
        twin = super()._replicate_for_data_parallel()  # type: ignore[misc]
        twin.__dict__[_CHOSEN] = Selection(selection.weights, selection.rows)
        return twin


def forward_of_torch(cls: type[nn.Module]) -> dict[str, Any]:
    """A forward of ours around one that is torch's, {} for a user's.

    torch.compile takes a module whose forward is torch's whole, and would trace its call.
    """
    theirs: Any = cls.forward
    if package(theirs) != "torch":
        return {}

    @functools.wraps(theirs)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return theirs(self, *args, **kwargs)

    return {"forward": forward}


class GraphCall:
    """The same for the class of a caller's GraphModule, whose call fx has made."""

    def __init__(self, call: Any) -> None:
        self.call = call

    @not_compiled_by_itself
    def __call__(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        return pinned_call(module, self.call, module, *args, **kwargs)
