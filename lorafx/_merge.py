"""Folds adapters into weights, W + s B A, and takes them out again; both give a new model of the original class."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from ._adapter.names import branch_name, dotted, split_block
from ._errors import TiedWeightError, UnsupportedModelError
from ._graph.modules import LorafxModule, Place, submodule
from ._kernels.addend import Addend
from ._kernels.scratch import Scratch
from ._kernels.weights import folded
from ._model.branches import Branch, branches, factors_at
from ._model.copies import same_kind, share
from ._model.places import places_of
from ._model.reading import original_name
from ._model.record import RECORD, injection, trained_modules, weights_of
from ._model.regions import is_plain_graph


M = TypeVar("M", bound=nn.Module)


@torch.inference_mode(False)
def eject(model: M) -> M:
    """The original model again, as a new model on the same weights: its class, keys and requires_grad flags.

    Adapters are dropped. Nothing of the injected model changes.

    Raises:
        NotInjectedError: the model was not made by lorafx.

    Example:
        >>> import torch, lorafx
        >>> model = torch.nn.Linear(4, 4)
        >>> type(lorafx.eject(lorafx.inject(model))) is torch.nn.Linear
        True
    """
    record = injection(model)
    twin = share(model, ejecting=True)
    for path, module in model.named_modules():
        if is_plain_graph(module):
            _erase_branches(submodule(twin, path), module)
    for module in list(twin.modules()):
        for name in [name for name, child in module._modules.items() if isinstance(child, LorafxModule)]:
            del module._modules[name]
    del twin.__dict__[RECORD]
    for name, parameter in twin.named_parameters():
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


@torch.inference_mode(False)
def merge(model: M, adapters: str | Iterable[str] | Mapping[str, float] | None = None, *, untie: bool = False) -> M:
    """A new model of the original class with adapters folded in: W + sum w s B A, for deployment.

    The sum is computed in float32, or float64 where W, A or B are, and rounded once to W's dtype. Weights that no
    adapter touches, and buffers of them, share storage with the base.

    Args:
        model: an injected model.
        adapters: what to fold, as for `lorafx.activate`; the active adapters by default.
        untie: give an adapted weight that something else reads (a head tied to an embedding) a tensor of its own.

    Raises:
        TiedWeightError: such a weight exists and `untie` is false.
        AdapterError: an adapter's name is unknown.

    Example:
        >>> import torch, lorafx
        >>> model = lorafx.inject(torch.nn.Linear(4, 4))
        >>> x = torch.randn(2, 4)
        >>> torch.allclose(lorafx.merge(model)(x), model(x))
        True
    """
    chosen = weights_of(model, injection(model).active if adapters is None else adapters)
    held = {name: branch for name, branch in branches(model).items()
            if any(factors_at(branch, adapter) for adapter in chosen)}
    sites = _owners(model, held)
    for name, (_, others) in sites.items():
        if others and not untie:
            raise TiedWeightError(
                f"The weight of '{name}' is tied to '{others[0]}', so that folding an adapter into it would change "
                f"that too. lorafx.merge(model, untie=True) gives '{name}' a tensor of its own.")
    twin = eject(model)
    clones: dict[nn.Parameter, nn.Parameter] = {}
    for path, _, whole_set in trained_modules(model):
        for name, parameter in whole_set.sets().get(whole_set.choose(chosen) or "", {}).items():
            base = submodule(twin, path)._parameters[name]
            assert base is not None
            clones.setdefault(parameter, same_kind(base, parameter.detach().clone()))
            submodule(twin, path)._parameters[name] = clones[parameter]
    places = places_of(twin)
    by_weight: dict[tuple[str, ...], list[Addend]] = defaultdict(list)
    for name, (names, _) in sites.items():
        by_weight[tuple(names)] += held[name].addends(chosen, stored=True)
    scratch = Scratch()
    for aliases, addends in by_weight.items():
        _fold([places[name] for name in aliases], addends, scratch)
    return twin


def _owners(model: nn.Module, held: Mapping[str, Branch]) -> dict[str, tuple[list[str], list[str]]]:
    """{site: (names of its weight where the branch is, names of the same weight where it is not)}."""
    places = places_of(model)
    tensors = {name: _key(place) for name, place in places.items()}
    same: dict[Any, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        same[tensor].append(name)
    found = {}
    for site, branch in held.items():
        base, block = split_block(site)
        if base not in places:
            raise UnsupportedModelError(f"The adapters at '{site}' cannot be folded: its weight is not there any more.")
        beside = {name: places[name].module._modules.get(branch_name(places[name].attribute, block)) is branch
                  for name in same[tensors[base]]}
        found[site] = [n for n, here in beside.items() if here], [n for n, here in beside.items() if not here]
    return found


def _key(place: Place) -> Any:
    """What is the same for all names of one tensor."""
    parameter = place.module._parameters.get(place.attribute)
    return place if parameter is None else parameter


def _fold(places: list[Place], addends: list[Addend], scratch: Scratch) -> None:
    """Put W + sum s B A, in W's dtype and rounded once, in the place of W, under all of its names."""
    for owner, attribute in places:
        if parametrize.is_parametrized(owner, attribute):
            _bake(owner, attribute)
    owner, attribute = places[0]
    weight = owner._parameters.get(attribute, owner._buffers.get(attribute))
    if weight is None:
        raise UnsupportedModelError(
            f"The {attribute} of a {type(owner).__name__} is computed before every call, by a hook such as the old "
            "weight_norm's: remove that from the model (torch.nn.utils.remove_weight_norm) before lorafx.inject.")
    total = folded(weight.detach(), [addend.detached for addend in addends], scratch)
    new = same_kind(weight, total) if isinstance(weight, nn.Parameter) else total
    for owner, attribute in places:
        table: dict[str, Any] = owner._parameters if attribute in owner._parameters else owner._buffers
        table[attribute] = new


def _bake(owner: nn.Module, attribute: str) -> None:
    """Put the weight that a parametrization computes, in eval, in its place, as a Parameter.

    torch's remove_parametrizations would do it to every copy of the module, since copies share the class.
    """
    training = owner.training
    with torch.no_grad():
        weight = getattr(owner.eval(), attribute).clone()
    owner.train(training)
    cls: Any = type(owner)
    rest, computed = dict(vars(cls)), submodule(owner, "parametrizations")._modules
    del rest[attribute], computed[attribute]
    if computed:
        owner.__class__ = type(cls)(cls.__name__, cls.__bases__, rest)
    else:
        del owner._modules["parametrizations"]
        owner.__class__ = cls.__bases__[0]
    owner._parameters[attribute] = nn.Parameter(weight, requires_grad=False)
