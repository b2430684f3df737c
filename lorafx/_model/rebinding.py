"""What is registered in the place of a tensor that Python reads as an adapter has it.

A new W that is made of W + s B A would have the adapter in it twice, and is refused: a library that
is not in the table of readers, such as a quantiser, reads `layer.weight`, which is W + s B A, and
registers what it made of that in the place of W. A new value of a buffer of which an adapter has a
copy, as of running statistics, is the adapter's.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import AdaptedWeightError
from .._kernels.addend import Addend
from .._kernels.tensors import PLAIN
from .._kernels.private import is_transforming
from .._kernels.weights import whole
from .readers import Answer, answer_to, module_of, reader
from .reading import adapted_names, branches_beside, trained_beside

_SURE = 5.0  # standard deviations
# Methods of nn.Module that register what was not read here, or was read as it is registered.
_HARMLESS = (nn.Module._load_from_state_dict.__code__, nn.Module._apply.__code__)


class WatchedParameters(dict[str, nn.Parameter | None]):
    """The Parameters of an adapted module; copies of a dict are plain ones."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__(owner._parameters)
        self._owner = weakref.ref(owner)

    def __setitem__(self, name: str, value: nn.Parameter | None) -> None:
        owner = self._owner()
        if owner is not None and value is not None and name in adapted_names(owner):
            _check_rebound(owner, name, self.get(name), value)
        super().__setitem__(name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


class WatchedBuffers(dict[str, Tensor | None]):
    """The buffers of a module of which adapters have their own; copies of a dict are plain ones."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__(owner._buffers)
        self._owner = weakref.ref(owner)

    def __setitem__(self, name: str, value: Tensor | None) -> None:
        owner = self._owner()
        found = [] if owner is None or value is None else trained_beside(owner, name)
        if found and (torch.compiler.is_compiling() or _registering() is not None):
            [(holder, key)] = found
            holder._buffers[key] = value
        else:
            super().__setitem__(name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def watch_registered(module: nn.Module) -> None:
    """Have what is registered in the place of a module's adapted tensors looked at."""
    names = adapted_names(module)
    if names:
        module.__dict__["_parameters"] = WatchedParameters(module)
    if not module._buffers.keys().isdisjoint(names):
        module.__dict__["_buffers"] = WatchedBuffers(module)


def _registering() -> str | None:
    """The name of the module whose code registers a tensor; None where that is to be the base's."""
    frame = reader()
    while frame is not None and module_of(frame).startswith((nn.Module.__module__, "lorafx.")):
        if frame.f_code in _HARMLESS:
            return None
        frame = frame.f_back
    asking = module_of(frame)
    return None if answer_to(asking) in (Answer.PARAMETER, Answer.LAYER) else asking


def _check_rebound(owner: nn.Module, name: str, old: Tensor | None, new: Tensor) -> None:
    """Raise if a Parameter that is to be registered as W has the active adapters in it."""
    asking = None if old is None or old is new else _registering()
    if old is None or asking is None:
        return
    addends: list[Addend] = []
    for branch in branches_beside(owner, name):
        addends += [addend.detached for addend in branch.addends(old, stored=True)]
    if addends and has_adapter(old.detach(), new.detach(), addends):
        raise AdaptedWeightError(
            f"'{asking}' registers a {name} of a {type(owner).__name__} that it made of W + s B A, "
            f"as Python reads it, so that the adapter would be in it twice: read frozen_{name} "
            "there, or do that before lorafx.inject, or to what lorafx.merge returns.")


@torch.no_grad()
def has_adapter(old: Tensor, new: Tensor, addends: Sequence[Addend]) -> bool:
    """True if a new tensor is nearer to W + s B A than to W, its rows scaled or not.

    With rows scaled to length 1 it is fitted by a W + c s B A. The adapter is in it if c is nearer
    to a than to 0, by more than chance: by its standard error, whatever the noise of each element.
    False where that cannot be told: there are no values here, or the shapes differ.
    """
    if type(new).dequantize is not Tensor.dequantize or new.is_quantized:
        new = new.dequantize()
    plain = type(old) in PLAIN and type(new) in PLAIN and not is_transforming()
    if not plain or old.is_meta or new.is_meta or new.shape != old.shape or old.shape[-1] < 2:
        return False  # a row of one element says nothing but its sign
    if old.layout is not torch.strided or new.layout is not torch.strided:
        return False
    rows = [_sample(tensor) for tensor in (old, whole(old, addends), new)]
    base, summed, new = (tensor.double() for tensor in rows)
    kept = new != 0  # what was pruned says nothing
    base, delta = base * kept, (summed - base) * kept
    length, ours = new.norm(dim=-1, keepdim=True), base.norm(dim=-1, keepdim=True)
    told = (length > 0) & (ours > 0)
    base, delta, new = (torch.where(told, tensor / by, 0)
                        for tensor, by in ((base, ours), (delta, ours), (new, length)))
    beyond = delta - base * ((delta * base).sum() / base.square().sum())  # what W does not explain
    strength = beyond.square().sum()
    c = (new * beyond).sum() / strength
    a = (new * base).sum() / base.square().sum() - c * (delta * base).sum() / base.square().sum()
    noise = ((new - a * base - c * delta) * beyond).norm() / strength
    if a < 0:  # the signs are turned
        a, c = -a, -c
    return bool(strength > 0 and c > _SURE * noise and c > a / 2)


def _sample(tensor: Tensor) -> Tensor:
    """All rows of a small matrix, a few hundred of a large one."""
    rows = tensor.flatten(0, -2)
    return rows[::max(rows.shape[0] // 256, 1)]
