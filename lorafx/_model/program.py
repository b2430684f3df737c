"""A model as a program: a graph for each module that can be traced, the sites in them, and what is left alone."""

import copy
import dataclasses
import inspect
import types
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from .._adapter.config import FLOATS
from .._adapter.names import dotted, site_name
from .._graph.modules import LorafxModule, hooks, submodule, tensor_names, users_modules
from .._graph.rules import (
    blocks_of, computed_from, linear_call, only_metadata, readers_of, sources_of
)
from .._graph.scan import fetched, products, weights_kept
from .._graph.sites import Call, Site, blocks_matching, sort_key
from .._graph.trace import Tracing, tracing
from .._graph.watch import Unsound
from .branches import through_branches
from .reading import base_tensor, original_name
from .regions import is_plain_graph, why_not_adapted, why_not_region


@dataclasses.dataclass(frozen=True)
class Program:
    """What `read` found. Paths are dotted names; `skipped` names matrices, `breaks` modules, each with its reason."""

    graphs: dict[str, fx.Graph]
    sites: list[Site]
    skipped: dict[str, str]
    breaks: dict[str, str]

    def site(self, name: str) -> Site | None:
        """The site of this name, which may be a block of rows."""
        found = [site for site in self.sites if name in site.names] or blocks_matching(self.sites, name)
        return next((site for site in found if name in site.names), None)

    @property
    def left_alone(self) -> dict[str, str]:
        """Why a name is not a site, for error messages."""
        tied = {name: f"it makes no linear call and shares its weight with '{site.name}', which can be adapted"
                for site in self.sites for name in site.tied_to}
        return {**self.skipped, **tied, **{name: why for name, why in self.breaks.items() if name not in self.skipped}}


Place = tuple[nn.Module, str]  # a module and the attribute under which it has a tensor


@dataclasses.dataclass
class _WeightUse:
    """One tensor and all that is known of its readers."""

    shape: torch.Size
    dtype: torch.dtype
    places: dict[str, Place] = dataclasses.field(default_factory=dict)  # under each name, in the order of registration
    calls: list[Call] = dataclasses.field(default_factory=list)
    kind: str = ""  # of the first call in a graph
    through: list[Place] = dataclasses.field(default_factory=list)  # where linear calls read it
    transposed: list[bool] = dataclasses.field(default_factory=list)  # of each linear call, in graphs and out of them
    stacked: tuple[str, ...] = ()  # equal blocks of rows that are weights by themselves
    blocks: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)  # blocks that may be, if asked
    other: str = ""  # a reader that makes no linear call, in words
    blocked: str | None = None  # why an adapter would miss some of its uses

    def add_call(self, call: Call, kind: str, owner: nn.Module) -> None:
        """Note a call site."""
        self.calls.append(call)
        self.kind = self.kind or kind
        self.add_use((owner, call.attribute), call.transposed)

    def add_use(self, place: Place, transposed: bool, stacked: tuple[str, ...] = ()) -> None:
        """Note a linear call, in a graph or not."""
        self.through.append(place)
        self.transposed.append(transposed)
        self.stacked = stacked or self.stacked


def read_program(model: nn.Module) -> Program:
    """Trace every module of a model that could make a linear call, and find the sites."""
    reader = _ProgramReader(model)
    with tracing() as trace:
        for path in reader.modules:
            reader.trace(path, trace)
    for path in list(reader.graphs):
        reader.note_graph(path)
    reader.note_blocks()
    for path in reader.modules:
        reader.note_python(path)
    reader.move_into_graph_modules()
    return reader.program()


