"""The step benchmark's picture: what every contender adds to the frozen base's step."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.contenders import (
    BASE, KEPT, LORAFX, LORAFX_NARROW, NOISE, PATCHED, PEFT, PEFT_WIDE, SINGLE)

COLORS = {NOISE: "0.8", PEFT: "tab:orange", PEFT_WIDE: "tab:red", PATCHED: "tab:green",
          SINGLE: "lightskyblue", KEPT: "steelblue", LORAFX: "tab:blue", LORAFX_NARROW: "navy"}


def draw(path: Path, cells: Sequence[Mapping[str, Any]]) -> None:
    """Write a picture with a panel for each cell, in per cent of the frozen base's step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(3, len(cells))
    down = -(-len(cells) // across)
    figure = Figure(figsize=(5.2 * across, 2.4 * down + 0.4), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for axis, cell in zip(axes, cells):
        draw_cell(axis, cell)
    for axis in axes[len(cells):]:
        axis.set_axis_off()
    FigureCanvasAgg(figure).print_figure(path, dpi=130)


def draw_cell(axis: Any, cell: Mapping[str, Any]) -> None:
    """A bar with its 95 % interval for each contender but the base; the band is the noise."""
    rows = {}
    for name, row in cell["rows"].items():
        if "step" in row and name != BASE:
            rows[name] = [100 * (value - 1) for value in row["step"]["ratio"]]
    for place, (name, (middle, low, high)) in enumerate(rows.items()):
        axis.barh(place, middle, xerr=[[middle - low], [high - middle]], color=COLORS[name],
                  capsize=3)
    if NOISE in rows:
        axis.axvspan(*rows[NOISE][1:], color="0.93", zorder=0)
    axis.axvline(0, color="0.35", linewidth=1)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.invert_yaxis()
    axis.set_title("\n".join(textwrap.wrap(cell["label"], 60)), fontsize=8)
    axis.set_xlabel("% added to the frozen base's step", fontsize=8)
    axis.tick_params(labelsize=8)
