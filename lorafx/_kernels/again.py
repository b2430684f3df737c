"""The input x of linear calls that is computed again in the backward pass, and not kept.

Autograd keeps x for the gradient of A. Where x has a recipe, what stands in its place are the
tensors that the recipe begins with, which autograd keeps anyway. A recipe is trusted at a site
after it gave exactly the x there, bit for bit; and again for each other tree of functions, and
other shapes, strides, dtypes or device of what it begins with.
"""

import contextlib
import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from .private import any_autocast, at_end_of_backward, is_keeping_by_hooks, no_autocast
from .recipes import Recipe, recipe_of

MOST_KINDS = 256  # of x at one site of which is known whether recipes give it

# An x of fewer bytes is kept: its memory is not worth the time that the search takes.
KEPT_BELOW = 1 << 17


class Proven:
    """Which recipes gave the x of a site, by which choice of their functions.

    Copies, and what is read from a file, know none: they may run elsewhere.
    """

    def __init__(self) -> None:
        self._choices: dict[Any, int | None] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Proven, ()

    def choice(self, recipe: Recipe, x: Tensor) -> int | None:
        """The choice that gave x, or None if none did; it is tried if that is not known yet."""
        if recipe.key not in self._choices:
            if len(self._choices) >= MOST_KINDS:
                self._choices.clear()
            self._choices[recipe.key] = _proof(recipe, x)
        return self._choices[recipe.key]


@torch.no_grad()
def _proof(recipe: Recipe, x: Tensor) -> int | None:
    tensors = recipe.tensors()
    if any([_share_memory(tensor, x) for tensor in tensors]):
        return None  # nothing is saved
    with no_autocast():
        if _gives(recipe, tensors, 0, x):
            return 0
        guesses = range(1, recipe.choices)
        found = [choice for choice in guesses if _gives(recipe, tensors, choice, x)]
    return found[0] if len(found) == 1 else None  # of two guesses, x does not tell which is right


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _gives(recipe: Recipe, tensors: list[Tensor], choice: int, x: Tensor) -> bool:
    try:
        value = recipe.computed(tensors, choice)
        if (value.dtype, value.device, value.shape) != (x.dtype, x.device, x.shape):
            return False
        return torch.equal(_bits(value), _bits(x))
    except RuntimeError:  # the table is wrong about this torch's node
        return False


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: Tensor) -> Tensor:
    """The elements as integers: equal only if they are the same, be they zeros or not numbers."""
    return tensor.detach().contiguous().view(_INTEGERS[tensor.dtype.itemsize])


class _Value:
    """A value that several sites compute again: once in a backward pass, in which it is freed."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.sites = self._left = 0
        self._value: Tensor | None = None
        self._stream: Any = None

    def get(self, tensors: list[Tensor], choice: int) -> Tensor:
        """The value, computed from these tensors unless another site has done so."""
        stream = _stream(tensors[0].device)
        value = self._value if self._stream == stream else None
        if value is None:
            with torch.no_grad(), no_autocast() if any_autocast() else contextlib.nullcontext():
                value = self.recipe.computed(tensors, choice)
            if self.sites > 1 and at_end_of_backward(self._free):
                self._value, self._stream, self._left = value, stream, self.sites
        self._left -= 1
        if self._left <= 0:
            self._free()
        return value

    def _free(self) -> None:
        self._value = None


def _stream(device: torch.device) -> Any:
    return None if device.type == "cpu" else torch.accelerator.current_stream(device)


class Again:
    """What stands in the place of an x that autograd would keep."""

    def __init__(self, value: _Value, choice: int, x: Tensor) -> None:
        self._value, self._choice = value, choice
        self._tensors = value.recipe.tensors()
        self._versions = [tensor._version for tensor in self._tensors]
        self._x = x.data_ptr(), x.numel()

    def stand_in(self, node: Any, saved: str) -> None:
        """Keep this and not x, which a node of autograd, just made, keeps as `_saved_<saved>`."""
        raw = getattr(node, f"_raw_saved_{saved}", None)
        if isinstance(raw, (list, tuple)):
            raw = raw[0]
        if raw is not None:
            self._value.sites += 1
            raw.register_hooks(self._pack, self._unpack)

    def _pack(self, kept: Tensor) -> Any:
        is_x = (kept.data_ptr(), kept.numel()) == self._x
        return kept.shape if is_x else kept

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        for tensor, version in zip(self._tensors, self._versions):
            if tensor._version != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an "
                    f"inplace operation: a {tensor.dtype} tensor of shape {tuple(tensor.shape)}, "
                    "from which the input of an adapted linear call is computed again, is at "
                    f"version {tensor._version}; expected version {version} instead.")
        return self._value.get(self._tensors, self._choice).view(packed)


class _Last(threading.local):
    """The last x, and its value, as long as it lives: the next call may be on the same one."""

    def __init__(self) -> None:
        self._x: Any = None
        self._value: _Value | None = None

    def value(self, x: Tensor) -> _Value | None:
        if self._x is None or self._x() is not x:
            recipe = recipe_of(x)
            self._value = None if recipe is None else _Value(recipe)
            self._x = weakref.ref(x, self._forget)
        return self._value

    def _forget(self, x: Any) -> None:
        if self._x is x:
            self._x = self._value = None


_last = _Last()


def again(x: Tensor, proven: Proven | None) -> Again | None:
    """Return what may stand in the place of x at the site that proved it; None: x is to be kept."""
    if proven is None or x.grad_fn is None or x.untyped_storage().nbytes() < KEPT_BELOW:
        return None
    # what was written into, be it without autograd's knowledge, may not be what its node gave
    if x._version or is_keeping_by_hooks():
        return None
    value = _last.value(x)
    if value is None:
        return None
    try:
        choice = proven.choice(value.recipe, x)
        return None if choice is None else Again(value, choice, x)
    except RuntimeError:  # something wrote into what is kept since the last call
        return None
