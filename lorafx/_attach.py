"""Puts an adapter into a model: checks that it fits, registers its branches, and writes them into the graphs."""

import dataclasses
import hashlib
import inspect
from collections import defaultdict
from collections.abc import Mapping

from torch import fx, nn

from ._adapter import Adapter, LoRAConfig, Pair, check_name, join, pattern_matches
from ._branch import (FROZEN, RECORD, Branch, Factors, Injection, Own, Trained, branch_name, factor_dtype, injection,
                      new_pair, set_trainable, sets_of, submodule)
from ._errors import AdapterError, ConfigError, MismatchError, NoSiteError, UnsupportedModelError
from ._program import Place, Program, tensors_by_site
from ._region import Region, convert, keep_attributes, same_kind
from ._rules import Call, Site, name_matches, near, select

# What data-parallel and compile wrappers put before every name when a wrapped model is saved.
WRAPPERS = ("module.", "_orig_mod.")


def start(model: nn.Module, program: Program) -> None:
    """Freeze a copy of the user's model and give it a record; no adapter yet."""
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    model.__dict__[RECORD] = Injection(flags, program.skipped, program.breaks)
    if isinstance(model, fx.GraphModule) and not isinstance(model, Region):
        keep_attributes(model)


def check_free(model: nn.Module, adapter: str) -> None:
    """Raise unless this name can be given to a new adapter of an injected model."""
    check_name(adapter)
    if adapter in injection(model).configs:
        raise AdapterError(f"This model has an adapter {adapter!r} already: choose another name, or lorafx.remove it.")


def create(model: nn.Module, program: Program, name: str, config: LoRAConfig) -> Adapter:
    """A new adapter for the sites and modules that the config names: A drawn, B zero, trained tensors copied."""
    base = base_parameters(model)
    whole = _trained_tensors(base, config)
    theirs = {id(parameter) for parameter in whole.values()}
    taken = {site for site in program.sites if id(base[weight_name(site)]) in theirs}
    open_sites = [site for site in program.sites if site not in taken]
    left_alone = program.left_alone | {site.name: "it is trained whole (trainable)" for site in taken}
    chosen = select(open_sites, config.targets, config.exclude, left_alone)
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        if not any(pattern_matches(pattern, site.name) for site in chosen):
            names = near(pattern, [site.name for site in chosen])
            raise NoSiteError(f"The pattern {pattern!r} matches none of the {len(chosen)} sites chosen: {names}.")
    pairs = {site.name: new_pair(config, site, base[weight_name(site)]) for site in chosen}
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


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name: Parameter} of the base under every name, the frozen ones where an adapter's are in their place."""
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        held = module._modules.get("trained")
        frozen = sets_of(held)[FROZEN] if isinstance(held, Trained) else {}
        for name, parameter in module._parameters.items() if not isinstance(module, Own) else ():
            parameter = frozen.get(name, parameter)
            if parameter is not None:
                found[join(path, name)] = parameter
    return found


def fit(model: nn.Module, program: Program, adapter: Adapter, source: str, made_for: str | None) -> Adapter:
    """An adapter from a file, on this model's sites, devices and dtypes; raises MismatchError where it does not fit.

    `made_for` is the fingerprint of the model that it was made for, if known.
    """
    sites = {name: site for site in program.sites for name in site.names}
    frozen = base_parameters(model)
    pairs: dict[str, Pair] = {}
    names = _without_wrappers(list(adapter.pairs), sites)
    for name, pair in zip(names, adapter.pairs.values()):
        if name not in sites:
            why = program.left_alone.get(name)
            found = f"that cannot be adapted: {why}" if why else f"there is no such site; near it: {near(name, sites)}"
            raise MismatchError(f"{source} has an adapter at '{name}', but in this model {found}."
                                + _other_base(program, made_for))
        site = sites[name]
        if (pair.A.shape[1], pair.B.shape[0]) != (site.in_features, site.out_features):
            raise MismatchError(
                f"{source} maps {pair.A.shape[1]} to {pair.B.shape[0]} features at '{name}', but this model "
                f"{site.in_features} to {site.out_features}.{_other_base(program, made_for)}")
        if site.name in pairs:
            raise MismatchError(f"{source} has two adapters for the weight of '{site.name}', which goes by the names "
                                f"{', '.join(site.names)} too.")
        weight = frozen[weight_name(site)]
        to = weight.device, factor_dtype(adapter.config, weight)
        pairs[site.name] = Pair(pair.A.to(*to, copy=True), pair.B.to(*to, copy=True), pair.scale)
    trained = {}
    for name, tensor in adapter.trained.items():
        if name not in frozen or frozen[name].shape != tensor.shape:
            has = f"has it as {tuple(frozen[name].shape)}" if name in frozen else f"has {near(name, frozen)}"
            raise MismatchError(f"{source} has a trained '{name}' {tuple(tensor.shape)}, but this model {has}.")
        trained[name] = tensor.to(frozen[name], copy=True)
    return dataclasses.replace(adapter, pairs=pairs, trained=trained)


