"""Which adapters forward uses: the model's own choice, or that of the context that it runs in."""

import contextlib
import contextvars
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .._errors import AdapterError
from .._graph.modules import LorafxModule, named_modules, outermost
from .._kernels.checkpoints import checkpointed_function
from .._kernels.compiling import Anew, end_program, not_compiled
from .._kernels.private import is_in_backward


RECENT = 16  # selections that are kept


class Selection:
    """What forward adds: {adapter: weight}, or one of these for each row of a batch.

    `weights` has all adapters that are used. Who made a selection goes on with what there was then:
    what has gone since is `retired`, {adapter: {holder: what it held}}.
    """

    def __init__(
        self, weights: Mapping[str, float], rows: Sequence[Mapping[str, float]] | None = None
    ) -> None:
        self.weights, self.rows = dict(weights), rows
        self.retired: dict[str, Mapping[nn.Module, Any]] = {}
        # what was made of factors, and of several adapters', by all selections of a time
        self.made: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
        self.kept: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
        self.gates: list[tuple[Any, Any]] = []  # with the ranks and scales that they are for

    def held(self, holder: nn.Module, adapter: str) -> Any:
        """What a branch or the like has of an adapter, or had before that went; None for nothing.
        """
        found = holder._modules.get(adapter)  # first: what goes is retired before it goes
        return found if adapter not in self.retired else self.retired[adapter].get(holder)

    def __getstate__(self) -> dict[str, Any]:
        return {"weights": self.weights, "rows": self.rows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


class _Context:
    """A selection that holds, and the call of a checkpointed function that chose it, if any.

    Of a call of the model, also what compiled programs have read in it.
    """

    __slots__ = ("selection", "function", "before", "read", "out_of_turn")

    def __init__(
        self, selection: Selection, function: Any = None, before: "_Context | None" = None,
        read: dict[Any, Any] | None = None,
    ) -> None:
        self.selection, self.function, self.before = selection, function, before
        self.read = read
        self.out_of_turn = False  # True once it was left where or when it was not the innermost

    def outer(self) -> "_Context | None":
        """What holds when this is left."""
        before = self.before
        while before is not None and before.out_of_turn:
            before = before.before
        return before


class Choice:
    """What all branches of a model ask which adapters to use.

    `default` is the model's own. What `choosing` or `pin` sets holds in its thread or task; and
    where a checkpointed function runs again, what held when it first ran.
    """

    def __init__(self) -> None:
        self.trains = False  # True once something was active, which trains, or has room
        self.drops = False  # True once an adapter was there that drops out in training
        self._start({})

    def _start(self, weights: Mapping[str, float]) -> None:
        self.lock = threading.RLock()  # held while adapters go, and where selections are made
        self._alive: weakref.WeakSet[Selection] = weakref.WeakSet()
        self._here: contextvars.ContextVar[_Context | None] = contextvars.ContextVar(
            "lorafx", default=None)
        self._entered: list[Selection] = []  # in all threads and tasks
        self._functions: weakref.WeakKeyDictionary[Any, Selection] = weakref.WeakKeyDictionary()
        self._chose_with_gradients = False
        self.compiled = False  # True once a compiled program has read what is active
        self._forget()
        self.choose(weights)

    def _forget(self) -> None:
        self._recent: dict[Any, Selection] = {}
        # {branch: {(form, adapters): what was made of their factors}}
        self._kept: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {"default": self.default, "trains": self.trains, "drops": self.drops}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.trains, self.drops = state["trains"], state["drops"]
        self._start(state["default"].weights)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Choice":
        """One and the same, for the copy of a part: it follows the model that it is a part of."""
        twin = object.__new__(type(self))
        twin.__dict__ = self.__dict__
        return twin

    def is_same(self, other: "Choice") -> bool:
        """True if one follows the other, whatever is chosen."""
        return self.__dict__ is other.__dict__

    def begin_anew(self) -> None:
        """Choose apart from others from now on, as a copy of a whole model does."""
        state, self.__dict__ = self.__getstate__(), {}
        self.__setstate__(state)

    def _new(
        self, weights: Mapping[str, float], rows: Sequence[Mapping[str, float]] | None = None
    ) -> Selection:
        made = Selection(weights, rows)
        made.kept = self._kept
        self._alive.add(made)
        return made

    def choose(self, weights: Mapping[str, float]) -> None:
        """Let this be the model's own choice from now on."""
        with self.lock:
            self.default = self.selection(weights)

    @not_compiled
    def selection(
        self, weights: Mapping[str, float], rows: Sequence[Mapping[str, float]] | None = None
    ) -> Selection:
        """The same again for what was chosen a short while ago, with what was made for it."""
        end_program()
        each = [tuple(row.items()) for row in rows or ()]
        key = tuple(weights.items()), rows is None, tuple(each)
        with self.lock:
            found = self._recent.get(key)
            if found is None:
                found = self._recent[key] = self._new(weights, rows)
                for oldest in [*self._recent][:-RECENT]:
                    self._recent.pop(oldest, None)
        return found

    def retire(self, adapter: str, held: Mapping[nn.Module, Any]) -> None:
        """Let who has a selection go on with what holders have of an adapter now.

        `lock` is held until all is in place that new selections, among them `choose`, shall find.
        """
        for selection in list(self._alive):
            if adapter in selection.weights:
                selection.retired.setdefault(adapter, held)
        self._forget()

    @property
    def any_retired(self) -> bool:
        """True if somebody goes on with what an adapter was before."""
        with self.lock:
            return any([selection.retired for selection in list(self._alive)])

    def pin(self, selection: Selection | None = None) -> Any:
        """Let this, or what holds here, do so until `unpin` is given what this returns.

        That is None where a call is under way, or a context in one, which says what holds.
        """
        here, function = self._here.get(), None
        if selection is None:
            if here is None:
                selection = self.read()
            elif here.read is None:
                selection, function = here.selection, here.function
            else:
                return None
        return self._here.set(_Context(selection, function, here, read={}))

    def unpin(self, pinned: Any) -> None:
        """End what `pin` began."""
        if pinned is not None:
            try:
                self._here.reset(pinned)
            except ValueError:  # a coroutine is closed in another context, where nothing holds
                pass

    @contextlib.contextmanager
    def choosing(self, selection: Selection) -> Iterator[None]:
        """Within this context, in this thread or task, forward uses a selection."""
        function, again = checkpointed_function()
        if function is not None and not again:
            here = self._here.get()
            self._functions.setdefault(function, here.selection if here else self.default)
        self._chose_with_gradients |= torch.is_grad_enabled()
        self._entered.append(selection)
        context = _Context(selection, function, self._here.get())
        self._here.set(context)
        try:
            yield
        finally:
            self._entered.remove(selection)
            if self._here.get() is context:
                self._here.set(context.outer())
            else:
                context.out_of_turn = True
        if context.out_of_turn:
            raise AdapterError(OUT_OF_TURN)

    def check_not_entered(self, adapter: str) -> None:
        """Raise if a context uses this adapter, which would find it no more."""
        if any([adapter in selection.weights for selection in self._entered]):
            raise AdapterError(f"Adapter {adapter!r} is used within lorafx.using or lorafx.rows, "
                               "here or in another thread or task: leave that first.")

    def read(self) -> Selection:
        """The selection that holds here."""
        here = self._here.get()
        selection = self.default if here is None else here.selection
        if here is None:
            called = CALLED.get()
            if called is not None and not called[1].is_same(self):
                check_parts(*called)
        function, again = checkpointed_function()
        if function is None:
            if self._chose_with_gradients and here is None and is_in_backward():
                raise AdapterError(UNKNOWN_FORWARD)
            return selection
        if here is not None and here.function is function:
            return selection
        if again:
            return self._functions.get(function, selection)
        return self._functions.setdefault(function, selection)  # to its end, as it runs again

    def read_in_call(self, selection: Selection) -> dict[Any, Any]:
        """{reader: what it read of a selection} in the call that is under way; else nothing."""
        here = self._here.get()
        if here is None or here.read is None or here.selection is not selection:
            return {}
        return here.read

    _anew: Any = property(Anew(read).__getitem__)

    @property
    def now(self) -> Selection:
        """The selection that holds here, for what a compiler or exporter may trace."""
        return self._anew if torch.compiler.is_dynamo_compiling() else self.read()


# (an injected model of which a call is under way here, its choice): the innermost
CALLED: contextvars.ContextVar[tuple[nn.Module, Choice] | None] = contextvars.ContextVar(
    "lorafx call", default=None)


def check_parts(model: nn.Module, choice: Choice) -> None:
    """Raise if an injected model has branches, or the like, that do not follow its choice."""
    for part in outermost(model, (LorafxModule,)):
        other = part.__dict__.get("choice")
        if isinstance(other, Choice) and not other.is_same(choice):
            path = next(path for path, module in named_modules(model) if module is part)
            raise AdapterError(
                f"'{path}' is part of another injected model, or was pickled by itself, and does "
                "not use what is active in this one: copy a layer of this one, or take it from "
                "lorafx.eject of the other before the whole is injected.")


OUT_OF_TURN = (
    "lorafx.using or lorafx.rows was left in another order, thread or task than it was entered, as "
    "by generators that are stepped by turns: what was computed in it may have used other "
    "adapters. Enter it anew for each step.")
UNKNOWN_FORWARD = (
    "A forward runs in a backward pass, and it cannot be told which adapters it used the first "
    "time, as lorafx.using may have chosen them: checkpoint with use_reentrant=False.")
