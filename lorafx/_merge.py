"""Folds adapters into weights, W + s B A, or drops them: a new model of the original class."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from ._adapter.config import FLOATS, short_repr
from ._adapter.losses import check_errors, check_max_error
from ._adapter.names import branch_name, dotted, ranges_of, split_block
from ._errors import ConfigError, TiedWeightError, UnsupportedModelError
from ._graph.dispatched import put, value_of
from ._graph.modules import LorafxModule, Place, all_modules, named_modules, submodule, unwrapped
from ._kernels.scratch import Scratch
from ._kernels.weights import with_rows
from ._model.branches import Branch, branches, factors_at
from ._model.extract import check_in_place
from ._model.guard import (
    check_each_in_its_place, check_forwards_can_be_copied, check_graphs_not_dispatched
)
from ._model.copies import same_kind, share
from ._model.exported_program import takes_exported
from ._model.flat import check_can_be_copied
from ._model.folding import ToFold, fold, losses, tensors
from ._model.places import base_parameters, places_of
from ._model.reading import original_name
from ._model.record import (
    RECORD, injection, of_one_moment, trained_modules, used_here, weights_of
)
from ._model.regions import is_plain_graph
from ._model.shards import gathered_beside
from ._model.unpack import Unpacking, declare_plain, is_quantised


M = TypeVar("M", bound=nn.Module | ExportedProgram)


@takes_exported
@torch.inference_mode(False)
def eject(model: M) -> M:
    """Return the original model, as a new model on the same weights.

    It has the original's class, keys and requires_grad flags; adapters are dropped. Nothing of the
    injected model changes.

    Raises:
        NotInjectedError: the model was not made by lorafx.

    Example:
        >>> import torch, lorafx
        >>> model = torch.nn.Linear(4, 4)
        >>> type(lorafx.eject(lorafx.inject(model))) is torch.nn.Linear
        True
    """
    assert not isinstance(model, ExportedProgram)  # takes_exported saw to that
    injection(model)
    check_graphs_not_dispatched(model)
    check_forwards_can_be_copied(model)
    check_can_be_copied(model)
    return _ejected(model)  # type: ignore[return-value]


def _ejected(model: nn.Module) -> nn.Module:
    """The original of a model that can be copied."""
    record = injection(model)
    model = unwrapped(model)
    twin = share(model, ejecting=True)
    for path, module in named_modules(model):
        if is_plain_graph(module):
            _erase_branches(submodule(twin, path), module)
    for _, module in all_modules(twin):
        for name, child in list(module._modules.items()):
            if isinstance(child, LorafxModule):
                del module._modules[name]
    del twin.__dict__[RECORD]
    for name, parameter in base_parameters(twin).items():
        parameter.requires_grad_(record.requires_grad.get(name, parameter.requires_grad))
    return twin


def _erase_branches(module: Any, injected: fx.GraphModule) -> None:
    """Write the graph of an injected GraphModule's copy without branches."""
    for node in module.graph.find_nodes(op="get_attr"):
        owner, _, attribute = str(node.target).rpartition(".")
        node.target = dotted(owner, original_name(submodule(injected, owner), attribute))
    for node in module.graph.find_nodes(op="call_module"):
        if isinstance(submodule(injected, node.target), Branch):
            node.replace_all_uses_with(node.args[1])
            module.graph.erase_node(node)
    module.recompile()