def _without_wrappers(names: list[str], sites: Mapping[str, Site]) -> list[str]:
    """The names as they are if they fit, else without the prefixes of a wrapper that all of them carry."""
    stripped = names
    while any(name not in sites for name in stripped):
        prefix = next((p for p in WRAPPERS if all(name.startswith(p) for name in stripped)), None)
        if prefix is None:
            return names
        stripped = [name.removeprefix(prefix) for name in stripped]
    return stripped


def _other_base(program: Program, made_for: str | None) -> str:
    if made_for is None or made_for == fingerprint(program):
        return ""
    return f" It was made for another model: the fingerprint of its sites is {made_for}, not {fingerprint(program)}."


def fingerprint(program: Program) -> str:
    """A short hash of the names and shapes of all of a model's sites."""
    text = "\n".join(f"{site.name} {site.out_features} {site.in_features}" for site in program.sites)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def weight_name(site: Site) -> str:
    """A name in the model of a site's weight."""
    call = site.calls[0]
    return join(join(call.region, call.owner) if call.owner else call.region, call.attribute)


def attach(model: nn.Module, program: Program, adapter: Adapter) -> None:
    """Put an adapter that fits into a started model, inactive; everything that can fail is checked before a change."""
    sites = [site for site in program.sites if site.name in adapter.pairs]
    places = tensors_by_site(model)
    _check_room(model, places, sites, adapter)
    edits: dict[str, list[tuple[Call, bool]]] = defaultdict(list)
    for site in sites:
        owner, attribute = places[site.name]
        if branch_name(attribute) not in owner._modules:
            for call in site.calls:
                edits[call.region].append((call, call.transposed != site.transposed))
        held = _branch(places, site)
        A, B, scale = adapter.pairs[site.name]
        held._modules[adapter.name] = Factors(A, B, scale).train(held.training)
    for region, calls in edits.items():
        _write(submodule(model, region), program.graphs[region], calls)
    _hold_trained(model, adapter)
    record = injection(model)
    record.configs[adapter.name] = dataclasses.replace(adapter.config, targets=list(adapter.pairs), exclude=[])
    set_trainable(model)


def _check_room(model: nn.Module, places: Mapping[str, Place], sites: list[Site], adapter: Adapter) -> None:
    needed: list[tuple[nn.Module, str, type[Own], str]] = [
        (places[name][0], branch_name(places[name][1]), Branch, name) for site in sites for name in site.names]
    needed += [(submodule(model, name.rpartition(".")[0]), "trained", Trained, name) for name in adapter.trained]
    for owner, name, kind, at in needed:
        held = owner._modules.get(name)
        taken = name in owner._modules or inspect.getattr_static(owner, name, None) is not None
        if not isinstance(held, kind) and (taken or name in owner._parameters or name in owner._buffers):
            raise UnsupportedModelError(f"The module of '{at}' has an attribute '{name}' already, a name that lorafx "
                                        "needs for its own: rename it, or exclude this site.")


def _branch(places: Mapping[str, Place], site: Site) -> Branch:
    """The branch at a site, registered under all of its names with the owners of its weight."""
    first, attribute = places[site.name]
    held = first._modules.get(branch_name(attribute))
    branch = held if isinstance(held, Branch) else Branch().train(first.training)
    for owner, name in (places[name] for name in site.names):
        owner._modules[branch_name(name)] = branch
    return branch


def _write(region: nn.Module, graph: fx.Graph, calls: list[tuple[Call, bool]]) -> None:
    """Write y -> branch(x, y) after each linear call, and let everything that used y use the branch's output.

    The bool says whether the call is the reverse of its site's.
    """
    for call, reverse in calls:
        target = join(call.owner, branch_name(call.attribute))
        with graph.inserting_after(call.node):
            node = graph.call_module(target, (call.input, call.node, *[True] * reverse))
        node.meta = call.node.meta.copy()
        call.node.replace_all_uses_with(node)
        node.update_arg(1, call.node)  # which the line above replaced too
    if isinstance(region, fx.GraphModule):
        region.recompile()
    else:
        convert(region, graph)
    graph.lint()


def _hold_trained(model: nn.Module, adapter: Adapter) -> None:
    base = base_parameters(model)
    new = {id(base[name]): same_kind(base[name], tensor) for name, tensor in adapter.trained.items()}
    for module in [m for m in model.modules() if not isinstance(m, Own)]:
        held = module._modules.get("trained")
        whole = held if isinstance(held, Trained) else Trained()
        frozen, own = sets_of(whole)[FROZEN], Own()
        for name, parameter in module._parameters.items():
            parameter = frozen.get(name, parameter)
            if parameter is not None and id(parameter) in new:
                frozen[name] = parameter
                own._parameters[name] = new[id(parameter)]
        if own._parameters:
            module._modules["trained"] = whole
            whole._modules[adapter.name] = own
