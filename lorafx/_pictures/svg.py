"""What a picture is made of: labels, sites, boxes around others, and lines between them.

Every item has a width and a height, the ports at which lines come from above and leave below, and
`draw`, which gives its elements for a place.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .._adapter.letters import elided, width
from .elements import LETTER, LINE, PAD, head, path, rectangle, route, text, text_lines
from .layered import Edge, Placed, Point, place

_WIDEST = 44  # places of a line of a label
_GAP = 16.0  # between what stands side by side or one below the other in a box


class Item(Protocol):
    """A part of a picture."""

    width: float
    height: float

    @property
    def entry(self) -> float:
        """Where lines come in at the top, from the left."""
        ...

    @property
    def exits(self) -> Sequence[float]:
        """Where lines leave at the bottom, from the left: one for each value it gives."""
        ...

    @property
    def goes_on(self) -> bool:
        """True if a line that comes in goes on inside, to a head of its own."""
        ...

    def draw(self, x: float, y: float) -> list[str]:
        """The elements, with the upper left corner here."""
        ...


class _Block:
    """An item with lines in and out at its middle."""

    width: float
    height: float
    goes_on = False

    @property
    def entry(self) -> float:
        return self.width / 2

    @property
    def exits(self) -> Sequence[float]:
        return [self.width / 2]


class Label(_Block):
    """Lines of text in a rectangle of a kind: frozen, trained, operator, input, output or more."""

    def __init__(self, kind: str, lines: Sequence[str]) -> None:
        self.kind, self.lines = kind, [elided(line, _WIDEST) for line in lines]
        self.width = max(map(width, self.lines)) * LETTER + 2 * PAD
        self.height = len(lines) * LINE + PAD

    def draw(self, x: float, y: float) -> list[str]:
        """The rectangle and its text; the first line of a module is its name."""
        round_ = self.height / 2 if self.kind in ("input", "output") else 4
        named = self.kind in ("frozen", "trained")
        return [rectangle(self.kind, x, y, self.width, self.height, round_),
                *text_lines(self.lines, x + self.width / 2, y + PAD / 2, named)]


class SiteGlyph(_Block):
    """A site: W and, beside it, what the adapters add; x goes to both, and their sum comes out."""

    _RISE, _FALL, _ACROSS = 18.0, 30.0, 12.0
    goes_on = True

    def __init__(self, name: str, weight: Sequence[str], added: Sequence[str]) -> None:
        self.name = name
        self.left, self.right = Label("frozen", weight), Label("branch", added)
        height = max(self.left.height, self.right.height)
        self.left.height = self.right.height = height
        self.width = self.left.width + self._ACROSS + self.right.width
        self.height = self._RISE + height + self._FALL

    @property
    def entry(self) -> float:
        return self.left.width / 2

    @property
    def exits(self) -> Sequence[float]:
        return [self.left.width / 2]

    def draw(self, x: float, y: float) -> list[str]:
        """Both rectangles, and the plus below W."""
        top, bottom = y + self._RISE, y + self._RISE + self.left.height
        beside = x + self.left.width + self._ACROSS
        middle, aside = x + self.left.width / 2, beside + self.right.width / 2
        plus = bottom + 15
        return [
            f'<g class="site" data-site="{html.escape(self.name)}">',
            f"<title>{html.escape(self.name)}</title>",
            path("line", f"M{middle:.1f} {y:.1f}V{top:.1f}"),
            path("line added", f"M{middle:.1f} {y + 5:.1f}H{aside:.1f}V{top:.1f}"),
            head(middle, top), head(aside, top, "added-head"),
            *self.left.draw(x, top), *self.right.draw(beside, top),
            path("line", f"M{middle:.1f} {bottom:.1f}V{y + self.height:.1f}"),
            path("line added", f"M{aside:.1f} {bottom:.1f}V{plus:.1f}H{middle:.1f}"),
            f'<circle class="plus" cx="{middle:.1f}" cy="{plus:.1f}" r="7"/>',
            path("line added", f"M{middle - 4:.1f} {plus:.1f}h8m-4 -4v8"), "</g>"]


@dataclass
class Row(_Block):
    """Items side by side, in several rows if they are wider than `most`; no line joins them."""

    items: Sequence[Item]
    most: float = 900.0

    def __post_init__(self) -> None:
        self.corners: list[Point] = []
        x = y = row = self.width = 0.0
        for item in self.items:
            if x and x + item.width > self.most:
                x, y, row = 0.0, y + row + _GAP, 0.0
            self.corners.append((x, y))
            self.width = max(self.width, x + item.width)
            x, row = x + item.width + _GAP, max(row, item.height)
        self.height = y + row

    @property
    def exits(self) -> Sequence[float]:
        return [x + item.exits[0] for (x, _), item in zip(self.corners, self.items)]

    def draw(self, x: float, y: float) -> list[str]:
        """All of them."""
        found = []
        for (left, top), item in zip(self.corners, self.items):
            found += item.draw(x + left, y + top)
        return found


class JoinedBox(_Block):
    """Sites that are computed together from one x, in a box."""

    _ABOVE = 34.0
    goes_on = True

    def __init__(self, sites: Sequence[Item]) -> None:
        self.row = Row(sites, most=float("inf"))
        self.width, self.height = self.row.width + 2 * PAD, self.row.height + self._ABOVE + PAD

    @property
    def exits(self) -> Sequence[float]:
        return [PAD + port for port in self.row.exits]

    def draw(self, x: float, y: float) -> list[str]:
        """The box, x fanned out to the sites, and these."""
        found = [rectangle("joined", x, y, self.width, self.height, 8)]
        fan = y + self._ABOVE - 6
        ports = [x + PAD + corner[0] + item.entry
                 for corner, item in zip(self.row.corners, self.row.items)]
        middle = x + self.entry
        found.append(path("line", f"M{middle:.1f} {y:.1f}V{fan:.1f}"))
        for port in ports:
            found.append(path("line", f"M{middle:.1f} {fan:.1f}H{port:.1f}v6"))
        found += self.row.draw(x + PAD, y + self._ABOVE)
        for port in self.exits:
            end = y + self.height
            found.append(path("line", f"M{x + port:.1f} {end - PAD:.1f}V{end:.1f}"))
        return [*found, text("computed together", x + PAD, y + 17, "of-joined")]


class Diagram(_Block):
    """Items and lines between them, (source, number of its exit, target), in layers."""

    def __init__(self, items: Sequence[Item], lines: Sequence[tuple[int, int, int]]) -> None:
        self.items, self.targets = items, [target for _, _, target in lines]
        edges = []
        for source, port, target in lines:
            edges.append(Edge(source, target, items[source].exits[port], items[target].entry))
        sizes = [(item.width, item.height) for item in items]
        self.placed: Placed = place(sizes, edges)
        self.width, self.height = self.placed.width, self.placed.height

    def draw(self, x: float, y: float) -> list[str]:
        """The lines, and the items upon them."""
        found = []
        for points, target in zip(self.placed.routes, self.targets):
            found.append(route(points, x, y))
            if not self.items[target].goes_on:
                found.append(head(x + points[-1][0], y + points[-1][1]))
        for (left, top), item in zip(self.placed.corners, self.items):
            found += item.draw(x + left, y + top)
        return found


class Box(_Block):
    """A module: a title, notes, and what is in it, in a frame of a kind: region, break, module."""

    def __init__(
        self, kind: str, path: str, title: str, notes: Sequence[str], contents: Sequence[Item]
    ) -> None:
        self.kind, self.path, self.title, self.notes = kind, path, title, notes
        self.contents = contents
        inside = max((item.width for item in contents), default=0.0)
        texts = max(map(width, (title, *notes))) * LETTER
        self.width = max(inside, texts) + 2 * _GAP
        self._above = (1 + len(notes)) * LINE + 14
        self.height = self._above + sum(item.height + _GAP for item in contents)

    def draw(self, x: float, y: float) -> list[str]:
        """The frame and all in it, one below the other."""
        found = [f'<g data-path="{html.escape(self.path)}">',
                 rectangle(self.kind, x, y, self.width, self.height, 8),
                 text(self.title, x + _GAP, y + 19, "name")]
        for number, note in enumerate(self.notes, 1):
            found.append(text(note, x + _GAP, y + 19 + number * LINE, "soft"))
        top = y + self._above
        for item in self.contents:
            found += item.draw(x + (self.width - item.width) / 2, top)
            top += item.height + _GAP
        return [*found, "</g>"]
