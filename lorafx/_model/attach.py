"""Puts an adapter into a model: makes it, registers its branches, and writes them into the graphs."""

import dataclasses
import functools
import inspect
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from .._adapter.adapter import Adapter, Pair, Stored
from .._adapter.config import LoRAConfig, pattern_matches
from .._adapter.names import branch_name, check_name, dotted, name_matches, near, split_block
from .._errors import AdapterError, ConfigError, NoSiteError, UnsupportedModelError
from .._graph.modules import LorafxModule, submodule
from .._graph.rules import only_metadata, readers_of
from .._graph.scan import weights_kept
from .._graph.sites import Call, Site, select
from .branches import Branch, Factors, Trained, branches, factors_at, new_pair, through_branches
from .copies import keep_attributes, same_kind
from .fit import base_parameters, weight_at
from .lower import joins
from .program import Place, Program, places_of_sites, tensor_at
from .reading import FROZEN_PREFIX, adapted_names
from .record import RECORD, Injection, check_adapter, injection, set_trainable, trained_modules
from .regions import Region, adapt, convert, is_plain_graph, why_not_adapted, why_not_region


def start(model: nn.Module, program: Program, group: bool = True) -> None:
    """Freeze a copy of the user's model and give it a record; no adapter yet."""
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    model.__dict__[RECORD] = Injection(flags, program.skipped, program.breaks, group)
    if is_plain_graph(model):
        keep_attributes(model)


def check_new_name(model: nn.Module, adapter: str) -> None:
    """Raise unless this name can be given to a new adapter of an injected model."""
    check_name(adapter)
    if adapter in injection(model).configs:
        raise AdapterError(f"This model has an adapter {adapter!r} already: choose another name, or lorafx.remove it.")


def create(model: nn.Module, program: Program, name: str, config: LoRAConfig) -> Adapter:
    """A new adapter for the sites and modules that the config names: A drawn, B zero, trained tensors copied."""
    base = base_parameters(model)
    whole = _trained_tensors(base, config)
    theirs = {id(parameter) for parameter in whole.values()}
    places = places_of_sites(model)
    taken = {site for site in program.sites if id(weight_at(places, site)) in theirs}
    open_sites = [site for site in program.sites if site not in taken]
    left_alone = program.left_alone | {site.name: "it is trained whole (trainable)" for site in taken}
    chosen = select(open_sites, config.targets, config.exclude, left_alone)
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        if not any(pattern_matches(pattern, site.name) for site in chosen):
            names = near(pattern, [site.name for site in chosen])
            raise NoSiteError(f"The pattern {pattern!r} matches none of the {len(chosen)} sites chosen: {names}.")
    pairs = {site.name: new_pair(config, site, weight_at(places, site)) for site in chosen}
    return Adapter(name, config, pairs, {key: parameter.detach().clone() for key, parameter in whole.items()})


def _trained_tensors(base: Mapping[str, nn.Parameter], config: LoRAConfig) -> dict[str, nn.Parameter]:
    """{first name: frozen Parameter} of all base modules that the config trains whole."""
    paths = {name.rsplit(".", depth)[0] for name in base for depth in range(1, name.count(".") + 1)}
    wanted: set[int] = set()
    for pattern in config.trainable:
        if not isinstance(pattern, str):
            raise ConfigError(f"trainable takes names and globs of modules, not {pattern!r}.")
        matched = [path for path in paths if name_matches(pattern, path)]
        if not matched:
            names = near(pattern, sorted(paths))
            raise NoSiteError(f"No module with parameters matches trainable={pattern!r}; this model has {names}.")
        wanted |= {id(p) for name, p in base.items() if any(name.startswith(path + ".") for path in matched)}
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, parameter in base.items():
        if id(parameter) in wanted:
            found.setdefault(id(parameter), (name, parameter))
    return dict(found.values())


def attach(model: nn.Module, program: Program, adapter: Adapter) -> None:
    """Put an adapter that fits into a started model, inactive; everything that can fail is checked before a change."""
    sites = [site for name in adapter.pairs for site in (program.site(name),) if site is not None]
    places, record = places_of_sites(model), injection(model)
    _check_room(model, places, sites, adapter)
    edits: dict[str, list[tuple[Call, str, bool]]] = defaultdict(list)
    for site in sites:
        base, block = split_block(site.name)
        owner, attribute = places[base]
        if branch_name(attribute, block) not in owner._modules:
            for call in site.calls:
                name = dotted(call.owner, branch_name(call.attribute, block))
                edits[call.region].append((call, name, call.transposed != site.transposed))
        held = _branch(places, site)
        held._modules[adapter.name] = Factors(*adapter.pairs[site.name], adapter.config).train(held.training)
    for region, calls in edits.items():
        _insert_branches(submodule(model, region), program.graphs[region], calls, record.group)
    _hold_trained(model, adapter)
    if record.group:
        _join_calls(model, program)
    record.configs[adapter.name] = dataclasses.replace(adapter.config, targets=list(adapter.pairs), exclude=[])
    set_trainable(model)


