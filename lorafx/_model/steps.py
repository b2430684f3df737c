"""What a forward returns that runs later, step by step: each uses what held when it was called."""

import types
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from typing import Any

from .choice import Choice, Selection


async def _awaited(
    choice: Choice, selection: Selection, steps: Coroutine[Any, Any, Any]
) -> Any:
    """A task has a context of its own, in which this holds between steps too."""
    pinned = choice.pin(selection)
    try:
        return await steps
    finally:
        choice.unpin(pinned)


def _generated(
    choice: Choice, selection: Selection, steps: Generator[Any, Any, Any]
) -> Generator[Any, Any, Any]:
    """Between steps nothing holds, since others run then in the same context."""
    step: Callable[[Any], Any] = steps.send
    given: Any = None
    while True:
        pinned = choice.pin(selection)
        try:
            found = step(given)
        except StopIteration as end:
            return end.value
        finally:
            choice.unpin(pinned)
        try:
            step, given = steps.send, (yield found)
        except BaseException as error:
            step, given = steps.throw, error


async def _generated_async(
    choice: Choice, selection: Selection, steps: AsyncGenerator[Any, Any]
) -> AsyncGenerator[Any, Any]:
    step: Callable[[Any], Any] = steps.asend
    given: Any = None
    while True:
        pinned = choice.pin(selection)
        try:
            found = await step(given)
        except StopAsyncIteration:
            return
        finally:
            choice.unpin(pinned)
        try:
            step, given = steps.asend, (yield found)
        except BaseException as error:
            step, given = steps.athrow, error


# {what a forward returned: what runs it}
LATER: dict[type, Callable[[Choice, Selection, Any], Any]] = {
    types.CoroutineType: _awaited,
    types.GeneratorType: _generated,
    types.AsyncGeneratorType: _generated_async,
}
