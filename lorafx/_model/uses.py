"""Who reads each weight of a model: a pass for each kind of reader, which returns what it found."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import fx, nn

from .._adapter.names import dotted
from .._graph.modules import Place, hooks, submodule
from .._graph.rules import (
    LinearCall, attribute_sources, blocks_of, linear_call, matrix_users, only_metadata,
    weight_sources
)
from .._graph.scan import modules_fetched, products_of, weights_in_attributes
from .._graph.sites import Call
from .branches import after_branches
from .places import Weight, Weights
from .reading import original_name
from .regions import is_plain_graph


Rows = tuple[int, int]  # the first and how many


class LinearUse(NamedTuple):
    """A linear call on the weight at a place; a call site and its kind, if a graph makes it.

    `blocks` are equal blocks of rows that are weights by themselves.
    """

    weight: Weight
    place: Place
    transposed: bool
    blocks: tuple[str, ...] = ()
    call: Call | None = None
    kind: str = ""


@dataclasses.dataclass(frozen=True)
class GraphUses:
    """What graphs do with weights.

    `other` names readers that make no linear call, `splits` the blocks into which the results of a
    linear call are split, and `skipped` the calls of which the weight is not a tensor of a module.
    """

    linear: list[LinearUse] = dataclasses.field(default_factory=list)
    other: list[tuple[Weight, str]] = dataclasses.field(default_factory=list)
    splits: list[tuple[Weight, dict[str, Rows]]] = dataclasses.field(default_factory=list)
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Usage:
    """All that is known of who reads one weight."""

    linear: list[LinearUse] = dataclasses.field(default_factory=list)
    other: str = ""  # the first reader that makes no linear call
    blocks: dict[str, Rows] = dataclasses.field(default_factory=dict)  # that may be sites, if asked
    missed: str | None = None  # why an adapter would miss some of the uses

    @property
    def calls(self) -> list[Call]:
        """The call sites."""
        return [use.call for use in self.linear if use.call is not None]

    @property
    def kind(self) -> str:
        """The kind of the first call site, or of the layer that computes by itself."""
        return next((use.kind for use in self.linear if use.kind), "")

    @property
    def equal_blocks(self) -> tuple[str, ...]:
        """The equal blocks of rows that are weights by themselves to some linear call."""
        return next((use.blocks for use in reversed(self.linear) if use.blocks), ())


def uses_in_graphs(
    graphs: Mapping[str, fx.Graph], modules: Mapping[str, nn.Module], weights: Weights
) -> GraphUses:
    """The uses of weights by the nodes of all graphs."""
    found = GraphUses()
    for path, graph in graphs.items():
        linear_calls: dict[fx.Node, LinearCall] = {}
        for node in graph.nodes:
            call = linear_call(node)
            if call is not None:
                linear_calls[node] = call
        for node in graph.find_nodes(op="get_attr"):
            _add_users(found, path, modules[path], node, linear_calls, weights)
        for node in graph.nodes:
            for source, transposed, blocks in weight_sources(node, linear_calls):
                place = _place_read(modules[path], source)[1]
                weight = weights.of_parameter(place)
                if weight is not None and weight.is_matrix:
                    found.linear.append(LinearUse(weight, place, transposed, blocks))
        for node, call in linear_calls.items():
            given = call.weight.op != "get_attr" and not attribute_sources(call.weight)
            if given and not call.rule.transposed:  # a product of two values is not a linear call
                reason = "its weight is computed in forward or given to it"
                found.skipped[dotted(path, node.name)] = reason
    return found


def _add_users(
    found: GraphUses, path: str, region: nn.Module, node: fx.Node,
    linear_calls: Mapping[fx.Node, LinearCall], weights: Weights,
) -> None:
    """Add what uses the tensor that a `get_attr` node reads."""
    owner, place = _place_read(region, node)
    weight = weights.at(place)
    for _, user in matrix_users(node):
        call = linear_calls.get(user)
        if call is None or call.weight is not node or call.input is node:
            if weight is not None and not only_metadata(user):
                found.other.append((weight, f"{_description(user)} in {path or 'the model'}"))
        elif weight is None:
            reason = f"its weight '{node.target}' is computed by Python"
            found.skipped[dotted(path, user.name)] = reason
        elif len(weight.shape) > 2:
            found.linear.append(LinearUse(weight, place, call.transposed))
        elif user.users:  # else its result is lost, and an adapter there would have no effect
            site = Call(path, owner, place.attribute, user, call.transposed)
            use = LinearUse(weight, place, call.transposed, call=site, kind=call.rule.kind)
            found.linear.append(use)
            blocks = blocks_of(after_branches(region, user), weight.shape[0])
            if blocks:
                found.splits.append((weight, blocks))


def _place_read(region: nn.Module, node: fx.Node) -> tuple[str, Place]:
    """The owner's path below the region, and the place, of what a `get_attr` node reads."""
    owner, _, attribute = str(node.target).rpartition(".")
    module = submodule(region, owner)
    return owner, Place(module, original_name(module, attribute))


