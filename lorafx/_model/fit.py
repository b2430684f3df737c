"""Fits an adapter from a file to a model: its names, shapes, devices, dtypes, and how each weight is stored."""

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from .._adapter.adapter import Adapter, Pair
from .._adapter.config import factor_dtype
from .._adapter.names import dotted, near, renamed, split_block
from .._errors import MismatchError
from .._graph.modules import users_modules
from .._graph.sites import Site, blocks_matching
from .program import Place, Program, places_of_sites, tensor_at


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name: Parameter} of the base, under every name."""
    return {dotted(path, name): parameter for path, module in users_modules(model).items()
            for name, parameter in module._parameters.items() if parameter is not None}


def fit(model: nn.Module, program: Program, adapter: Adapter, source: str, made_for: str | None) -> Adapter:
    """An adapter from a file, on this model's sites, devices and dtypes; raises MismatchError where it does not fit.

    `made_for` is the fingerprint of the model that it was made for, if known.
    """
    base, places = base_parameters(model), places_of_sites(model)
    sites = {name: site for site in program.sites for name in site.names}
    sites |= {name: block for name in adapter.pairs for block in blocks_matching(program.sites, name)}
    parts: dict[str, list[Site]] = defaultdict(list)  # the sites that are rows of one weight, by the weight's name
    for name, site in sites.items():
        if site.rows is not None:
            parts[split_block(name)[0]].append(site)
    here = renamed([*adapter.pairs, *adapter.trained], {*sites, *parts, *base})
    pairs: dict[str, Pair] = {}
    for name, pair in _in_blocks(adapter, here, sites, parts):
        if name not in sites:
            why = program.left_alone.get(name)
            found = f"that cannot be adapted: {why}" if why else f"there is no such site; near it: {near(name, sites)}"
            raise MismatchError(f"{source} has an adapter at '{name}', but in this model {found}."
                                + _other_base(program, made_for))
        site = sites[name]
        theirs = _sizes(pair.A.shape[-1], pair.B.shape[-2], *pair.A.shape[:-2])
        ours = _sizes(site.in_features, site.out_features, site.experts)
        if theirs != ours:
            raise MismatchError(f"{source} maps {theirs} at '{name}', but this model {ours}."
                                + _other_base(program, made_for))
        if site.name in pairs:
            raise MismatchError(f"{source} has two adapters for the weight of '{site.name}', which goes by the names "
                                f"{', '.join(site.names)} too.")
        if adapter.untied and site.aliases:
            raise MismatchError(f"{source} adapts '{name}' alone, but in this model its weight is that of "
                                f"'{next(other for other in site.names if other != name)}' too: untie them first.")
        weight = weight_at(places, site)
        to = weight.device, factor_dtype(adapter.config, weight)
        A, B = (factor.to(*to, copy=True, memory_format=torch.contiguous_format) for factor in pair[:2])
        pairs[site.name] = Pair(A, B, pair.scale)
    taken = {id(weight_at(places, sites[name])): name for name in pairs}
    whole = {here(name): tensor for name, tensor in adapter.trained.items()}
    if len(whole) != len(adapter.trained):
        raise MismatchError(f"{source} has one trained tensor under two names of this model.")
    return dataclasses.replace(adapter, pairs=pairs, trained=_fit_trained(base, taken, whole, adapter.untied, source))


def _sizes(in_features: int, out_features: int, experts: int | None = None) -> str:
    each = "" if experts is None else f" for each of {experts} experts"
    return f"{in_features} to {out_features} features{each}"


def _fit_trained(
    base: Mapping[str, nn.Parameter], taken: Mapping[int, str], tensors: Mapping[str, Tensor], untied: bool, source: str
) -> dict[str, Tensor]:
    """The tensors that an adapter trained whole; `taken` names what it has for a parameter already, by id."""
    fitted, names = {}, dict(taken)
    for name, tensor in tensors.items():
        if name not in base or base[name].shape != tensor.shape:
            has = f"has it as {tuple(base[name].shape)}" if name in base else f"has {near(name, base)}"
            raise MismatchError(f"{source} has a trained '{name}' {tuple(tensor.shape)}, but this model {has}.")
        tied = [other for other, parameter in base.items() if parameter is base[name] and other != name]
        if untied and tied:
            raise MismatchError(f"{source} has a '{name}' of its own, but in this model that is tied to '{tied[0]}': "
                                "untie them first.")
        other = names.setdefault(id(base[name]), name)
        if other is not name:
            raise MismatchError(f"{source} has a trained '{name}', which in this model is the weight of '{other}', "
                                "that it has too.")
        fitted[name] = tensor.to(base[name], copy=True)
    return fitted


def _in_blocks(
    adapter: Adapter, here: Callable[[str], str], sites: Mapping[str, Site], parts: Mapping[str, list[Site]]
) -> Iterator[tuple[str, Pair]]:
    """Each name in this model and its pair, as this model stores the weight; one for each block of rows of a whole."""
    for old, pair in adapter.pairs.items():
        name, stored = here(old), adapter.stored.get(old)
        if stored is not None and name in sites and stored.transposed != sites[name].transposed:
            pair = Pair(pair.B.mT, pair.A.mT, pair.scale)  # (B A)^T = A^T B^T
        blocks = [] if name in sites else parts[name]
        if not blocks or sum(block.out_features for block in blocks) != pair.B.shape[-2]:
            yield name, pair
            continue
        for block in blocks:
            start, length = block.rows or (0, 0)
            yield block.name, pair._replace(B=pair.B.narrow(-2, start, length))


def _other_base(program: Program, made_for: str | None) -> str:
    if made_for is None or made_for == fingerprint(program):
        return ""
    return f" It was made for another model: the fingerprint of its sites is {made_for}, not {fingerprint(program)}."


def fingerprint(program: Program) -> str:
    """A short hash of the names and shapes of all of a model's sites."""
    text = "\n".join(f"{site.name} {site.out_features} {site.in_features}" for site in program.sites)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def weight_at(places: Mapping[str, Place], site: Site) -> Tensor:
    """The base's tensor of which a site is all or some rows."""
    tensor: Tensor = tensor_at(*places[split_block(site.name)[0]])
    return tensor