@takes_exported
@torch.inference_mode(False)
def merge(
    model: M,
    adapters: str | Iterable[str] | Mapping[str, float] | None = None,
    *,
    untie: bool = False,
    requantize: bool = False,
    max_error: float | None = None,
) -> M:
    """Return a new model of the original class with adapters folded in: W + sum w s B A.

    The sum is computed in float32, or float64 where W, A or B are, and rounded once to W's dtype.
    Weights that no adapter touches, and buffers of them, share storage with the base. Of a weight
    that is quantised, the sum is that of the dequantised W, and a layer that packs it becomes a
    plain nn.Linear, of the dtype that most other weights of the model have, else of its products.

    Args:
        model: an injected model.
        adapters: what to fold, as for `lorafx.activate`; by default what forward uses here, so
            within `lorafx.using` what that chose, elsewhere the active adapters.
        untie: give an adapted weight that something else reads (a head tied to an embedding) a
            tensor of its own.
        requantize: store the sum of a weight that is quantised in the same way again. The new
            model's `requantize_error` is {site: norm of what this changed / norm of s B A}.
        max_error: the largest `lorafx.merge_error` of a site that is accepted; any by default.

    Raises:
        TiedWeightError: such a weight exists and `untie` is false.
        AdaptedWeightError: a site's error exceeds `max_error`. Nothing is folded then.
        AdapterError: an adapter's name is unknown.
        UnsupportedModelError: how to quantise a weight again is not known.

    Example:
        >>> import torch, lorafx
        >>> model = lorafx.inject(torch.nn.Linear(4, 4))
        >>> x = torch.randn(2, 4)
        >>> torch.allclose(lorafx.merge(model)(x), model(x))
        True
    """
    assert not isinstance(model, ExportedProgram)  # takes_exported saw to that
    check_max_error(max_error)
    twin, to_fold = _prepared(model, adapters, untie)
    if max_error is not None:
        check_errors(losses(twin, to_fold, None, requantize), max_error)
    return _fold_all(twin, to_fold, requantize)  # type: ignore[no-any-return]


@takes_exported
@torch.inference_mode(False)
def merge_error(
    model: nn.Module | ExportedProgram,
    adapters: str | Iterable[str] | Mapping[str, float] | None = None,
    dtype: torch.dtype | None = None,
    *,
    requantize: bool = False,
) -> dict[str, float]:
    """Return {site: |stored - (W + D)| / |D|}: what `merge` would lose of D, sum w s B A.

    What `merge` would store of W + D is compared with the exact sum, in Frobenius norms; where D is
    0, so is the error. About 1 means that D is lost whole: its entries are far below the steps of
    W's dtype. Some rows are computed at a time (a quantised weight as a whole), and no model is
    made.

    Args:
        model: an injected model.
        adapters: what would be folded, as for `lorafx.merge`, and by default as there.
        dtype: ask of a base that was cast to this dtype; by default of the base as it is.
        requantize: ask of `merge(model, requantize=True)`, whose quantised weights keep their own
            way of storing, whatever `dtype` is.

    Raises:
        AdapterError: an adapter's name is unknown. ConfigError: `dtype` is none of float16,
        bfloat16, float32 and float64. UnsupportedModelError: as for `merge`.

    Example:
        >>> import torch, lorafx
        >>> model = lorafx.inject(torch.nn.Sequential(torch.nn.Linear(8, 8)), rank=1)
        >>> lorafx.merge_error(model)  # B is 0 before training
        {'0': 0.0}
        >>> _ = torch.nn.init.constant_(model[0].lora.default.B, 1e-6)
        >>> error = lorafx.merge_error(model, dtype=torch.bfloat16)["0"]
        >>> 0.9 < error < 1.01  # too small an addend for bfloat16
        True
    """
    assert not isinstance(model, ExportedProgram)  # takes_exported saw to that
    if dtype is not None and dtype not in FLOATS:
        raise ConfigError("dtype must be float16, bfloat16, float32, float64 or None, not "
                          f"{short_repr(dtype)}.")
    twin, to_fold = _prepared(model, adapters, untie=True)
    return losses(twin, to_fold, dtype, requantize)


@of_one_moment
def _prepared(
    model: nn.Module, adapters: str | Iterable[str] | Mapping[str, float] | None, untie: bool
) -> tuple[nn.Module, ToFold]:
    """The original with what these adapters trained whole, and what is to be added to it."""
    check_each_in_its_place(model)
    here = used_here(model, "A merge") if adapters is None else adapters
    chosen = weights_of(model, here)
    check_graphs_not_dispatched(model)
    check_forwards_can_be_copied(model)
    check_can_be_copied(model)
    for adapter in chosen:
        check_in_place(model, adapter)
    held: dict[str, Branch] = {}
    for site, branch in branches(model).items():
        if any(factors_at(branch, adapter) for adapter in chosen):
            held[site] = branch
    owners = _owners(model, held)
    if not untie:
        _check_untied(owners)
    twin = _ejected(model)
    _place_trained(model, twin, chosen)
    to_fold: ToFold = defaultdict(dict)
    for site, (names, _) in owners.items():
        to_fold[tuple(names)][site] = held[site].addends(None, chosen, stored=True)
    return twin, to_fold


