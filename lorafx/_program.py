"""A model as a program: a graph for each module that can be traced, the sites in them, and what is left alone."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator

from torch import fx, nn

from ._adapter import FLOATS, join
from ._branch import Own, hooks, site_name, submodule
from ._region import Region, why_not_region
from ._rules import LOOKUPS, Call, Site, is_transpose, linear_call, only_metadata
from ._scan import weights_kept, weights_used
from ._trace import Tracing, tracing
from ._watch import Unsound


@dataclasses.dataclass(frozen=True)
class Program:
    """What `read` found. Paths are dotted names; `skipped` names matrices, `breaks` modules, each with its reason."""

    graphs: dict[str, fx.Graph]
    sites: list[Site]
    skipped: dict[str, str]
    breaks: dict[str, str]

    @property
    def left_alone(self) -> dict[str, str]:
        """Why a name is not a site, for error messages."""
        tied = {name: f"it makes no linear call and shares its weight with '{site.name}', which can be adapted"
                for site in self.sites for name in site.tied_to}
        return {**self.skipped, **tied, **{name: why for name, why in self.breaks.items() if name not in self.skipped}}


Place = tuple[nn.Module, str]  # a module and the attribute under which it has a Parameter


@dataclasses.dataclass
class _Weight:
    """One Parameter and all that is known of its readers."""

    parameter: nn.Parameter
    places: dict[str, Place] = dataclasses.field(default_factory=dict)  # under each name, in the order of registration
    calls: list[Call] = dataclasses.field(default_factory=list)
    kind: str = ""  # of the first call
    through: list[Place] = dataclasses.field(default_factory=list)  # where linear calls read it
    others: list[tuple[Place, str]] = dataclasses.field(default_factory=list)  # other readers: where, and in words
    blocked: str | None = None  # why a branch would miss some of its uses

    def add_call(self, call: Call, kind: str, owner: nn.Module) -> None:
        """Note a call site."""
        self.calls.append(call)
        self.kind = self.kind or kind
        self.through.append((owner, call.attribute))


def read(model: nn.Module) -> Program:
    """Trace every module of a model that could make a linear call, and find the sites."""
    reader = _Reader(model)
    with tracing() as trace:
        for path in reader.modules:
            reader.trace(path, trace)
    for path in list(reader.graphs):
        reader.note_graph(path)
    for path in reader.modules:
        reader.note_python(path)
    reader.move_into_graph_modules()
    return reader.program()


class _Reader:
    """The state of one `read`: modules under their first names, graphs, and what reads each Parameter."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = {path: m for path, m in model.named_modules() if not isinstance(m, Own)}
        self.paths = {m: path for path, m in self.modules.items()}
        self.graphs: dict[str, fx.Graph] = {}
        self.breaks: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        self.weights: dict[nn.Parameter, _Weight] = {}
        self.names: list[str] = []  # of all Parameters, as sites, in the order of registration
        self.every_path = [(path, m) for path, m in model.named_modules(remove_duplicate=False) if m in self.paths]
        for path, module in self.every_path:
            for attribute, parameter in module._parameters.items():
                if parameter is not None:
                    name = site_name(path, attribute)
                    self.weights.setdefault(parameter, _Weight(parameter)).places[name] = module, attribute
                    self.names.append(name)
        self.matrices = frozenset(attribute for m in self.paths for attribute, p in m._parameters.items()
                                  if p is not None and p.ndim > 1)

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
        """Note every reader of a Parameter in one graph, and every linear call whose weight is not a Parameter."""
        found = set()
        for node in self.graphs[path].find_nodes(op="get_attr"):
            owner, _, attribute = node.target.rpartition(".")
            module = submodule(self.modules[path], owner)
            parameter = module._parameters.get(attribute)
            if parameter is None:
                continue
            weight = self.weights[parameter]
            for user in _users(node):
                call = linear_call(user)
                if call is not None and call.weight is node and call.input is not node:
                    found.add(user)
                    if user.users:  # else its result is lost, and an adapter there would have no effect
                        weight.add_call(Call(path, owner, attribute, user, call.transposed), call.rule.kind, module)
                else:
                    self._note_other(weight, (module, attribute), user, path)
        for node in self.graphs[path].nodes:
            call = linear_call(node) if node not in found else None
            if call is not None and not call.rule.transposed:  # a product of activations is no linear call
                self.skipped[join(path, node.name)] = "its weight is computed in forward or given to it"

    def _note_other(self, weight: _Weight, place: Place, user: fx.Node, path: str) -> None:
        if not only_metadata(user):
            reader = f"{_described(user)} in {path or 'the model'}"
            weight.others.append((place, reader))
            if user.target not in LOOKUPS:
                weight.blocked = f"its weight is also read by {reader}"

    def note_python(self, path: str) -> None:
        """Note the Parameters that Python uses or keeps outside of the graphs: a branch would miss those uses."""
        module = self.modules[path]
        reader = f"the Python of {path or 'the model'} ({type(module).__name__})"
        used = weights_used(module, self.matrices) if path in self.breaks else set()
        for owner, attribute in {*used, *weights_kept(module, self.matrices)}:
            parameter = owner._parameters[attribute]
            if parameter in self.weights:
                self.weights[parameter].others.append(((owner, attribute), reader))
                self.weights[parameter].blocked = f"{reader} may use its weight directly"

    def move_into_graph_modules(self) -> None:
        """Turn calls of a linear module by a caller's own GraphModule into call sites of that graph.

        Only if the module does nothing else, nothing is hooked to it, and all its names are called in that graph:
        otherwise it becomes a region, which serves every caller.
        """
        for path, module in self.modules.items():
            if not isinstance(module, fx.GraphModule) or isinstance(module, Region):
                continue
            called: dict[nn.Module, list[fx.Node]] = defaultdict(list)
            for node in module.graph.find_nodes(op="call_module"):
                called[submodule(module, node.target)].append(node)
            for child, nodes in called.items():
                names = {name for name, m in self.every_path if m is child}
                targets = {join(path, str(node.target)) for node in nodes}
                graph = self.graphs.get(self.paths[child]) if names == targets else None
                if graph is not None and _only_linear(graph) and not hooks(child):
                    self._move(path, child, nodes)

    def _move(self, path: str, child: nn.Module, nodes: list[fx.Node]) -> None:
        region = self.paths[child]
        weight = next(w for w in self.weights.values() for call in w.calls if call.region == region)
        old = next(call for call in weight.calls if call.region == region)
        weight.calls.remove(old)
        del self.graphs[region]
        weight.calls += [Call(path, str(node.target), old.attribute, node, old.transposed)
                         for node in nodes if node.users]

    def program(self) -> Program:
        sites = []
        for weight in self.weights.values():
            reason = self._why_not_site(weight)
            if reason is None:
                sites.append(_site(weight))
            elif weight.parameter.ndim > 1:
                self.skipped[next(iter(weight.places))] = reason
        order = {name: position for position, name in enumerate(self.names)}
        sites.sort(key=lambda site: order[site.name])
        return Program(self.graphs, sites, self.skipped, self.breaks)

    def _why_not_site(self, weight: _Weight) -> str | None:
        if not weight.calls:
            owner = self.paths[next(iter(weight.places.values()))[0]]
            if owner in self.breaks:
                return f"its module is a graph break: {self.breaks[owner]}"
            return f"read by {weight.others[0][1]}, no linear call" if weight.others else "no traced call reads it"
        if weight.parameter.dtype not in FLOATS:
            return f"its weight has dtype {weight.parameter.dtype}"
        if weight.parameter.ndim != 2:
            return f"its weight has {weight.parameter.ndim} dimensions"
        return weight.blocked


