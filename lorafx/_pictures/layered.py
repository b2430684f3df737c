"""Where the nodes of a directed graph without circles stand: in layers, from above to below."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

ACROSS, BETWEEN = 26.0, 34.0  # between the nodes of a layer, and between layers
_SWEEPS = 12


class Edge(NamedTuple):
    """From a node to a later one; the ports say where, from the left of each."""

    source: int
    target: int
    source_port: float
    target_port: float


Point = tuple[float, float]


@dataclass
class Placed:
    """The upper left corner of each node, the way of each edge, and the size of all."""

    corners: list[Point]
    routes: list[list[Point]]
    width: float
    height: float


@dataclass
class _Cell:
    """A node in its layer, or the place where an edge passes through one."""

    layer: int
    width: float
    height: float = 0.0
    x: float = 0.0
    # (the other cell, its port, this one's)
    above: list[tuple["_Cell", float, float]] = field(default_factory=list)
    below: list[tuple["_Cell", float, float]] = field(default_factory=list)


def place(sizes: Sequence[tuple[float, float]], edges: Sequence[Edge]) -> Placed:
    """Return where nodes of these sizes stand; every edge leads from one to a later one."""
    cells = _cells(sizes, edges)
    chains = [_chain(cells, edge) for edge in edges]
    layers: list[list[_Cell]] = [[] for _ in range(max((c.layer for c in cells), default=-1) + 1)]
    for cell in cells:
        layers[cell.layer].append(cell)
    for chain in chains:
        for cell in chain[1:-1]:
            layers[cell.layer].append(cell)
    _order(layers)
    _align(layers)
    tops, height = [], 0.0
    for layer in layers:
        tops.append(height)
        height += max(cell.height for cell in layer) + BETWEEN
    heights = [max(cell.height for cell in layer) for layer in layers]
    everything = [cell for layer in layers for cell in layer]
    left = min((cell.x for cell in everything), default=0.0)
    right = max((cell.x + cell.width for cell in everything), default=0.0)
    for cell in everything:
        cell.x -= left
    corners = []
    for cell in cells:
        corners.append((cell.x, tops[cell.layer] + (heights[cell.layer] - cell.height) / 2))
    routes = []
    for edge, chain in zip(edges, chains):
        (x, y), (to_x, to_y) = corners[edge.source], corners[edge.target]
        route = [(x + edge.source_port, y + cells[edge.source].height)]
        route.append((route[0][0], tops[chain[0].layer] + heights[chain[0].layer]))
        for cell in chain[1:-1]:
            top = tops[cell.layer]
            route += [(cell.x, top), (cell.x, top + heights[cell.layer])]
        route += [(to_x + edge.target_port, tops[chain[-1].layer])]
        routes.append([*route, (to_x + edge.target_port, to_y)])
    return Placed(corners, routes, right - left, max(height - BETWEEN, 0.0))


def _cells(sizes: Sequence[tuple[float, float]], edges: Sequence[Edge]) -> list[_Cell]:
    """A cell for each node, in the layer after the last of those that lead to it."""
    layers = [0] * len(sizes)
    for edge in sorted(edges):
        assert edge.source < edge.target
        layers[edge.target] = max(layers[edge.target], layers[edge.source] + 1)
    return [_Cell(layer, *size) for layer, size in zip(layers, sizes)]


def _chain(cells: Sequence[_Cell], edge: Edge) -> list[_Cell]:
    """The cells through which an edge goes, each made a neighbour of the next."""
    first, last = cells[edge.source], cells[edge.target]
    chain = [first, *(_Cell(layer, 0.0) for layer in range(first.layer + 1, last.layer)), last]
    for here, there in zip(chain, chain[1:]):
        out = edge.source_port if here is first else 0.0
        into = edge.target_port if there is last else 0.0
        here.below.append((there, into, out))
        there.above.append((here, out, into))
    return chain


def _order(layers: Sequence[list[_Cell]]) -> None:
    """Sort each layer by where its neighbours are, from above and from below, by turns."""
    rank: dict[int, float] = {}

    def number(layer: Sequence[_Cell]) -> None:
        for position, cell in enumerate(layer):
            rank[id(cell)] = position / max(len(layer), 1)

    def mean(cell: _Cell, others: Sequence[tuple[_Cell, float, float]]) -> float:
        ports = [rank[id(other)] + port * 1e-6 for other, port, _ in others]
        return sum(ports) / len(ports) if ports else rank[id(cell)]

    for layer in layers:
        number(layer)
    best, fewest = [list(layer) for layer in layers], _crossings(layers)
    for sweep in range(_SWEEPS):
        for layer in (layers if sweep % 2 == 0 else reversed(layers)):
            layer.sort(key=lambda cell: mean(cell, cell.above if sweep % 2 == 0 else cell.below))
            number(layer)
        crossings = _crossings(layers)
        if crossings < fewest:
            best, fewest = [list(layer) for layer in layers], crossings
    for layer, cells in zip(layers, best):
        layer[:] = cells


def _crossings(layers: Sequence[Sequence[_Cell]]) -> int:
    """How many pairs of edges between neighbouring layers cross."""
    count = 0
    for upper, lower in zip(layers, layers[1:]):
        position = {id(cell): number for number, cell in enumerate(lower)}
        ends: list[tuple[int, float]] = []
        for cell in upper:
            below = sorted((port, position[id(other)]) for other, _, port in cell.below)
            ends += [(end, port) for port, end in below]
        for number, (end, _) in enumerate(ends):
            count += sum(other < end for other, _ in ends[number + 1:])
    return count


def _align(layers: Sequence[list[_Cell]]) -> None:
    """Give each cell an x as near as can be to its neighbours', first above it, then on both sides.
    """
    for layer in layers:
        x = 0.0
        for cell in layer:
            cell.x, x = x, x + cell.width + ACROSS
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for layer in (layers if down else reversed(layers)):
            wanted = []
            for cell in layer:
                others = (cell.above if down else cell.below) or [*cell.above, *cell.below]
                aims = [other.x + port - own for other, port, own in others]
                wanted.append(sum(aims) / len(aims) if aims else cell.x)
            for cell, x in zip(layer, apart(wanted, [cell.width for cell in layer])):
                cell.x = x


def apart(wanted: Sequence[float], widths: Sequence[float]) -> list[float]:
    """Return positions next to the wanted ones, in least squares, at which nothing overlaps.

    Positions less the widths before them must not fall: their best fit pools neighbours that do.
    """
    before, offsets = 0.0, []
    for width in widths:
        offsets.append(before)
        before += width + ACROSS
    pools: list[tuple[float, int]] = []  # (mean, how many)
    for aim, offset in zip(wanted, offsets):
        mean, count = aim - offset, 1
        while pools and pools[-1][0] > mean:
            other, more = pools.pop()
            mean, count = (mean * count + other * more) / (count + more), count + more
        pools.append((mean, count))
    means = [mean for mean, count in pools for _ in range(count)]
    return [mean + offset for mean, offset in zip(means, offsets)]
