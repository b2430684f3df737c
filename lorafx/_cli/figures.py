"""The pictures of an adapter, drawn by matplotlib: heat maps by layer and kind, and spectra."""

import io
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .._adapter.adapter import Adapter
from .._adapter.compare import describe
from .._adapter.letters import elided
from .._adapter.spectrum import cosine, effective_rank, over, spectrum
from .drawing import drawing_tool
from .grid import Grid, grid_of

WIDTH = 10.0  # inches
_WRITTEN = 16  # layers at the most whose cells have their numbers in them
_NAMED_LAYERS, _NAMED_KINDS = 64, 100  # at the most, of more every second or so
_KIND = 36  # places of a kind's name
_MARKED = 32  # singular values at the most that are points on their line
_PANELS, _ACROSS = 12, 4  # kinds at the most whose spectra are shown, so many side by side


class SiteFacts(NamedTuple):
    """What is shown of a site: |s B A|, over |W| where that is known, its spectrum, the cosine.

    The cosine is that with the same site of another adapter, if there is one.
    """

    name: str
    rank: int
    norm: float
    relative: float | None
    values: torch.Tensor  # of s B A, (rank,) or (experts, rank)
    effective: float  # rank
    cosine: float | None


def facts_of(
    adapter: Adapter, norms: dict[str, float] | None, other: Adapter | None
) -> list[SiteFacts]:
    """Return the facts of each site; `norms` are those of the weights, by site."""
    found = []
    for site, row in describe(adapter, None)["sites"].items():
        pair, size = adapter.pairs[site], row["norm"]
        values = spectrum(pair)
        W = None if norms is None else norms[site]
        relative = None if W is None else over(size, W)
        beside = None if other is None else other.pairs.get(site)
        alike = None if beside is None else cosine(pair, beside)
        found.append(SiteFacts(site, row["rank"], size, relative, values, effective_rank(values),
                               alike))
    return found


class Panel(NamedTuple):
    """A picture by itself: its title, how it is read, its height, and what draws it."""

    title: str
    caption: str
    height: float
    draw: Callable[[Any], None]  # on a Figure or a SubFigure


def panels_of(facts: Sequence[SiteFacts], compared: bool) -> list[Panel]:
    """Return the pictures that there are of an adapter."""
    grid = grid_of(site.name for site in facts)
    height = 1.5 + 0.34 * min(len(grid.kinds), _NAMED_KINDS)
    height += 0.055 * max(map(len, grid.layers)) * _turned(grid)
    relative = any(site.relative is not None for site in facts)
    size = {site.name: site.relative if relative else site.norm for site in facts}
    shares = {site.name: site.effective / site.rank for site in facts}
    effective = {site.name: f"{site.effective:.1f}" for site in facts}
    what, more = ("|sBA| / |W|", "") if relative else (
        "|sBA|", " Without --base, it is not known how much that is beside the weights.")
    if not all(number is not None and math.isfinite(number) for number in size.values()):
        more += " Hatched: no number, as W is 0 there, or something is NaN or infinite."
    left_out = ""
    if not all(site.norm for site in facts):
        left_out = " What adds nothing has no line."
    if len(grid.kinds) > _PANELS:
        left_out += f" Only the first {_PANELS} of {len(grid.kinds):,} kinds are shown."
    panels = [
        Panel(f"Change of each weight, {what}",
              f"How large a change the adapter makes, by layer and kind of site.{more}", height,
              lambda figure: _heat_map(figure, grid, size, what, {}, "cividis", (0.0, None))),
        Panel("Effective rank", "The effective rank of s B A, exp of the entropy of its singular "
              "values; the colour is its share of the rank that the adapter has: is the rank used?",
              height, lambda figure: _heat_map(figure, grid, shares, "share of the rank", effective,
                                               "cividis", (0.0, 1.0))),
        Panel("Singular values", "Those of s B A over the largest, one line for each layer: a line "
              f"that falls early is a rank that is not used.{left_out}", _spectra_height(grid),
              lambda figure: _spectra(figure, grid, facts))]
    if compared:
        cosines = {site.name: site.cosine for site in facts}
        panels.append(Panel(
            "Cosine between the two adapters", "1 where both change a weight in one direction, 0 "
            "where their changes have nothing in common, -1 where they are opposite. Hatched: only "
            "one of them has the site, or adds something there.", height,
            lambda figure: _heat_map(figure, grid, cosines, "cosine", {}, "PuOr", (-1.0, 1.0))))
    return panels


def svg_of(panel: Panel) -> bytes:
    """Return a picture as SVG, its letters as outlines, so that it looks alike everywhere."""
    matplotlib = drawing_tool()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": panel.title}):
        figure = matplotlib.figure.Figure(figsize=(WIDTH, panel.height), layout="constrained")
        panel.draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def png_of(title: str, said: str, panels: Sequence[Panel]) -> bytes:
    """Return all pictures, one below the other, as PNG, under a title and what is said of them."""
    matplotlib = drawing_tool()
    heights = [panel.height + 0.75 for panel in panels]
    figure = matplotlib.figure.Figure(figsize=(WIDTH, sum(heights) + 0.9), layout="constrained")
    figure.suptitle("\n".join([*textwrap.wrap(title, 80), ""]), fontsize=14, fontweight="bold",
                    x=0.01, ha="left")
    figure.supxlabel("\n".join(textwrap.wrap(said, 120)), fontsize=9, x=0.01, ha="left")
    parts = figure.subfigures(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for panel, part in zip(panels, parts):
        caption = "\n".join(textwrap.wrap(panel.caption, 120))
        part.suptitle(panel.title, fontsize=11, fontweight="bold", x=0.01, ha="left")
        part.supxlabel(f"{caption}\n", fontsize=9, color="#444444", x=0.01, ha="left")
        panel.draw(part)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140, bbox_inches="tight", pad_inches=0.2)
    return buffer.getvalue()


