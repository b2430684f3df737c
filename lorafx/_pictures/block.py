"""One module of an injected model as items of a picture: its graph, or what a break holds."""

import operator
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import fx, nn

from .._adapter.letters import elided
from .._adapter.names import dotted, split_block
from .._graph.modules import submodule
from .._graph.rules import linear_call, only_metadata
from .._model.branches import Branch, branches_after
from .._model.overview import joined_in
from .._model.regions import Region, users_class
from .._summary import SiteRow
from .modules import Modules
from .svg import Box, Diagram, Item, JoinedBox, Label, Row, SiteGlyph

_SIGNS = {operator.add: "+", operator.sub: "−", operator.mul: "×", operator.truediv: "÷",
          operator.matmul: "@", operator.neg: "−"}
_ADAPTERS = 3  # how many of them a site names
_WIDEST = 76  # letters of a note


def box_of(modules: Modules, path: str) -> Box:
    """Return the box of a module, with all sites in it."""
    kind = modules.kind(path)
    words = modules.kind_in_words(path)
    title = elided(f"{path.rpartition('.')[2] or 'the model'}: {modules.class_name(path)}", _WIDEST)
    notes: list[str] = []
    if kind == "break":
        notes = textwrap.wrap(f"{words}: {modules.why(path)}", _WIDEST)
    elif words:
        notes = [words]
    trained = modules.own_trained(path)
    if trained:
        notes += textwrap.wrap(f"trained: {trained}", _WIDEST)
    if kind == "region":
        return Box(kind, path, title, notes, _graph_contents(modules, path))
    return Box(kind, path, title, notes, [Row(_without_graph(modules, path))])


def _without_graph(modules: Modules, path: str) -> list[Item]:
    """What a module without a graph holds, in the order of registration."""
    items: list[Item] = [_glyph(modules, [name]) for name in modules.own_sites(path)]
    shown: dict[tuple[type, bool], list[str]] = {}
    for child in modules.children(path):
        key = users_class(modules.users[child]), bool(modules.sites_in(child))
        shown.setdefault(key, []).append(child)
    for (_, holds), alike in shown.items():
        of_many = not modules.own_sites(alike[0]) and modules.kind(path) == "module"
        first = alike[:1] if of_many and len(alike) > 1 else alike
        items += [_child(modules, child) for child in first]
        if len(first) < len(alike):
            items.append(Label("more", [f"and {len(alike) - 1} more like it"]))
    return items


def _child(modules: Modules, path: str) -> Item:
    """A module in another: a site, a box, or a name."""
    single = modules.single(path)
    if single:
        return _glyph(modules, single)
    if modules.sites_in(path):
        return box_of(modules, path)
    named, trained = [path.rpartition(".")[2], modules.class_name(path)], modules.trained_in(path)
    return Label("trained", [*named, f"trained: {trained}"]) if trained else Label("frozen", named)


def _glyph(modules: Modules, names: Sequence[str], kind: str = "") -> SiteGlyph:
    """The sites of one weight: itself, or blocks of its rows."""
    rows = [modules.rows[name] for name in names]
    base = split_block(rows[0].name)[0]
    owner = base if base in modules.users else base.rpartition(".")[0]
    size = f"{rows[0].in_features} → {rows[0].out_features}"
    if rows[0].experts is not None:
        size = f"{rows[0].experts} × ({size})"
    weight = [base.rpartition(".")[2] or "the model", kind or modules.class_name(owner), size]
    trained = modules.own_trained(owner)
    if trained and owner == base:
        weight.append(f"trained: {trained}")
    added: list[str] = []
    for row in rows:
        added += _added(row, modules.summary.active)
    return SiteGlyph(rows[0].name, weight, added)


def _added(row: SiteRow, active: Mapping[str, float]) -> list[str]:
    """The lines of what adapters add at a site."""
    lines = [f"LoRA {split_block(row.name)[1]}".rstrip()]
    for number, (adapter, rank) in enumerate(row.ranks.items()):
        if number == _ADAPTERS:
            lines.append(f"and {len(row.ranks) - number} more")
            break
        weight = active.get(adapter)
        how = "not active" if weight is None else f"× {weight * row.scales[adapter]:.3g}"
        lines += [elided(adapter, 20), f"rank {rank}, {how}"]
    return lines


def _graph_contents(modules: Modules, path: str) -> list[Item]:
    """The graph of a module, and below it the sites in it that no call of the graph shows."""
    reading = _Reading(modules, path)
    contents: list[Item] = [reading.diagram()]
    rest = [name for name in modules.sites_in(path) if name not in reading.shown]
    if rest:
        contents.append(Row([_glyph(modules, [name], "read as W + sBA") for name in rest]))
    return contents