def _check_room(model: nn.Module, places: Mapping[str, Place], sites: list[Site], adapter: Adapter) -> None:
    needed: list[tuple[nn.Module, str, type[LorafxModule], str]] = []
    for name in (name for site in sites for name in site.names):
        base, block = split_block(name)
        owner, attribute = places[base]
        needed.append((owner, branch_name(attribute, block), Branch, name))
        if attribute not in adapted_names(owner):
            needed.append((owner, FROZEN_PREFIX + attribute, Branch, name))
    for name in adapter.trained:
        owner, attribute = submodule(model, name.rpartition(".")[0]), name.rpartition(".")[2]
        cls: Any = type(owner)
        why = "it is a GraphModule" if is_plain_graph(owner) else why_not_adapted(cls)
        if why is not None or any(kept == (owner, attribute) for kept in weights_kept(owner)):
            raise UnsupportedModelError(f"'{name}' cannot be trained whole: "
                                        f"{why or 'its module also holds it in another attribute'}.")
        needed.append((owner, "trained", Trained, name))
    for owner, name, kind, at in needed:
        held = owner._modules.get(name)
        taken = name in owner._modules or inspect.getattr_static(owner, name, None) is not None
        if not isinstance(held, kind) and (taken or name in owner._parameters or name in owner._buffers):
            raise UnsupportedModelError(f"The module of '{at}' has an attribute '{name}' already, a name that lorafx "
                                        "needs for its own: rename it, or exclude this site.")


def _branch(places: Mapping[str, Place], site: Site) -> Branch:
    """The branch at a site, registered under all of its names with the owners of its weight."""
    base, block = split_block(site.name)
    first, attribute = places[base]
    held = first._modules.get(branch_name(attribute, block))
    branch = held if isinstance(held, Branch) else Branch(site.transposed, site.rows).train(first.training)
    in_graph_modules = {call.owner for call in site.calls if call.node.op == "call_module"}
    for name in site.names:
        owner, attribute = places[split_block(name)[0]]
        owner._modules[branch_name(attribute, block)] = branch
        if not (in_graph_modules or is_plain_graph(owner)):
            adapt(owner, attribute)
    return branch


def _join_calls(model: nn.Module, program: Program) -> None:
    """Let modules compute adapted linear calls on one value together, their own and those of modules that they call."""
    for path, graph in program.graphs.items():
        module = submodule(model, path)
        if not is_plain_graph(module) and joins(module, graph):
            if isinstance(module, Region) or why_not_region(module) is None:
                convert(module, graph, True)


def _insert_branches(region: nn.Module, graph: fx.Graph, calls: list[tuple[Call, str, bool]], dotted: bool) -> None:
    """Write y -> branch(x, y) after each linear call, and let everything that used y use the branch's output.

    Each call comes with its branch's name, and with whether it is the reverse of its site's.
    """
    for call, target, reverse in calls:
        after = through_branches(region, call.node)  # those of other blocks of the same weight
        with graph.inserting_after(after):
            node = graph.call_module(target, (call.input, after, *[True] * reverse))
        node.meta = call.node.meta.copy()
        after.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
    _read_frozen(region, graph)
    if isinstance(region, fx.GraphModule):
        region.recompile()
    else:
        convert(region, graph, dotted)
    graph.lint()


def _read_frozen(region: nn.Module, graph: fx.Graph) -> None:
    """Let the linear calls that have a branch beside them, and questions for a shape or dtype, read W itself."""
    for node in graph.find_nodes(op="get_attr"):
        owner, _, attribute = str(node.target).rpartition(".")
        if attribute not in adapted_names(submodule(region, owner)):
            continue
        target, readers = dotted(owner, FROZEN_PREFIX + attribute), [*readers_of(node)]
        frozen_readers = {user for _, user in readers
                          if only_metadata(user) or through_branches(region, user) is not user}
        if len(frozen_readers) == len({user for _, user in readers}):
            node.target = target
            continue
        for path, user in readers if frozen_readers else ():
            if user in frozen_readers:  # it gets a reading, and transposes, of its own
                with graph.inserting_before(user):
                    twin = graph.get_attr(target)
                    for step in path:
                        twin = graph.node_copy(step, functools.partial(_instead, twin))
                user.replace_input_with(path[-1] if path else node, twin)


def _instead(twin: fx.Node, _: fx.Node) -> fx.Node:
    return twin


def _hold_trained(model: nn.Module, adapter: Adapter) -> None:
    base = base_parameters(model)
    new = {id(base[name]): same_kind(base[name], tensor) for name, tensor in adapter.trained.items()}
    for module in [m for m in model.modules() if not isinstance(m, LorafxModule)]:
        own = LorafxModule()
        own._parameters |= {name: new[id(p)] for name, p in module._parameters.items() if id(p) in new}
        if own._parameters:
            module._modules.setdefault("trained", Trained())
            submodule(module, "trained")._modules[adapter.name] = own
            for name in own._parameters:
                adapt(module, name)


def extract(model: nn.Module, adapter: str) -> Adapter:
    """An adapter apart from its model; its tensors share storage with the model's."""
    check_adapter(model, adapter)
    pairs, stored, places = {}, {}, places_of_sites(model)
    for site, branch in branches(model).items():
        factors, place = factors_at(branch, adapter), places.get(split_block(site)[0])
        if factors is not None and place is not None:
            pairs[site] = Pair(factors.A.detach(), factors.B.detach(), factors.scale)
            weight = tensor_at(*place)
            stored[site] = Stored(tuple(weight.shape), branch.transposed, branch.rows[0] if branch.rows else 0)
    lost = [site for site in injection(model).configs[adapter].targets if site not in pairs]
    if lost:
        raise AdapterError(f"Adapter {adapter!r} is no longer at '{lost[0]}', whose module or weight was replaced "
                           "after injection, as by resize_token_embeddings with a head: do that before lorafx.inject.")
    whole = {name: parameter.detach() for name, parameter in trained_whole(model, adapter).items()}
    return Adapter(adapter, injection(model).configs[adapter], pairs, whole, stored)


def trained_whole(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """{first name: Parameter} of all that an adapter trains in the place of the base's."""
    found: dict[nn.Parameter, str] = {}
    for path, _, held in trained_modules(model):
        for name, parameter in held.sets().get(adapter, {}).items():
            found.setdefault(parameter, dotted(path, name))
    return {name: parameter for parameter, name in found.items()}
