"""Puts an adapter into a model: makes it, registers its branches, has them inserted into graphs."""

import dataclasses
import inspect
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from .._adapter.adapter import Adapter, Pair
from .._adapter.config import LoRAConfig, pattern_matches, trained_dtype
from .._adapter.letters import counted
from .._adapter.names import (
    branch_name, check_name, closest_names, dotted, ranges_of, split_block
)
from .._errors import AdapterError, NoSiteError, UnsupportedModelError
from .._graph.modules import LorafxModule, Place, named_modules, submodule
from .._graph.scan import weights_in_attributes
from .._graph.sites import Site, select
from .away import check_ties_are_seen
from .beside import branch_at, has_branch, put_branches
from .branches import Branch, new_pair, spread
from .choice import check_parts
from .copies import keep_attributes, same_kind
from .factors import Factors
from .flat import check_takes_parameters
from .fsdp import check_beside, managed_modules
from .guard import check_each_in_its_place, check_graphs_not_dispatched
from .known import known_sites
from .lower import joins
from .places import base_parameters
from .program import Program
from .quantised import is_packed
from .readers import warn
from .reading import FROZEN_PREFIX, adapted_names
from .record import RECORD, Injection, injection, is_cut, set_trainable
from .regions import (
    Region, adapt_attribute, is_plain_graph, make_region, pin_calls, why_not_adapted,
    why_not_region
)
from .shards import is_sharded, only_mesh, spread_like
from .trainable import trained_tensors
from .trained import Copies, Trained


def begin_injection(
    program: Program, group: bool = True, recompute: bool = True
) -> Injection:
    """Freeze a copy of the user's model and give it a record, which is returned; no adapter yet."""
    model = program.model
    flags = {name: parameter.requires_grad for name, parameter in base_parameters(model).items()}
    model.requires_grad_(False)
    record = model.__dict__[RECORD] = Injection(
        flags, program.skipped, program.breaks, group, program.fingerprint, recompute,
        known=known_sites(program))
    if is_plain_graph(model):
        keep_attributes(model)
    elif why_not_adapted(model) is None:
        pin_calls(model)
    return record


def check_new_name(model: nn.Module, adapter: str) -> None:
    """Raise unless this name can be given to a new adapter of an injected model."""
    check_name(adapter)
    if adapter in injection(model).configs:
        raise AdapterError(f"This model has an adapter {adapter!r} already: choose another name, "
                           "or lorafx.remove it.")
    check_takes_parameters(model)


def new_adapter(program: Program, name: str, config: LoRAConfig) -> Adapter:
    """A new adapter for the sites and modules that the config names.

    A is drawn, B is zero, and tensors to be trained whole are copied.
    """
    trained = trained_tensors(program.base_tensors, config.trainable)
    trained_ids = {id(tensor) for path, tensor in trained.items() if not split_block(path)[1]}
    reasons = program.left_alone
    free: list[Site] = []
    for site in program.sites:
        if id(program.weight(site)) in trained_ids:
            reasons[site.name] = "it is trained whole (trainable)"
        else:
            free.append(site)
    chosen = select(free, config.targets, config.exclude, reasons)
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        if not any(pattern_matches(pattern, site.name) for site in chosen):
            names = closest_names(pattern, [site.name for site in chosen])
            raise NoSiteError(f"The pattern {pattern!r} matches none of the {len(chosen)} sites "
                              f"chosen: {names}.")
    pairs: dict[str, Pair] = {}
    for site in chosen:
        device = program.home(site, has_values=False)
        pairs[site.name] = new_pair(config, site, program.weight(site), device)
    copies: dict[str, Tensor] = {}
    buffers = frozenset(
        path for path, tensor in trained.items() if not isinstance(tensor, nn.Parameter))
    for path, tensor in trained.items():
        dtype = tensor.dtype if path in buffers else trained_dtype(config, tensor)
        copies[path] = program.base_value(path).to(dtype, copy=True)
    return Adapter(name, config, pairs, copies, buffers=buffers)


