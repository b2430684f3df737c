"""Folds adapters into weights, W + s B A, and takes them out again; both give a new model of the original class."""

from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, fx, nn

from ._branch import (FROZEN, RECORD, Branch, Own, branches, chosen_set, factors_at, injection, sets_of, submodule,
                      trained, weights_of)
from ._errors import TiedWeightError, UnsupportedModelError
from ._kernels import delta
from ._program import read, tensors_by_site
from ._region import Region, revert, same_kind, share
from ._rules import Site

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
    for _, owner, held in trained(twin):
        owner._parameters.update(sets_of(held)[FROZEN])
    for module in list(twin.modules()):
        if isinstance(module, Region):
            revert(module)
        elif isinstance(module, fx.GraphModule):
            _erase_branches(module)
    for module in list(twin.modules()):
        for name in [name for name, child in module._modules.items() if isinstance(child, Own)]:
            del module._modules[name]
    del twin.__dict__[RECORD]
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(record.requires_grad.get(name, parameter.requires_grad))
    return twin


def _erase_branches(module: fx.GraphModule) -> None:
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
        TiedWeightError: such a weight exists and `untie` is false, or untying cannot separate its readers.
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
    sites = [site for site in program.sites if site.name in used]
    for site in sites:
        _check_tie(site, untie)
    for name in used - {site.name for site in sites}:
        why = program.left_alone.get(name, "it is not there any more")
        raise UnsupportedModelError(f"The adapters at '{name}' cannot be folded, since the model has changed: {why}.")
    twin = eject(model)
    clones: dict[nn.Parameter, nn.Parameter] = {}
    for path, _, whole in trained(model):
        own = chosen_set(whole, chosen)
        for name, parameter in own.items() if own is not sets_of(whole)[FROZEN] else ():
            base = submodule(twin, path)._parameters[name]
            assert base is not None
            clones.setdefault(parameter, same_kind(base, parameter.detach().clone()))
            submodule(twin, path)._parameters[name] = clones[parameter]
    places = tensors_by_site(twin)
    for site in sites:
        owner, attribute = places[site.name]
        weight = owner._parameters[attribute]
        assert weight is not None
        stored = weight.detach()
        matrix = _folded(stored.mT if site.transposed else stored, held[site.name], chosen)  # (out, in)
        folded = same_kind(weight, (matrix.mT if site.transposed else matrix).contiguous())
        for name in site.names:
            owner, attribute = places[name]
            owner._parameters[attribute] = folded
    return twin


def _folded(weight: Tensor, branch: Branch, chosen: Mapping[str, float]) -> Tensor:
    """W + sum w s B A in W's dtype, rounded once. W (out, in)."""
    factors = [(factors_at(branch, adapter), scale) for adapter, scale in chosen.items()]
    present = [(found, scale) for found, scale in factors if found is not None]
    wide = torch.float32
    for tensor in (weight, *(found.A for found, _ in present)):
        wide = torch.promote_types(wide, tensor.dtype)
    total = weight.to(wide, copy=True)  # (out, in)
    for found, scale in present:
        total += delta(found.A.detach(), found.B.detach(), scale * found.scale, wide)
    return total.to(weight.dtype)


def _check_tie(site: Site, untie: bool) -> None:
    if site.read_by:
        raise TiedWeightError(
            f"The weight of '{site.name}' is also read by {site.read_by[0]}, through the same module: folding an "
            "adapter into it would change that too, and untying cannot help. Exclude it, or stay unmerged.")
    if site.tied_to and not untie:
        raise TiedWeightError(
            f"The weight of '{site.name}' is tied to '{site.tied_to[0]}', so that folding an adapter into it would "
            f"change that too. lorafx.merge(model, untie=True) gives '{site.name}' a tensor of its own.")
