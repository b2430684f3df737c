"""The elements of a picture as SVG: rectangles, text, lines and their heads, and how they look.

Text is monospaced, so that its width is known.
"""

import html
from collections.abc import Sequence

from .layered import Point

LETTER, LINE, PAD = 7.3, 16.0, 10.0  # the width of a letter, the height of a line, around text

# Grey and blue, orange for groups: told apart with any kind of colour-blindness, and in grey.
STYLE = """
.lorafx { font: 12px ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace;
  --paper: #ffffff; --ink: #1f2328; --soft: #57606a; --line: #6e7781; --frozen: #e4e6e9;
  --frozen-edge: #868e96; --branch: #cfe6fb; --branch-edge: #0072b2; --joined: #c25400;
  --region: #f7f8f9; }
@media (prefers-color-scheme: dark) { .lorafx { --paper: #15191e; --ink: #e6e9ed; --soft: #a3adb8;
  --line: #8b949e; --frozen: #363c44; --frozen-edge: #7d8590; --branch: #0d3a5c;
  --branch-edge: #56b4e9; --joined: #f0a050; --region: #1d2229; } }
.lorafx .paper { fill: var(--paper); }
.lorafx text { fill: var(--ink); }
.lorafx .soft { fill: var(--soft); }
.lorafx .title { font-size: 15px; font-weight: 600; }
.lorafx .name { font-weight: 600; }
.lorafx .frozen { fill: var(--frozen); stroke: var(--frozen-edge); }
.lorafx .operator { fill: var(--paper); stroke: var(--frozen-edge); }
.lorafx .input, .lorafx .output { fill: var(--paper); stroke: var(--line); }
.lorafx .more { fill: none; stroke: none; }
.lorafx .branch { fill: var(--branch); stroke: var(--branch-edge); stroke-width: 1.6; }
.lorafx .trained { fill: var(--branch); stroke: var(--branch-edge); stroke-width: 3; }
.lorafx .region { fill: var(--region); stroke: var(--frozen-edge); }
.lorafx .module { fill: none; stroke: var(--frozen-edge); stroke-opacity: .5; }
.lorafx .break { fill: none; stroke: var(--soft); stroke-width: 1.6; stroke-dasharray: 7 5; }
.lorafx .joined { fill: none; stroke: var(--joined); stroke-width: 2; }
.lorafx text.of-joined { fill: var(--joined); font-weight: 600; }
.lorafx .line { fill: none; stroke: var(--line); stroke-width: 1.3; }
.lorafx .added { stroke: var(--branch-edge); stroke-width: 1.6; }
.lorafx .head { fill: var(--line); }
.lorafx .added-head { fill: var(--branch-edge); }
.lorafx .plus { fill: var(--paper); stroke: var(--branch-edge); stroke-width: 1.6; }
"""


def rectangle(kind: str, x: float, y: float, width: float, height: float, corner: float) -> str:
    """A rectangle of a kind."""
    return (f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
            f'height="{height:.1f}" rx="{corner:.1f}"/>')


def text(content: str, x: float, y: float, kind: str = "", anchor: str = "start") -> str:
    """A line of text, its base line at y."""
    return (f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
            f"{html.escape(content)}</text>")


def text_lines(lines: Sequence[str], middle: float, top: float, named: bool) -> list[str]:
    """Lines of text around a middle, of which the first may be a name."""
    found = []
    for number, line in enumerate(lines):
        kind = "name" if named and number == 0 else ""
        found.append(text(line, middle, top + number * LINE + 12, kind, "middle"))
    return found


def path(kind: str, data: str) -> str:
    """A line of a kind."""
    return f'<path class="{kind}" d="{data}"/>'


def route(points: Sequence[Point], x: float, y: float) -> str:
    """A line through these points that is upright in each."""
    (first_x, first_y), *rest = points
    data = f"M{x + first_x:.1f} {y + first_y:.1f}"
    before = points[0]
    for to_x, to_y in rest:
        if abs(to_x - before[0]) < 0.05:
            data += f"V{y + to_y:.1f}"
        else:
            middle = y + (before[1] + to_y) / 2
            data += (f"C{x + before[0]:.1f} {middle:.1f} {x + to_x:.1f} {middle:.1f} "
                     f"{x + to_x:.1f} {y + to_y:.1f}")
        before = (to_x, to_y)
    return path("line", data)


def head(x: float, y: float, kind: str = "head") -> str:
    """The head of a line that ends here."""
    return path(kind, f"M{x:.1f} {y:.1f}l-3.5 -7h7z")