def attach(program: Program, adapter: Adapter) -> None:
    """Put an adapter that fits into a started model, inactive.

    Everything that can fail is checked before a change.
    """
    model, record = program.model, injection(program.model)
    check_parts(model, record.choice)
    check_each_in_its_place(model)
    check_graphs_not_dispatched(model)
    check_ties_are_seen(program, adapter)
    sites: list[Site] = []
    for name in adapter.pairs:
        site = program.site(name)
        if site is not None:
            sites.append(site)
        elif not is_cut(model):
            raise AdapterError(
                f"Adapter {adapter.name!r} has a pair for '{name}', which is no site of this model "
                "now, as where a forward was changed after lorafx.inject: change it before that.")
    _check_names_are_free(program, sites, adapter.trained)
    managed = managed_modules(model)
    _check_fsdp(program, sites, adapter, managed)
    if record.choice.compiled:
        _warn_of_compiling(program, sites, adapter)
    mesh = only_mesh(program.base_parameters.values())
    any_new = put_branches(program, sites, adapter.config)
    for site in sites:
        branch = branch_at(program, site)
        factors = Factors(*adapter.pairs[site.name], adapter.config).train(branch.training)
        factors.came_first = program.weight(site).is_meta and not factors.on_meta
        branch._modules = {**branch._modules, adapter.name: factors}  # others may read the old
        if program.owner(site) in managed:
            factors.spread_apart(program.weight(site).device_mesh)  # type: ignore[attr-defined]
        else:
            spread(branch, program.weight(site))
            if mesh is not None:
                factors.agree(mesh)
    _register_trained(program, adapter)
    if any_new and record.group:
        _join_calls(program)
    record.configs[adapter.name] = dataclasses.replace(
        adapter.config, targets=list(adapter.pairs), exclude=[])
    set_trainable(model)


def make_room(program: Program, sites: Sequence[Site], config: LoRAConfig) -> None:
    """Put branches where later adapters may be, like those that a config makes."""
    record = injection(program.model)
    _check_names_are_free(program, sites, ())
    if put_branches(program, sites, config) and record.group:
        _join_calls(program)
    record.choice.trains = True


def _warn_of_compiling(program: Program, sites: Sequence[Site], adapter: Adapter) -> None:
    """Warn where an adapter comes to places that compiled programs do not ask for adapters."""
    new = [site.name for site in sites if not has_branch(program, site)]
    for name in adapter.trained:
        path, _, attribute = split_block(name)[0].rpartition(".")
        owner = submodule(program.model, path)
        if "trained" not in owner._modules or attribute not in adapted_names(owner):
            new.append(name)
    if new:
        warn(
            "This model was compiled, and will be again at its next call: an adapter comes to "
            f"{counted(len(new), 'place')} where none could be, such as '{new[0]}': to make room "
            "for later adapters, name their sites in lorafx.inject(..., capacity=...).")


class _Needed(NamedTuple):
    """A name that a module must have free, or have for a child of this kind; a site, for errors."""

    module: nn.Module
    name: str
    kind: type[LorafxModule]
    site: str