class _ProgramReader:
    """The state of one `read`: modules under their first names, graphs, and what reads each tensor."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = {path: m for path, m in model.named_modules() if not isinstance(m, LorafxModule)}
        self.paths = {m: path for path, m in self.modules.items()}
        self.graphs: dict[str, fx.Graph] = {}
        self.breaks: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        self.weights: dict[nn.Parameter | Place, _WeightUse] = {}
        self.names: list[str] = []  # of all tensors, as sites, in the order of registration
        self.every_path = [(path, m) for path, m in model.named_modules(remove_duplicate=False) if m in self.paths]
        for path, module in self.every_path:
            for attribute, parameter in module._parameters.items():
                if parameter is not None:
                    self.names.append(site_name(path, attribute))
                    weight = self.weights.setdefault(parameter, _WeightUse(parameter.shape, parameter.dtype))
                    weight.places[self.names[-1]] = module, attribute

    def weight(self, place: Place) -> _WeightUse | None:
        """What is known of the tensor at a place, which may be one that forward computes with; None for no tensor."""
        module, attribute = place
        parameter = module._parameters.get(attribute)
        if parameter is not None:
            return self.weights[parameter]
        if place not in self.weights:
            tensor = tensor_at(module, attribute)
            if not isinstance(tensor, Tensor):
                return None
            names = [site_name(path, attribute) for path, m in self.every_path if m is module]
            self.weights[place] = _WeightUse(tensor.shape, tensor.dtype, {name: place for name in names})
            self.names += names
        return self.weights[place]

    def trace(self, path: str, trace: Tracing) -> None:
        """Give the module at this path a graph or, with the reason, a graph break; nothing if it has no matrix."""
        module = self.modules[path]
        if isinstance(module, fx.GraphModule):
            self.graphs[path] = module.graph
        elif type(module).forward is not nn.Module.forward and any(p.ndim > 1 for p in module.parameters()):
            try:
                graph = trace(module)
                reason = why_not_region(module) if any(map(linear_call, graph.nodes)) else None
            except Unsound as unsound:
                reason = str(unsound)
            if reason is None:
                self.graphs[path] = graph
            else:
                self.breaks[path] = f"{type(module).__name__}: {reason}"

    def note_graph(self, path: str) -> None:
        """Note every reader of a tensor in one graph, and every linear call whose weight is no tensor of a module."""
        graph = self.graphs[path]
        made = {node: call for node in graph.nodes if (call := linear_call(node)) is not None}
        for node in graph.find_nodes(op="get_attr"):
            owner, place = self._place(path, node)
            weight = self.weight(place)
            for _, user in readers_of(node):
                call = made.get(user)
                if call is not None and call.weight is node and call.input is not node:
                    if weight is None:
                        self.skipped[dotted(path, user.name)] = f"its weight '{node.target}' is computed by Python"
                    elif len(weight.shape) > 2:
                        weight.add_use(place, call.transposed)
                    elif user.users:  # else its result is lost, and an adapter there would have no effect
                        weight.add_call(Call(path, owner, place[1], user, call.transposed), call.rule.kind, place[0])
                        weight.blocks |= blocks_of(through_branches(self.modules[path], user), weight.shape[0])
                elif weight is not None and not only_metadata(user):
                    weight.other = weight.other or f"{_described(user)} in {path or 'the model'}"
        for node in graph.nodes:
            for source, transposed, stacked in computed_from(node, made):
                module, attribute = self._place(path, source)[1]
                parameter = module._parameters.get(attribute)
                if parameter is not None and parameter.ndim > 1:
                    self.weights[parameter].add_use((module, attribute), transposed, stacked)
        for node, call in made.items():
            if call.weight.op != "get_attr" and not call.rule.transposed and not sources_of(call.weight):
                self.skipped[dotted(path, node.name)] = "its weight is computed in forward or given to it"

    def note_blocks(self) -> None:
        """Note how graphs split the outputs of linear modules that they call."""
        alone = {call.region: weight for weight in self.weights.values() for call in weight.calls
                 if _only_linear(self.graphs[call.region], through_branches(self.modules[call.region], call.node))}
        for path, graph in self.graphs.items():
            for node in graph.find_nodes(op="call_module"):
                weight = alone.get(self.paths.get(submodule(self.modules[path], str(node.target)), ""))
                if weight is not None:
                    weight.blocks |= blocks_of(node, weight.shape[0])

    def _place(self, path: str, node: fx.Node) -> tuple[str, Place]:
        """(owner's path below the region, (owner, attribute)) of what a get_attr node reads."""
        owner, _, attribute = str(node.target).rpartition(".")
        module = submodule(self.modules[path], owner)
        return owner, (module, original_name(module, attribute))

    def note_python(self, path: str) -> None:
        """Note the weights of linear calls in Python, and those that it fetches where no adapter can be in the way."""
        module = self.modules[path]
        if path in self.breaks:
            for place, product in products(module):
                weight, fixed = self.weight(place), place[1] in place[0]._buffers
                if weight is not None and not fixed and len(weight.shape) > 1:
                    weight.add_use(place, product.transposed, product.blocks)
        missed = {(owner, name) for parent in (fetched(module) if path in self.breaks else ())
                  for owner in parent.modules() for name in owner._parameters}
        for owner, name in {*missed, *weights_kept(module)}:
            parameter = owner._parameters[name]
            if parameter in self.weights:
                self.weights[parameter].blocked = (
                    f"the Python of {path or 'the model'} ({type(module).__name__}) fetches its weight past its owner")

    def move_into_graph_modules(self) -> None:
        """Turn calls of a linear module by a model that is itself a GraphModule into call sites of its graph.

        Only if nothing else can use the module: it does nothing else, nothing is hooked to it, all its names are called
        in that graph, and its weight is read nowhere else. Otherwise it becomes a region, which serves every caller.
        """
        model = self.modules[""]
        called: dict[nn.Module, list[fx.Node]] = defaultdict(list)
        for node in model.graph.find_nodes(op="call_module") if is_plain_graph(model) else ():
            called[submodule(model, str(node.target))].append(node)
        for child, nodes in called.items():
            names = {name for name, m in self.every_path if m is child}
            graph = self.graphs.get(self.paths[child]) if names == {str(node.target) for node in nodes} else None
            if graph is not None and _only_linear(graph) and not hooks(child):
                weight = next(w for w in self.weights.values() for c in w.calls if c.region == self.paths[child])
                if len(weight.through) == 1 and not weight.other:
                    self._move(weight, child, nodes)

    def _move(self, weight: _WeightUse, child: nn.Module, nodes: list[fx.Node]) -> None:
        """Put the calls of a linear module by the model's graph in the place of the one call that the weight has."""
        [old] = weight.calls
        del self.graphs[old.region], weight.calls[:], weight.through[:], weight.transposed[:]
        for node in nodes:
            if node.users:
                weight.add_call(Call("", str(node.target), old.attribute, node, old.transposed), weight.kind, child)

    def program(self) -> Program:
        sites: list[Site] = []
        for key, weight in self.weights.items():
            reason = self._why_not_site(weight)
            if reason is None:
                sites += _sites(weight)
            elif len(weight.shape) > 1 and (weight.through or isinstance(key, nn.Parameter)):
                self.skipped[next(iter(weight.places))] = reason
        for path, module in self.modules.items():
            if isinstance(inspect.getattr_static(type(module), "weight", None), types.FunctionType):
                self.skipped[path] = f"its weight is packed, as quantised layers have it ({type(module).__name__})"
        sites.sort(key=sort_key(self.names))
        return Program(self.graphs, sites, self.skipped, self.breaks)

    def _why_not_site(self, weight: _WeightUse) -> str | None:
        place = next(iter(weight.places.values()))
        if not weight.through:
            owner = self.paths[place[0]]
            if weight.other:
                return f"read by {weight.other}, no linear call"
            if owner in self.breaks:
                return f"no linear call on it was found, and its module is a graph break: {self.breaks[owner]}"
            return "no traced call reads it"
        if any("[" in name for name in weight.places):
            return "its name holds '[', which is how blocks of rows are named"
        if weight.dtype not in FLOATS:
            return f"its weight has dtype {weight.dtype}"
        if len(weight.shape) > 3 or weight.stacked and (len(weight.shape) > 2 or weight.shape[0] % len(weight.stacked)):
            return f"its weight has the shape {tuple(weight.shape)}"
        if any(is_plain_graph(owner) for owner, _ in weight.through) and (weight.other or not weight.calls):
            return f"its weight is also read by {weight.other or 'other than linear calls'} in a GraphModule"
        classes: list[Any] = [type(owner) for owner, _ in weight.through if not is_plain_graph(owner)]
        reasons = map(why_not_adapted, classes)
        return weight.blocked or next((why for why in reasons if why is not None), None)


def tensor_at(module: nn.Module, attribute: str) -> Any:
    """What a module has under this name, computed on a copy if it is parametrized; None for other properties."""
    if parametrize.is_parametrized(module, attribute):
        with torch.no_grad():
            module = copy.deepcopy(module).eval()
            return base_tensor(module, attribute)
    return base_tensor(module, attribute) if attribute in (*module._parameters, *module._buffers, *vars(module)) else None


def places_of_sites(model: nn.Module) -> dict[str, Place]:
    """{name of a site of the whole tensor: (owner, attribute)} for every tensor that could be one, by all its names."""
    return {site_name(path, attribute): (module, attribute) for path, module in users_modules(model).items()
            for attribute in tensor_names(module)}


def _sites(weight: _WeightUse) -> list[Site]:
    """The site of a weight, or one for each of the blocks of its rows that are weights by themselves."""
    linear = [name for name, place in weight.places.items() if place in weight.through]
    transposed = all(weight.transposed)
    *experts, out_features, in_features = weight.shape
    if transposed:
        out_features, in_features = in_features, out_features
    length = out_features // max(len(weight.stacked), 1)
    stacked = {name: (i * length, length) for i, name in enumerate(weight.stacked)}
    site = Site(
        linear[0], in_features, out_features, weight.kind or "weight", tuple(weight.calls), transposed,
        tuple(linear[1:]), tuple(name for name in weight.places if name not in linear),
        experts=experts[0] if experts else None, blocks=stacked or ({} if transposed or experts else weight.blocks))
    return [block for name in stacked if (block := site.block(name)) is not None] or [site]


def _described(node: fx.Node) -> str:
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return f"`{target}`"


def _only_linear(graph: fx.Graph, last: fx.Node | None = None) -> bool:
    """Whether a graph is one linear call, of its only input and its own weight, and nothing more.

    `last` is the last of the branches that follow the call, if there may be some.
    """
    computed = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr")]
    inputs, output = graph.find_nodes(op="placeholder"), computed[-1]
    call = linear_call(computed[0])
    return (call is not None and inputs == [call.input] and call.weight.op == "get_attr"
            and (len(computed) == 2 or last is not None) and output.args == (last or computed[0],))