def tensors_by_site(model: nn.Module) -> dict[str, Place]:
    """{site name: (owner, attribute)} for every Parameter of the model under each of its names."""
    return {site_name(path, attribute): (module, attribute)
            for path, module in model.named_modules(remove_duplicate=False) if not isinstance(module, Own)
            for attribute, parameter in module._parameters.items() if parameter is not None}


def _site(weight: _Weight) -> Site:
    linear = [name for name, place in weight.places.items() if place in weight.through]
    transposed = all(call.transposed for call in weight.calls)
    out_features, in_features = reversed(weight.parameter.shape) if transposed else weight.parameter.shape
    return Site(
        linear[0], in_features, out_features, weight.kind, tuple(weight.calls), transposed, tuple(linear[1:]),
        tied_to=tuple(name for name in weight.places if name not in linear),
        read_by=tuple(reader for place, reader in weight.others if place in weight.through))


def _users(node: fx.Node) -> Iterator[fx.Node]:
    """What uses a matrix, through any transposes of it."""
    for user in node.users:
        if is_transpose(user):
            yield from _users(user)
        else:
            yield user


def _described(node: fx.Node) -> str:
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return f"`{target}`"


def _only_linear(graph: fx.Graph) -> bool:
    """Whether a graph is one linear call, of its only input and its own weight, and nothing more."""
    computed = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr")]
    inputs = graph.find_nodes(op="placeholder")
    call = linear_call(computed[0])
    return (len(computed) == 2 and call is not None and computed[1].args == (computed[0],)
            and inputs == [call.input] and call.weight.op == "get_attr")
