"""A model as a program: a graph for each module that can be traced, the sites, what is left alone.

`read_program` runs the passes of `uses`, each of which returns what it found, and folds that into a
`Program`.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from .._adapter.names import ranges_of, split_block
from .._graph.dispatched import value_of
from .._graph.modules import Place, paths_of, submodule, users_modules
from .._graph.rules import linear_call
from .._graph.sites import SELECTORS, Site, Targets, as_list, blocks_matching, sort_key
from .._graph.trace import tracing
from .._graph.watch import Unsound
from .._kernels.weights import rows_at
from .fsdp import settle
from .homes import home
from .places import Weight, Weights, base_buffers, base_parameters, places_of, tensor_at
from .quantised import is_packed, why_not_linear
from .readers import warn
from .refusals import is_unsupported_torch_layer, unsupported_layer, why_not_site, why_packed
from .regions import why_not_region
from .uses import (
    GraphUses, LinearUse, Usage, missed_uses, moves_into_caller, splits_of_modules, uses_by_layers,
    uses_in_graphs, uses_in_python
)
from .zero import check_gathered


@dataclasses.dataclass(frozen=True)
class Program:
    """What `read_program` found in a model, in which paths are dotted names.

    `skipped` says of matrices why they are not sites, and `breaks` of modules why they stay Python.
    """

    model: nn.Module
    graphs: Mapping[str, fx.Graph]
    sites: list[Site]
    skipped: dict[str, str]
    breaks: dict[str, str]

    def site(self, name: str) -> Site | None:
        """The site of this name, which may be a block of rows."""
        if name in self._by_name:
            return self._by_name[name]
        blocks = blocks_matching(self.sites, name)
        return next((site for site in blocks if name in site.names), None)

    @functools.cached_property
    def _by_name(self) -> dict[str, Site]:
        found: dict[str, Site] = {}
        for site in self.sites:
            for name in site.names:
                found.setdefault(name, site)
        return found

    @functools.cached_property
    def modules(self) -> dict[str, nn.Module]:
        """{path: module}, the user's, by all names."""
        return users_modules(self.model)

    @functools.cached_property
    def places(self) -> dict[str, Place]:
        """{site of a whole tensor: Place}, by all names."""
        return places_of(self.model)

    @functools.cached_property
    def base_parameters(self) -> dict[str, nn.Parameter]:
        """{name: Parameter} of the base, under every name."""
        return base_parameters(self.model)

    @functools.cached_property
    def base_tensors(self) -> dict[str, Tensor]:
        """{name: tensor} of the base, its parameters and persistent buffers, under every name."""
        return self.base_parameters | base_buffers(self.model)

    def owner(self, site: Site) -> nn.Module:
        """The module that has a site's weight, under its first name."""
        return self.places[split_block(site.name)[0]].module

    def weight(self, site: Site) -> Tensor:
        """The base's tensor of which a site is all or some rows."""
        name = split_block(site.name)[0]
        if name not in self._weights:
            self._weights[name] = tensor_at(self.places[name])
        return self._weights[name]

    @functools.cached_property
    def _weights(self) -> dict[str, Tensor]:
        return {}

    def home(self, site: Site, has_values: bool) -> torch.device:
        """The device for a new pair at a site, which may have values already."""
        return home(self.owner(site), self.weight(site), has_values)

    def base_value(self, name: str) -> Tensor:
        """A Parameter or buffer of the base, or rows of it, as it is while it is used."""
        whole, block = split_block(name)
        path, _, attribute = whole.rpartition(".")
        tensor = self.base_tensors[whole].detach()
        value = value_of(submodule(self.model, path), attribute, tensor)
        return rows_at(value, ranges_of(block)) if block else value

    @property
    def left_alone(self) -> dict[str, str]:
        """{name: why it is not a site} of tensors and modules, for error messages."""
        reasons = dict(self.skipped)
        sites: set[str] = set()
        for site in self.sites:
            sites.update(site.names)
            for name in site.tied_to:
                reasons[name] = ("it makes no linear call and shares its weight with "
                                 f"'{site.name}', which can be adapted")
        for path, module in self.modules.items():
            layer = unsupported_layer(module)
            if layer is not None and path not in sites:
                reasons.setdefault(path, layer)
        for path, reason in self.breaks.items():
            if path not in self.skipped:
                reasons[path] = reason
        return reasons

    @property
    def linear_layers_left_alone(self) -> dict[str, str]:
        """{path: why} of the layers that declare in and out features and are no site."""
        sites: set[str] = set()
        for site in self.sites:
            sites.update(split_block(name)[0] for name in site.names)
        reasons, found = self.left_alone, dict[str, str]()
        for module, paths in paths_of(self.modules).items():
            declared = {"in_features", "out_features"} <= vars(module).keys()
            if declared and sites.isdisjoint(paths):
                found[paths[0]] = reasons.get(paths[0], "no linear call of it was found")
        return found

    @property
    def fingerprint(self) -> str:
        """A short hash of the names and shapes of all sites."""
        lines = [f"{site.name} {site.out_features} {site.in_features}" for site in self.sites]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def read_program(model: nn.Module) -> Program:
    """Trace every module of a model that could make a linear call, and find the sites."""
    check_gathered(model)
    settle(model)
    every_name = users_modules(model)
    paths = paths_of(every_name)
    modules = {names[0]: module for module, names in paths.items()}
    weights = Weights(every_name)
    layers = {path: why_not_linear(module) for path, module in modules.items() if is_packed(module)}
    graphs, breaks = _trace({path: m for path, m in modules.items() if path not in layers})
    in_graphs = uses_in_graphs(graphs, modules, weights)
    sound = [modules[path] for path, reason in layers.items() if reason is None]
    by_layers = uses_by_layers(sound, weights)
    calls = [*in_graphs.linear, *by_layers]
    splits = [*in_graphs.splits, *splits_of_modules(calls, graphs, modules, paths)]
    in_python: list[LinearUse] = []
    for path in breaks:
        in_python += uses_in_python(modules[path], weights)
    missed = missed_uses(modules, breaks, weights)
    usages = _fold(weights, in_graphs, splits, [*by_layers, *in_python], missed)
    for region, weight, uses in moves_into_caller(model, usages, graphs, paths):
        del graphs[region]
        usages[weight].linear = uses
    sites: list[Site] = []
    skipped = dict(in_graphs.skipped)
    for weight, usage in usages.items():
        reason = why_not_site(weight, usage, breaks, paths)
        if reason is None:
            sites += _sites(weight, usage)
        elif weight.is_matrix and (usage.linear or weight.registered):
            skipped[next(iter(weight.places))] = reason
    for path, module in modules.items():
        packed = layers[path] if path in layers else why_packed(module)
        if packed is not None:
            skipped[path] = packed
    sites.sort(key=sort_key(weights.names))
    return Program(model, graphs, sites, skipped, breaks)


