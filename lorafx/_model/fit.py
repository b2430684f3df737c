"""Fits an adapter from a file to a model: names, shapes, devices, dtypes, and layouts."""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping

import torch
from torch import Tensor, nn

from .._adapter.adapter import Adapter, Pair
from .._adapter.config import factor_dtype, trained_dtype
from .._adapter.names import (
    closest_names, have_rows_in_common, renaming, split_block, stands_for
)
from .._errors import MismatchError
from .._graph.modules import submodule
from .._graph.sites import Site, blocks_matching
from .homes import home
from .program import Program
from .shards import gathered


def fit(program: Program, adapter: Adapter, source: str, made_for: str | None) -> Adapter:
    """An adapter from a file, on this model's sites, devices and dtypes.

    Raises MismatchError where it does not fit. `made_for` is the fingerprint of the model that it
    was made for, if known.
    """
    base = program.base_tensors
    sites: dict[str, Site] = {}
    for site in program.sites:
        sites.update(dict.fromkeys(site.names, site))
    for name in adapter.pairs:
        for block in blocks_matching(program.sites, name):
            sites[name] = block
    blocks_of: dict[str, list[Site]] = defaultdict(list)  # of a weight, by its name
    for name, site in sites.items():
        if site.rows is not None:
            blocks_of[split_block(name)[0]].append(site)
    wholes = {name: split_block(name)[0] for name in adapter.trained}
    rename = renaming([*adapter.pairs, *wholes.values()], {*sites, *blocks_of, *base})
    pairs: dict[str, Pair] = {}
    for name, pair in _as_stored_here(adapter, rename, sites, blocks_of):
        _check_pair(program, sites, name, pair, source, made_for)
        site = sites[name]
        if site.name in pairs:
            raise MismatchError(f"{source} has two adapters for the weight of '{site.name}', which "
                                f"goes by the names {', '.join(site.names)} too.")
        if adapter.untied and site.aliases:
            other = next(other for other in site.names if other != name)
            raise MismatchError(f"{source} adapts '{name}' alone, but in this model its weight is "
                                f"that of '{other}' too: load it with untie=True.")
        weight = program.weight(site)
        dtype = factor_dtype(adapter.config, weight)
        device = program.home(site, has_values=True)
        copied = functools.partial(torch.Tensor.to, device=device, dtype=dtype, copy=True,
                                   memory_format=torch.contiguous_format)
        pairs[site.name] = Pair(copied(pair.A), copied(pair.B), pair.scale)
    adapted = {id(program.weight(sites[name])): name for name in pairs}
    trained: dict[str, Tensor] = {}
    for name, tensor in adapter.trained.items():
        trained[rename(wholes[name]) + split_block(name)[1]] = tensor
    if len(trained) != len(adapter.trained):
        raise MismatchError(f"{source} has one trained tensor under two names of this model.")
    alone = {rename(wholes[name]) + split_block(name)[1] for name in adapter.alone}
    whole = trained.keys() if adapter.untied else ()
    fitted = _fit_trained(
        base, adapted, trained, alone.union(n for n in whole if not split_block(n)[1]), source)
    buffers: set[str] = set()
    for name, tensor in fitted.items():
        own = base[split_block(name)[0]]
        device = home(submodule(program.model, name.rpartition(".")[0]), own, has_values=True)
        dtype = own.dtype
        if isinstance(own, nn.Parameter):
            dtype = trained_dtype(adapter.config, own)
        else:
            buffers.add(name)
        fitted[name] = tensor.to(device, dtype, copy=True)
    return dataclasses.replace(adapter, pairs=pairs, trained=fitted,
                               buffers=frozenset(buffers))


def _check_pair(
    program: Program, sites: Mapping[str, Site], name: str, pair: Pair, source: str,
    made_for: str | None,
) -> None:
    """Raise unless the model has a site of this name and of the pair's sizes."""
    if name not in sites:
        why = program.left_alone.get(name)
        found = (f"that cannot be adapted: {why}" if why
                 else f"there is no such site; near it: {closest_names(name, sites)}")
        raise MismatchError(f"{source} has an adapter at '{name}', but in this model {found}."
                            + _other_base(program, made_for))
    site = sites[name]
    theirs = _sizes(pair.A.shape[-1], pair.B.shape[-2], *pair.A.shape[:-2])
    ours = _sizes(site.in_features, site.out_features, site.experts)
    if theirs != ours:
        raise MismatchError(f"{source} maps {theirs} at '{name}', but this model {ours}."
                            + _other_base(program, made_for))