def _description(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return f"`{node.target}`"
    return f"`{getattr(node.target, '__name__', node.target)}`"


def splits_of_modules(
    linear: Iterable[LinearUse], graphs: Mapping[str, fx.Graph], modules: Mapping[str, nn.Module],
    paths: Mapping[nn.Module, Sequence[str]],
) -> list[tuple[Weight, dict[str, Rows]]]:
    """The blocks into which graphs split the results of linear modules that they call."""
    weight_of: dict[str, Weight] = {}  # of modules whose forward is one linear call
    for use in linear:
        if use.kind == LAYER:
            weight_of[paths[use.place.module][0]] = use.weight
        elif use.call is not None:
            region = use.call.region
            last = after_branches(modules[region], use.call.node)
            if _only_linear(graphs[region], last):
                weight_of[region] = use.weight
    splits: list[tuple[Weight, dict[str, Rows]]] = []
    for path, graph in graphs.items():
        for node in graph.find_nodes(op="call_module"):
            called = paths.get(submodule(modules[path], str(node.target)))
            weight = weight_of.get(called[0]) if called is not None else None
            if weight is not None:
                splits.append((weight, blocks_of(node, weight.shape[0])))
    return splits


LAYER = "layer"  # the kind of a site of which a layer computes x W^T + b by itself, from a packed W


def uses_by_layers(layers: Iterable[nn.Module], weights: Weights) -> list[LinearUse]:
    """The linear calls of layers that store W packed."""
    found: list[LinearUse] = []
    for layer in layers:
        place = Place(layer, "weight")
        weight = weights.at(place)
        if weight is not None:
            found.append(LinearUse(weight, place, False, kind=LAYER))
    return found


def uses_in_python(module: nn.Module, weights: Weights) -> list[LinearUse]:
    """The linear calls that the Python of a graph break makes itself."""
    found: list[LinearUse] = []
    for place, product in products_of(module):
        weight = weights.at(place)
        is_buffer = place.attribute in place.module._buffers
        if weight is not None and weight.is_matrix and not is_buffer:
            found.append(LinearUse(weight, place, product.transposed, product.blocks))
    return found


def missed_uses(
    modules: Mapping[str, nn.Module], breaks: Mapping[str, str], weights: Weights
) -> list[tuple[Weight, str]]:
    """The weights that modules read where no adapter can be in between, each with the reason."""
    found: list[tuple[Weight, str]] = []
    for path, module in modules.items():
        places = list(weights_in_attributes(module))
        if path in breaks:
            for fetched in modules_fetched(module):
                for owner in fetched.modules():
                    places += [Place(owner, name) for name in owner._parameters]
        reason = (f"the Python of {path or 'the model'} ({type(module).__name__}) fetches its "
                  "weight past its owner")
        for place in places:
            weight = weights.of_parameter(place)
            if weight is not None:
                found.append((weight, reason))
    return found


class Move(NamedTuple):
    """The uses that take the place of the one call site in a region, which needs no graph then."""

    region: str
    weight: Weight
    uses: list[LinearUse]


def moves_into_caller(
    model: nn.Module, usages: Mapping[Weight, Usage], graphs: Mapping[str, fx.Graph],
    paths: Mapping[nn.Module, Sequence[str]],
) -> list[Move]:
    """The linear modules whose calls by a model that is itself a GraphModule are call sites of it.

    Only where nothing else can use the module: it does nothing else, nothing is hooked to it, all
    its names are called in that graph, and its weight is read nowhere else. Any other becomes a
    region, which serves every caller.
    """
    if not is_plain_graph(model):
        return []
    called: dict[nn.Module, list[fx.Node]] = defaultdict(list)
    for node in model.graph.find_nodes(op="call_module"):
        called[submodule(model, str(node.target))].append(node)
    weight_of = {call.region: weight for weight, usage in usages.items() for call in usage.calls}
    moves: list[Move] = []
    for module, nodes in called.items():
        names = {str(node.target) for node in nodes}
        if hooks(module) or names != set(paths.get(module, ())):
            continue
        region = paths[module][0]
        weight = weight_of.get(region)
        if weight is None:
            continue
        usage = usages[weight]
        if _only_linear(graphs[region]) and len(usage.linear) == 1 and not usage.other:
            [old] = usage.linear
            uses: list[LinearUse] = []
            for node in nodes:
                if node.users:
                    call = Call("", str(node.target), old.place.attribute, node, old.transposed)
                    place = Place(module, old.place.attribute)
                    uses.append(old._replace(place=place, call=call))
            moves.append(Move(region, weight, uses))
    return moves


def _only_linear(graph: fx.Graph, last: fx.Node | None = None) -> bool:
    """True if a graph is one linear call, of its only input and its own weight, and nothing more.

    `last` is the last of the branches that follow the call, if there may be some.
    """
    computed = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr")]
    inputs, output = graph.find_nodes(op="placeholder"), computed[-1]
    call = linear_call(computed[0])
    return (call is not None and inputs == [call.input] and call.weight.op == "get_attr"
            and (len(computed) == 2 or last is not None) and output.args == (last or computed[0],))