def _trace(modules: Mapping[str, nn.Module]) -> tuple[dict[str, fx.Graph], dict[str, str]]:
    """The graphs of modules that can be regions, and the reasons of those that are graph breaks.

    A module without a matrix below it has neither, nor a layer of torch that makes no linear call
    and cannot be traced.
    """
    graphs: dict[str, fx.Graph] = {}
    breaks: dict[str, str] = {}
    with tracing() as trace:
        for path, module in modules.items():
            if isinstance(module, fx.GraphModule):
                graphs[path] = module.graph
                continue
            declared = type(module).forward is not nn.Module.forward
            if not declared or all(parameter.ndim < 2 for parameter in module.parameters()):
                continue
            try:
                graph = trace(module)
                has_calls = any(map(linear_call, graph.nodes))
                reason = why_not_region(module) if has_calls else None
            except Unsound as unsound:
                reason = str(unsound)
            if reason is None:
                graphs[path] = graph
            elif not is_unsupported_torch_layer(module):
                breaks[path] = f"{type(module).__name__}: {reason}"
    return graphs, breaks


def _fold(
    weights: Weights, in_graphs: GraphUses,
    splits: Sequence[tuple[Weight, Mapping[str, tuple[int, int]]]],
    in_python: Sequence[LinearUse], missed: Sequence[tuple[Weight, str]],
) -> dict[Weight, Usage]:
    """All that the passes found, by weight."""
    usages = {weight: Usage() for weight in weights}
    for use in (*in_graphs.linear, *in_python):
        usages[use.weight].linear.append(use)
    for weight, reader in in_graphs.other:
        usages[weight].other = usages[weight].other or reader
    for weight, blocks in splits:
        usages[weight].blocks |= blocks
    for weight, reason in missed:
        usages[weight].missed = reason
    return usages


def _sites(weight: Weight, usage: Usage) -> list[Site]:
    """The site of a weight, or one for each block of its rows that is a weight by itself."""
    places = {use.place for use in usage.linear}
    linear: list[str] = []
    others: list[str] = []
    for name, place in weight.places.items():
        (linear if place in places else others).append(name)
    transposed = all(use.transposed for use in usage.linear)
    *experts, out_features, in_features = weight.shape
    if transposed:
        out_features, in_features = in_features, out_features
    names = usage.equal_blocks
    length = out_features // max(len(names), 1)
    equal = {name: (number * length, length) for number, name in enumerate(names)}
    site = Site(
        linear[0], in_features, out_features, usage.kind or "weight", tuple(usage.calls),
        transposed, tuple(linear[1:]), tuple(others), experts=experts[0] if experts else None,
        blocks=equal or ({} if transposed or experts else usage.blocks))
    blocks = [site.block(name) for name in names]
    return [block for block in blocks if block is not None] or [site]


def warn_of_left_alone(program: Program, targets: Targets) -> None:
    """Warn where all linear layers were asked for, but most of the model's cannot be adapted."""
    patterns = as_list(targets)
    if not any(isinstance(pattern, str) and pattern in SELECTORS for pattern in patterns):
        return
    left = program.linear_layers_left_alone
    if len(left) <= len(program.sites):
        return
    name, reason = next(iter(left.items()))
    warn(
        f"{len(left)} of the {len(left) + len(program.sites)} linear layers of this "
        f"{type(program.model).__name__} are left alone: '{name}', since {reason}. "
        "lorafx.summary(model).skipped has them all.")
