"""The call of an injected model: it uses, to its end, the adapters that held when it began."""

from typing import Any

import torch

from .._kernels.compiling import not_compiled_by_itself
from .record import RECORD


class Root:
    """The first base of an injected model's class.

    A compiler that takes the model's forward for a part of something larger sees a plain call.
    """

    @not_compiled_by_itself
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        choice = self.__dict__[RECORD].choice
        pinned = choice.pin()
        if pinned is None:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        try:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        finally:
            choice.unpin(pinned)


class GraphCall:
    """The same for the class of a caller's GraphModule, whose call fx has made."""

    def __init__(self, call: Any) -> None:
        self.call = call

    @not_compiled_by_itself
    def __call__(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        choice = module.__dict__[RECORD].choice
        pinned = choice.pin()
        try:
            return self.call(module, *args, **kwargs)
        finally:
            if pinned is not None:
                choice.unpin(pinned)