class _Reading:
    """A graph as items and lines, one item for each value that is worth one."""

    def __init__(self, modules: Modules, path: str) -> None:
        self.modules, self.path = modules, path
        self.module, self.graph = modules.users[path], modules.program.graphs[path]
        self.items: list[Item | list[str]] = []  # operators are lists of their names until the end
        self.sources: list[list[tuple[int, int]]] = []  # of each item: (item, exit) of its inputs
        self.of_node: dict[fx.Node, tuple[int, int]] = {}
        self.shown: set[str] = set()
        self.joined: dict[nn.Module | None, tuple[Branch, ...]] = {}
        if isinstance(self.module, Region):
            for members in joined_in(self.module):
                group = tuple(member[0] for member in members)
                self.joined |= dict.fromkeys(group, group)
        self._groups: dict[Branch, tuple[int, list[Item]]] = {}
        for node in self.graph.nodes:
            if node not in self.of_node:
                self._read(node)

    def diagram(self) -> Diagram:
        """The items in layers."""
        items: list[Item] = []
        for item in self.items:
            items.append(Label("operator", item) if isinstance(item, list) else item)
        for number, members in self._groups.values():
            if len(members) > 1:
                items[number] = JoinedBox(members)
        lines = []
        for target, sources in enumerate(self.sources):
            for source, port in dict.fromkeys(sources):
                lines.append((source, port, target))
        return Diagram(items, lines)

    def _inputs(self, nodes: Iterable[fx.Node]) -> list[tuple[int, int]]:
        return [self.of_node[node] for node in nodes if node in self.of_node]

    def _add(self, item: Item | list[str], sources: Iterable[tuple[int, int]]) -> tuple[int, int]:
        self.items.append(item)
        self.sources.append(list(sources))
        return len(self.items) - 1, 0

    def _read(self, node: fx.Node) -> None:
        """Give a node its item, or none if it holds no more than a shape or a parameter."""
        sources = self._inputs(node.all_input_nodes)
        if node.op == "placeholder":
            if node.users:
                self.of_node[node] = self._add(Label("input", [str(node.target)]), [])
        elif node.op == "output":
            self._add(Label("output", ["output"]), sources)
        elif node.op == "get_attr" or only_metadata(node):
            return
        elif branches_after(self.module, node):
            self._site(node, branches_after(self.module, node))
        elif node.op == "call_module":
            self._call(node, sources)
        elif node.target is operator.getitem and isinstance(node.args[1], int) and sources:
            self.of_node[node] = sources[0]
        elif sources:
            self._operator(node, sources)

    def _call(self, node: fx.Node, sources: list[tuple[int, int]]) -> None:
        path = dotted(self.path, str(node.target))
        sites = self.modules.single(path)
        if sites:
            child = submodule(self.modules.program.model, path)
            self._put_site(node, _glyph(self.modules, sites), sites, child, sources)
        else:
            self.shown.update(self.modules.sites_in(path))
            self.of_node[node] = self._add(_child(self.modules, path), sources)

    def _site(self, node: fx.Node, following: Sequence[fx.Node]) -> None:
        """A linear call and the branches after it."""
        called = [submodule(self.module, str(after.target)) for after in following]
        names = [self.modules.names[branch] for branch in called if branch in self.modules.names]
        call = linear_call(node)
        kind = "" if call is None else call.rule.kind
        value = call.input if call is not None else node.all_input_nodes[0]
        for after in following:
            self.of_node[after] = -1, 0
        if names:
            self._put_site(node, _glyph(self.modules, names, kind), names, called[0],
                           self._inputs([value]))
            for after in following:
                self.of_node[after] = self.of_node[node]

    def _put_site(
        self, node: fx.Node, glyph: Item, names: Sequence[str], holder: nn.Module,
        sources: list[tuple[int, int]],
    ) -> None:
        """Show a site by itself, or in the box of those that are joined with it."""
        self.shown.update(names)
        found = [child for child in (holder, *holder._modules.values()) if child in self.joined]
        group = self.joined[found[0]] if found else ()
        if group and group[0] in self._groups:
            number, members = self._groups[group[0]]
            members.append(glyph)
            self.of_node[node] = number, len(members) - 1
            return
        self.of_node[node] = self._add(glyph, sources)
        if group:
            self._groups[group[0]] = self.of_node[node][0], [glyph]

    def _operator(self, node: fx.Node, sources: list[tuple[int, int]]) -> None:
        """An operator, below the one before it if that is for it alone."""
        name = _operator_name(node)
        inputs = [other for other in node.all_input_nodes if other in self.of_node]
        if len(inputs) == 1:
            before, others = self.items[sources[0][0]], [*inputs[0].users]
            alone = all(user is node or only_metadata(user) for user in others)
            if isinstance(before, list) and alone and len(before) < 6:
                before.append(name)
                self.of_node[node] = sources[0]
                return
        self.of_node[node] = self._add([name], sources)


def _operator_name(node: fx.Node) -> str:
    target: Any = node.target
    if node.op == "call_method":
        return str(target)
    if target is getattr:
        return f".{node.args[1]}"
    return _SIGNS.get(target) or str(getattr(target, "__name__", target))