def _fold_all(twin: Any, to_fold: ToFold, requantize: bool) -> Any:
    """Fold into each weight, which goes by these names, what is added to it."""
    places, scratch, unpacking = places_of(twin), Scratch(), Unpacking(twin, requantize)
    for aliases, by_site in to_fold.items():
        found = [places[name] for name in aliases]
        addends = [addend for several in by_site.values() for addend in several]
        if is_quantised(found[0]):
            unpacking.fold(aliases[0], found, addends)
        else:
            fold(found, addends, scratch)
    merged: Any = unpacking.model
    if requantize:
        merged.requantize_error = unpacking.errors
    else:
        declare_plain(merged, [name for aliases in to_fold for name in aliases])
    return merged


def _check_untied(owners: Mapping[str, tuple[list[str], list[str]]]) -> None:
    """Raise if something without the branch has the weight too."""
    for site, (_, others) in owners.items():
        if others:
            raise TiedWeightError(
                f"The weight of '{site}' is tied to '{others[0]}', so that folding an adapter into "
                f"it would change that too. lorafx.merge(model, untie=True) gives '{site}' a "
                "tensor of its own.")


def _place_trained(model: nn.Module, twin: nn.Module, chosen: Iterable[str]) -> None:
    """Put copies of what the adapters train whole in the place of the twin's parameters."""
    clones: dict[Tensor, Tensor] = {}  # a tensor under two names stays one
    for path, _, trained in trained_modules(model):
        owner = submodule(twin, path)
        for adapter in trained.having(chosen):
            for name, (holder, key) in trained.sets()[adapter].holders().items():
                held, (attribute, block) = holder.held(key), split_block(name)
                if held not in clones:
                    value = value_of(holder, key, held.detach())
                    clones[held] = _in_the_place_of(owner, attribute, value, ranges_of(block))
                if not put(owner, attribute, clones[held]):
                    tensors(owner, attribute)[attribute] = clones[held]


def _in_the_place_of(
    owner: nn.Module, name: str, value: Tensor, ranges: Sequence[range]
) -> Tensor:
    """A copy of what was trained, as the base's tensor is: rounded once to its dtype.

    Of what stands for some rows of it, with the others.
    """
    base = tensors(owner, name)[name]
    copied = gathered_beside(base, value).to(base.dtype, copy=True)
    if ranges:
        copied = with_rows(value_of(owner, name, base.detach()), ranges, copied)
    return same_kind(base, copied) if isinstance(base, nn.Parameter) else copied


def _owners(
    model: nn.Module, held: Mapping[str, Branch]
) -> dict[str, tuple[list[str], list[str]]]:
    """{site: (names of its weight that have the branch, names of the same weight that do not)}."""
    places = places_of(model)
    tensors = {name: _tensor_identity(place) for name, place in places.items()}
    same: dict[Any, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        same[tensor].append(name)
    owners: dict[str, tuple[list[str], list[str]]] = {}
    for site, branch in held.items():
        base, block = split_block(site)
        if base not in places:
            raise UnsupportedModelError(f"The adapters at '{site}' cannot be folded: its weight is "
                                        "not there any more.")
        adapted, others = owners[site] = [], []
        for name in same[tensors[base]]:
            module, attribute = places[name]
            beside = module._modules.get(branch_name(attribute, block))
            (adapted if beside is branch else others).append(name)
    return owners


def _tensor_identity(place: Place) -> Any:
    """Return what all names of one tensor have in common, and no other tensor's."""
    parameter = place.module._parameters.get(place.attribute)
    return place if parameter is None else parameter
