"""W + sum s B A in the place of W, or what would be lost there, for one weight at a time."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._errors import UnsupportedModelError
from .._graph.dispatched import put, value_of
from .._graph.modules import Place, submodule
from .._kernels.addend import Addend
from .._kernels.losses import Losses
from .._kernels.scratch import Scratch
from .._kernels.weights import folded, rows_at_a_time, rows_of
from .copies import same_kind
from .places import places_of
from .shards import gathered, gathered_beside
from .unpack import Unpacking, is_quantised


# {names of one weight: {site: what is added there}}
ToFold = dict[tuple[str, ...], dict[str, list[Addend]]]
_BLOCKS = 16  # of those that `folded` sums at a time, this many are compared at a time


def tensors(owner: nn.Module, name: str) -> dict[str, Any]:
    """The table of a module in which a tensor is registered."""
    return owner._parameters if name in owner._parameters else owner._buffers


def fold(places: Sequence[Place], addends: Sequence[Addend], scratch: Scratch) -> None:
    """Put W + sum s B A, rounded once to W's dtype, in the place of W, under all of its names."""
    for owner, attribute in places:
        if parametrize.is_parametrized(owner, attribute):
            _bake(owner, attribute)
    value = _value_at(places[0])
    parts = []
    for addend in addends:
        left, right = (gathered_beside(value, factor.detach()) for factor in addend[:2])
        parts.append(addend._replace(left=left, right=right))
    total = folded(value, parts, scratch)
    weight = places[0].module._parameters.get(places[0].attribute)
    new = total if weight is None else same_kind(weight, total)
    for owner, attribute in places:
        if not put(owner, attribute, new):
            tensors(owner, attribute)[attribute] = new


def _value_at(place: Place) -> Tensor:
    """W, where it has values and may be replaced by others."""
    owner, attribute = place
    if parametrize.is_parametrized(owner, attribute):
        return _computed(owner, attribute)
    weight = owner._parameters.get(attribute, owner._buffers.get(attribute))
    if weight is None:
        raise UnsupportedModelError(
            f"The {attribute} of a {type(owner).__name__} is computed before every call, by a hook "
            "such as the old weight_norm's: remove that from the model "
            "(torch.nn.utils.remove_weight_norm) before lorafx.inject.")
    value = value_of(owner, attribute, weight.detach())
    if value.is_meta:
        raise UnsupportedModelError(
            f"The {attribute} of a {type(owner).__name__} is still on the meta device, so that "
            "nothing can be folded into it: load the base before lorafx.merge.")
    return value


def _computed(owner: nn.Module, attribute: str) -> Tensor:
    """A copy of the weight that a parametrization computes in eval."""
    training = owner.training
    with torch.no_grad():
        weight: Tensor = getattr(owner.eval(), attribute).clone()
    owner.train(training)
    return weight


def _bake(owner: nn.Module, attribute: str) -> None:
    """Put the weight that a parametrization computes, in eval, in its place, as a Parameter.

    torch's remove_parametrizations would do it to every copy of the module, since copies share the
    class.
    """
    weight = _computed(owner, attribute)
    cls: Any = type(owner)
    rest, computed = dict(vars(cls)), submodule(owner, "parametrizations")._modules
    del rest[attribute], computed[attribute]
    if computed:
        owner.__class__ = type(cls)(cls.__name__, cls.__bases__, rest)
    else:
        del owner._modules["parametrizations"]
        owner.__class__ = cls.__bases__[0]
    owner._parameters[attribute] = nn.Parameter(weight, requires_grad=False)


def losses(
    twin: nn.Module, to_fold: ToFold, dtype: torch.dtype | None, requantize: bool
) -> dict[str, float]:
    """Return {site: |stored - (W + D)| / |D|} of what folding would store, of W cast to a dtype."""
    places, scratch, unpacking = places_of(twin), Scratch(), Unpacking(twin, requantize)
    errors: dict[str, float] = {}
    for aliases, by_site in to_fold.items():
        place = places[aliases[0]]
        whole = {site: _gathered(addends) for site, addends in by_site.items()}
        if is_quantised(place):
            addends = [addend for part in whole.values() for addend in part]
            W, stored = unpacking.foretold(aliases[0], place, addends, dtype)
            found = Losses(whole, len(W))
            found.note_all(W, stored)
        else:
            W = gathered(_value_at(place))
            found = _losses_of(W if dtype is None else W.to(dtype), whole, scratch)
        errors |= found.errors()
    return errors


def _gathered(addends: Sequence[Addend]) -> list[Addend]:
    """The addends with all of their factors, where those are spread over processes."""
    whole = []
    for addend in addends:
        left, right = (gathered(factor.detach()) for factor in addend[:2])
        whole.append(addend._replace(left=left, right=right))
    return whole


def _losses_of(W: Tensor, by_site: Mapping[str, Sequence[Addend]], scratch: Scratch) -> Losses:
    """What rounding W + D to W's dtype loses, as many rows at a time as `folded` sums, or more."""
    found = Losses(by_site, W.shape[-2])
    addends = [addend for part in by_site.values() for addend in part]
    length = _BLOCKS * rows_at_a_time(W.shape, W.device.type)
    for start in range(0, W.shape[-2], length):
        rows = W[..., start:start + length, :]
        stored = scratch.empty("stored", rows.shape, rows.dtype, rows.device)
        folded(rows, rows_of(addends, start, rows.shape[-2]), scratch, stored, found.note)
    return found