def _check_names_are_free(
    program: Program, sites: Sequence[Site], trained: Iterable[str]
) -> None:
    """Raise unless modules have no attributes of their own where lorafx needs to put its own."""
    needed: list[_Needed] = []
    for site in sites:
        for name in site.names:
            base, block = split_block(name)
            owner, attribute = program.places[base]
            needed.append(_Needed(owner, branch_name(attribute, block), Branch, name))
            if attribute not in adapted_names(owner):
                needed.append(_Needed(owner, FROZEN_PREFIX + attribute, Branch, name))
    for name in trained:
        path, _, attribute = split_block(name)[0].rpartition(".")
        owner = submodule(program.model, path)
        why = "it is a GraphModule" if is_plain_graph(owner) else why_not_adapted(owner)
        if why is None and Place(owner, attribute) in weights_in_attributes(owner):
            why = "its module also holds it in another attribute"
        if split_block(name)[1] and is_sharded(program.base_tensors[split_block(name)[0]]):
            why = "its weight is spread over processes, and rows are trained where all of it is"
        if is_packed(owner):
            why = "its layer stores its weight packed, as quantised layers do"
        if why is not None:
            raise UnsupportedModelError(f"'{name}' cannot be trained: {why}.")
        needed.append(_Needed(owner, "trained", Trained, name))
    for module, name, kind, at in needed:
        if isinstance(module._modules.get(name), kind):
            continue
        registered = (*module._modules, *module._parameters, *module._buffers)
        if name in registered or inspect.getattr_static(module, name, None) is not None:
            raise UnsupportedModelError(f"The module of '{at}' has an attribute '{name}' already, "
                                        "a name that lorafx needs for its own: rename it, or "
                                        "exclude this site.")


def _check_fsdp(
    program: Program, sites: list[Site], adapter: Adapter, managed: set[nn.Module]
) -> None:
    """Raise where what an adapter adds to a model that FSDP2 shards would not be reduced."""
    for site in sites:
        if program.places[split_block(site.name)[0]].module in managed:
            check_beside(program.weight(site), site.name, adapter.name)
    for name in adapter.trained:
        if submodule(program.model, name.rpartition(".")[0]) in managed:
            if name not in adapter.buffers:
                check_beside(program.base_parameters[split_block(name)[0]], name, adapter.name)


def _join_calls(program: Program) -> None:
    """Let modules compute adapted linear calls on one value together.

    The calls are their own and those of modules that they call.
    """
    for path, graph in program.graphs.items():
        module = submodule(program.model, path)
        if not is_plain_graph(module) and joins(module, graph):
            if isinstance(module, Region) or why_not_region(module) is None:
                make_region(module, graph, True)


def _register_trained(program: Program, adapter: Adapter) -> None:
    """Put copies of what an adapter trains whole beside every module that has such a tensor.

    What several have is held at the first.
    """
    names = injection(program.model).trained[adapter.name] = []
    if not adapter.trained:
        return
    copies: dict[Tensor, dict[str, Tensor]] = defaultdict(dict)  # by the rows that they are
    for name, tensor in adapter.trained.items():
        whole, block = split_block(name)
        original = program.base_tensors[whole]
        copies[original][block] = _copy_for(original, tensor, bool(block))
    holders: dict[Tensor, tuple[Copies, str]] = {}
    for path, module in list(named_modules(program.model)):
        if isinstance(module, LorafxModule):
            continue
        own = Copies()
        for name, base in (*module._parameters.items(), *module._buffers.items()):
            if base is None or base not in copies:
                continue
            for block, copy in copies[base].items():
                if copy in holders:
                    own.elsewhere[name + block] = holders[copy]
                    continue
                holders[copy] = own, name + block
                is_parameter = name in module._parameters
                held: dict[str, Any] = own._parameters if is_parameter else own._buffers
                held[name + block] = copy
                if block:
                    own.rows[name + block] = ranges_of(block)
                own.missing = own.missing or own.on_meta
                own.came_first = base.is_meta and not own.on_meta
        if own.holders():
            module._modules.setdefault("trained", Trained(injection(program.model).choice))
            submodule(module, "trained")._modules[adapter.name] = own
            for name in own.holders():
                adapt_attribute(module, split_block(name)[0])
                names.append(dotted(path, name))


def _copy_for(base: Tensor, tensor: Tensor, is_rows: bool) -> Tensor:
    """What stands in the place of a base's tensor: a Parameter in that of one."""
    copy = tensor if is_rows else spread_like(base, tensor)
    return same_kind(base, copy) if isinstance(base, nn.Parameter) else copy
