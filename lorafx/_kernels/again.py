"""The input x of linear calls that is computed again in the backward pass, and not kept.

Autograd keeps x for the gradient of A. Where x has a recipe, what stands in its place are the
tensors that the recipe begins with, which autograd keeps anyway. A recipe is trusted at a site
after it gave exactly the x there, bit for bit; and again for each other tree of functions, and
other shapes, strides, dtypes or device of what it begins with.

Who writes into what is kept is told so by the backward pass, as ever, and so is who frees it; an x
that was written into is kept, and one that was computed from what is freed, as FSDP frees a norm's
weight after its layer. Not seen, once a recipe is trusted, is who writes past autograd into what
lies between x and what is kept (without gradients, or into `.data`), or past its versions into x
or what is kept (`.data`).
"""

import threading
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .private import any_autocast, at_end_of_backward, is_keeping_by_hooks, no_autocast
from .recipes import Recipe, check_memory, recipe_of
from .rows import ROWS

_DEFAULT = 1e-5  # eps, which torch's norms take without being given one

MOST_KINDS = 256  # of x at one site of which is known whether recipes give it

# An x of fewer bytes is kept: its memory is not worth the time that the search takes.
KEPT_BELOW = 1 << 17


class Proof(NamedTuple):
    """That a recipe gave x: by what its nodes tell, or by a guess."""

    guess: float | None = None


class Proven:
    """Which recipes gave the x of a site.

    `guesses` are what a norm's eps may be, which its node does not tell: the small numbers that a
    model holds; torch's default is tried too. Copies, and what is read from a file, know no recipe:
    they may run elsewhere.
    """

    def __init__(self, guesses: Iterable[float] = ()) -> None:
        self.guesses = tuple(sorted(set(guesses)))
        self._proofs: dict[Any, Proof | None] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Proven, (self.guesses,)

    def proof(self, recipe: Recipe, x: Tensor) -> Proof | None:
        """The proof, or None if there is none; it is tried if that is not known yet."""
        try:
            return self._proofs[recipe.key]
        except KeyError:
            proof = _proof(recipe, x, self.guesses)
        if len(self._proofs) >= MOST_KINDS:
            self._proofs.clear()
        self._proofs[recipe.key] = proof
        return proof


@torch.no_grad()
def _proof(recipe: Recipe, x: Tensor, guesses: tuple[float, ...]) -> Proof | None:
    tensors = recipe.tensors()
    if any([_share_memory(tensor, x) for tensor in tensors]):
        return None  # nothing is saved
    with no_autocast():
        if _gives(recipe, tensors, None, x):
            return Proof()
        if not recipe.guesses:
            return None
        found = [guess for guess in {_DEFAULT, *guesses} if _gives(recipe, tensors, guess, x)]
        if len(found) != 1:
            return None  # of two, x does not tell which is right
        others = () if found[0] in guesses else (_DEFAULT / 2, _DEFAULT * 2)
        if any([_gives(recipe, tensors, other, x) for other in others]):
            return None  # it may be any number
    return Proof(found[0])


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _gives(recipe: Recipe, tensors: list[Tensor], guess: float | None, x: Tensor) -> bool:
    try:
        value = recipe.computed(tensors, guess)
        if (value.dtype, value.device, value.shape) != (x.dtype, x.device, x.shape):
            return False
        return torch.equal(_bits(value), _bits(x))
    except RuntimeError:  # the table is wrong about this torch's node
        return False


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: Tensor) -> Tensor:
    """The elements as integers: equal only if they are the same, be they zeros or not numbers."""
    return tensor.detach().contiguous().view(_INTEGERS[min(tensor.dtype.itemsize, 8)])


class _Value:
    """A value that several sites compute again: once in a backward pass, in which it is freed."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.sites = self._left = 0
        self._value: Tensor | None = None
        self._stream: Any = None

    def get(self, tensors: list[Tensor], proof: Proof) -> Tensor:
        """The value, computed from these tensors unless another site has done so."""
        stream = _stream(tensors[0].device)
        value = self._value if self._stream == stream else None
        if value is None:
            if torch.is_grad_enabled() or any_autocast():  # to enter contexts takes time
                with torch.no_grad(), no_autocast():
                    value = self.recipe.computed(tensors, proof.guess)
            else:
                value = self.recipe.computed(tensors, proof.guess)
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

    def __init__(self, value: _Value, proof: Proof, x: Tensor) -> None:
        self._value, self._proof = value, proof
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

    def stand_in_product(self, h: Tensor) -> None:
        """Keep this and not x in the node of a product h = x R^T, or of what h is a view of."""
        node: Any = h.grad_fn
        row = ROWS.get(type(node).__name__)
        if row is not None and row.arranges:
            node = node.next_functions[0][0]
        self.stand_in(node, "self")

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
                    f"version {tensor._version}; expected version {version} instead. Write into it "
                    "after the backward pass, or keep that input: inject(..., recompute=False).")
        check_memory(self._tensors)
        return self._value.get(self._tensors, self._proof).view(packed)


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
        proof = proven.proof(value.recipe, x)
        return None if proof is None else Again(value, proof, x)
    except RuntimeError:  # something wrote into what is kept since the last call
        return None
