"""Folds adapters into weights, W + s B A, and takes them out again; both give a new model of the original class."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from ._adapter import join
from ._branch import Branch, Own, branches, factors_at, submodule, thawed
from ._errors import TiedWeightError, UnsupportedModelError
from ._program import Place, places_of_sites, read
from ._record import RECORD, injection, trained, weights_of
from ._region import Adapted, is_plain_graph, revert, same_kind, share
from ._sites import Site, split_block
from ._weight import Part, whole

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
    twin = share(model)
    for module in list(twin.modules()):
        if is_plain_graph(module):
            _erase_branches(module)
    for module in list(twin.modules()):
        if isinstance(module, Adapted):
            revert(module)
    for module in list(twin.modules()):
        for name in [name for name, child in module._modules.items() if isinstance(child, Own)]:
            del module._modules[name]
    del twin.__dict__[RECORD]
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(record.requires_grad.get(name, parameter.requires_grad))
    return twin


def _erase_branches(module: fx.GraphModule) -> None:
    for node in module.graph.find_nodes(op="get_attr"):
        owner, _, attribute = str(node.target).rpartition(".")
        node.target = join(owner, thawed(submodule(module, owner), attribute))
    for node in module.graph.find_nodes(op="call_module"):
        if isinstance(submodule(module, node.target), Branch):
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
    held, program = branches(model), read(model)
    used = {name for name, branch in held.items() if any(factors_at(branch, adapter) for adapter in chosen)}
    sites = {name: program.site(name) for name in used}
    for name, site in sites.items():
        if site is None:
            why = program.left_alone.get(split_block(name)[0], "it is not there any more")
            raise UnsupportedModelError(f"The adapters at '{name}' cannot be folded, since the model changed: {why}.")
        _check_tie(site, untie)
    twin = eject(model)
    clones: dict[nn.Parameter, nn.Parameter] = {}
    for path, _, whole_set in trained(model):
        for name, parameter in whole_set.sets().get(whole_set.choose(chosen) or "", {}).items():
            base = submodule(twin, path)._parameters[name]
            assert base is not None
            clones.setdefault(parameter, same_kind(base, parameter.detach().clone()))
            submodule(twin, path)._parameters[name] = clones[parameter]
    places = places_of_sites(twin)
    by_weight: dict[tuple[str, ...], list[Part]] = defaultdict(list)
    for name, site in sites.items():
        assert site is not None
        by_weight[tuple(split_block(alias)[0] for alias in site.names)] += held[name].parts(chosen)
    for names, parts in by_weight.items():
        _fold([places[name] for name in names], parts)
    return twin


def _fold(places: list[Place], parts: list[Part]) -> None:
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
    total = whole(weight.detach(), [part.detached for part in parts])
    folded = same_kind(weight, total) if isinstance(weight, nn.Parameter) else total
    for owner, attribute in places:
        table: dict[str, Any] = owner._parameters if attribute in owner._parameters else owner._buffers
        table[attribute] = folded


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


def _check_tie(site: Site, untie: bool) -> None:
    if site.tied_to and not untie:
        raise TiedWeightError(
            f"The weight of '{site.name}' is tied to '{site.tied_to[0]}', so that folding an adapter into it would "
            f"change that too. lorafx.merge(model, untie=True) gives '{site.name}' a tensor of its own.")