def _turned(grid: Grid) -> bool:
    """True if the names of layers are too long to stand side by side."""
    return len(grid.layers) * max(map(len, grid.layers)) > 110


def _heat_map(
    figure: Any, grid: Grid, numbers: Mapping[str, float | None], what: str,
    words: Mapping[str, str], colours: str, limits: tuple[float, float | None],
) -> None:
    """Colours by layer and kind; a cell without a number is hatched, one without a site is blank.

    `words` are written in cells in the place of numbers.
    """
    table = torch.full((len(grid.kinds), len(grid.layers)), math.nan, dtype=torch.float64)
    for site, place in grid.cells.items():
        number = numbers[site]
        table[place] = math.nan if number is None else number
    known = table[table.isfinite()]
    low, high = limits[0], limits[1] or (float(known.max()) if known.numel() else 0.0) or 1.0
    axes = figure.add_subplot()
    image = axes.imshow(table.numpy(), cmap=colours, vmin=low, vmax=high, aspect="auto")
    axes.set_xlabel("layer")
    step = -(-len(grid.layers) // _NAMED_LAYERS)
    axes.set_xticks(range(0, len(grid.layers), step), grid.layers[::step], fontsize=9,
                    rotation=90 if _turned(grid) else 0)
    step = -(-len(grid.kinds) // _NAMED_KINDS)
    kinds = [elided(kind, _KIND) for kind in grid.kinds[::step]]
    axes.set_yticks(range(0, len(grid.kinds), step), kinds, fontsize=9)
    axes.set_xticks([place - 0.5 for place in range(1, len(grid.layers))], minor=True)
    axes.set_yticks([place - 0.5 for place in range(1, len(grid.kinds))], minor=True)
    axes.grid(which="minor", color="white", linewidth=min(1, 40 / max(table.shape)))
    axes.tick_params(which="both", length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    for site, (kind, layer) in grid.cells.items():
        number = table[kind, layer].item()
        if not math.isfinite(number):
            axes.fill_between([layer - 0.5, layer + 0.5], kind - 0.5, kind + 0.5, facecolor="none",
                              edgecolor="#888888", hatch="///", linewidth=0)
        elif len(grid.layers) <= _WRITTEN:
            red, green, blue, _ = image.cmap(image.norm(number))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            axes.text(layer, kind, words.get(site) or _short(number), ha="center", va="center",
                      fontsize=8.5, color="white" if dark else "black")
    bar = figure.colorbar(image, ax=axes, pad=0.015, fraction=0.04)
    bar.set_label(what, fontsize=9)
    bar.ax.tick_params(labelsize=8.5)


def _short(number: float) -> str:
    """A number in five letters or so."""
    if number and abs(number) < 1e-3:
        return f"{number:.0e}"
    return f"{number:.3f}" if abs(number) < 1 else f"{number:.3g}"


def _spectra_height(grid: Grid) -> float:
    return 0.6 + 2.1 * -(-min(len(grid.kinds), _PANELS) // _ACROSS)


def _spectra(figure: Any, grid: Grid, facts: Sequence[SiteFacts]) -> None:
    """Singular values over the largest, for each kind a small picture, for each layer a line."""
    matplotlib = drawing_tool()
    colours = matplotlib.colormaps["viridis"]
    count = min(len(grid.kinds), _PANELS)
    across = min(count, _ACROSS)
    axes = figure.subplots(-(-count // across), across, squeeze=False, sharey=True).flatten()
    longest = max(site.values.shape[-1] for site in facts)
    beside = max(0.05 * longest, 0.2)
    for site in facts:
        kind, layer = grid.cells[site.name]
        values = site.values.reshape(-1, site.values.shape[-1])  # (experts, rank)
        largest = values.max(-1, keepdim=True).values
        if kind < count and float(largest.max()) > 0:
            mean = (values / largest.where(largest > 0, 1)).mean(0)
            axes[kind].plot(range(1, len(mean) + 1), mean.tolist(), linewidth=1.2, markersize=4,
                            marker="." if len(mean) <= _MARKED else "",
                            color=colours(0.9 * layer / max(len(grid.layers) - 1, 1)))
    for number, panel in enumerate(axes):
        panel.set_visible(number < count)
        if number < count:
            panel.set_title(elided(grid.kinds[number], 96 // across), fontsize=9)
            panel.set_ylim(-0.03, 1.05)
            panel.tick_params(labelsize=8.5)
            panel.set_xlim(1 - beside, longest + beside)
            panel.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
            panel.grid(color="#dddddd", linewidth=0.6)
            if number % across == 0:
                panel.set_ylabel("over the largest", fontsize=9)
            if number + across >= count:
                panel.set_xlabel("singular value", fontsize=9)
    if len(grid.layers) > 1:
        scale = matplotlib.cm.ScalarMappable(
            matplotlib.colors.Normalize(0, (len(grid.layers) - 1) / 0.9), colours)
        step = -(-len(grid.layers) // 8)
        bar = figure.colorbar(scale, ax=list(axes[:count]), pad=0.015, fraction=0.04,
                              ticks=range(0, len(grid.layers), step),
                              boundaries=[place - 0.5 for place in range(len(grid.layers) + 1)])
        bar.ax.set_yticklabels(grid.layers[::step], fontsize=8.5)
        bar.solids.set_edgecolor("face")
        bar.set_label("layer", fontsize=9)