def _other_base(program: Program, made_for: str | None) -> str:
    if made_for is None or made_for == program.fingerprint:
        return ""
    return (f" It was made for another model: the fingerprint of its sites is {made_for}, not "
            f"{program.fingerprint}.")


def _sizes(in_features: int, out_features: int, experts: int | None = None) -> str:
    each = "" if experts is None else f" for each of {experts} experts"
    return f"{in_features} to {out_features} features{each}"


def _fit_trained(
    base: Mapping[str, Tensor], adapted: Mapping[int, str], tensors: Mapping[str, Tensor],
    untied: Container[str], source: str,
) -> dict[str, Tensor]:
    """The tensors that an adapter trained whole; `adapted` has the sites of its pairs, by id.

    Those that are `untied` are for nothing that is tied to them.
    """
    fitted: dict[str, Tensor] = {}
    found: dict[int, list[str]] = defaultdict(list)  # the names before, by the tensor's id
    for name, tensor in tensors.items():
        whole, block = split_block(name)
        if whole not in base or not stands_for(tensor.shape, block, base[whole].shape):
            has = (f"has it as {tuple(base[whole].shape)}" if whole in base
                   else f"has {closest_names(whole, base)}")
            raise MismatchError(f"{source} has a trained '{name}' {tuple(tensor.shape)}, but this "
                                f"model {has}.")
        tied = [other for other, parameter in base.items()
                if parameter is base[whole] and other != whole]
        apart = name in untied and not all(
            _is_same(tensors.get(other), tensor) for other in tied)
        if apart and _is_values_of(base[whole], tensor):
            continue  # as PEFT saves all of a module, also what is tied and was not trained
        if apart:
            raise MismatchError(f"{source} has a '{name}' of its own, but in this model that is "
                                f"tied to '{tied[0]}': load it with untie=True.")
        others = [other for other in found[id(base[whole])]
                  if have_rows_in_common(block, split_block(other)[1])]
        if len(others) == 1 and not block and _is_same(fitted.get(others[0]), tensor):
            continue
        if id(base[whole]) in adapted and not block:
            others.append(adapted[id(base[whole])])
        if others:
            raise MismatchError(f"{source} has a trained '{name}', which in this model is the "
                                f"weight of '{others[0]}', that it has too.")
        found[id(base[whole])].append(name)
        fitted[name] = tensor
    return fitted


def _is_same(other: Tensor | None, tensor: Tensor) -> bool:
    """True if a file has one tensor under two names of a tied pair, as PEFT's do."""
    return other is not None and torch.equal(other, tensor)


def _is_values_of(base: Tensor, tensor: Tensor) -> bool:
    """True if a tensor from a file has the values that the base's own has."""
    own = gathered(base.detach())
    return not own.is_meta and torch.equal(own.to(tensor.device, tensor.dtype), tensor)


def _as_stored_here(
    adapter: Adapter, rename: Callable[[str], str], sites: Mapping[str, Site],
    blocks_of: Mapping[str, list[Site]],
) -> Iterator[tuple[str, Pair]]:
    """Each name in this model and its pair, as this model stores the weight.

    A pair of a whole weight becomes one for each block of its rows where these are the sites.
    """
    for old, pair in adapter.pairs.items():
        name, stored = rename(old), adapter.stored.get(old)
        if stored is not None and name in sites and stored.transposed != sites[name].transposed:
            pair = Pair(pair.B.mT, pair.A.mT, pair.scale)  # (B A)^T = A^T B^T
        blocks = [] if name in sites else blocks_of[name]
        if not blocks or sum(block.out_features for block in blocks) != pair.B.shape[-2]:
            yield name, pair
            continue
        for block in blocks:
            start, length = block.rows or (0, 0)
            yield block.name, pair._replace(B=pair.B.narrow(-2, start, length))
