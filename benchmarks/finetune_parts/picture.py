"""The picture of the fine-tuning benchmark: what is learned, and what that costs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.tables import size

COLORS = {"LoRA": "#1f6fb4", "full": "#d9722b"}
LINES = {"prose": "-", "table": (0, (5, 1.5))}
GREY = "0.35"


def draw(path: Path, results: Mapping[str, Any]) -> None:
    """Write the picture of what results.json holds: held-out curves, and costs as bars."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.8, 5.0), layout="constrained")
    panels = figure.subplot_mosaic([["curves", "code"], ["curves", "disk"], ["curves", "memory"]],
                                   width_ratios=(1.7, 1), height_ratios=(2, 1, 1))
    figure.suptitle(title(results), fontsize=11.5, fontweight="bold", x=0.012, ha="left")
    curves(panels["curves"], results)
    for name, heading, values, shown in costs(results):
        bars(panels[name], heading, values, shown)
    FigureCanvasAgg(figure).print_figure(path, dpi=125)


def title(results: Mapping[str, Any]) -> str:
    """Rank, targets, rate and the share of the parameters that train."""
    options, rows = results["options"], results["models"]
    adapted, total = rows["LoRA on prose"]["trainable"], rows["base"]["parameters"]
    return (f"LoRA of rank {options['rank']} on {', '.join(options['targets'])} layers, rate "
            f"{options['rate']:g}: {100 * adapted / total:.2f} % of {total:,} parameters train")


def curves(axis: Any, results: Mapping[str, Any]) -> None:
    """Held-out losses over the steps, each text by LoRA and in full, with a number at each end."""
    last = results["options"]["steps"]
    ends = []
    for text, runs in results["runs"].items():
        for method, run in runs.items():
            steps, losses = zip(*run["held_out"])
            axis.plot(steps, losses, linestyle=LINES[text], color=COLORS[method], linewidth=2)
            ends.append((losses[-1], f"{method} on {text}", COLORS[method]))
        first = runs["LoRA"]["held_out"][0][1]
        axis.plot(0, first, "o", color=GREY, markersize=4, zorder=3)
        label(axis, (0, first), f"base on {text}  $\\bf{{{first:.3f}}}$", GREY, "right")
    low, high = axis.get_ylim()
    for loss, height, text, color in apart(ends, 0.05 * (high - low)):
        axis.plot(last, loss, "o", color=color, markersize=4, zorder=3)
        label(axis, (last, height), f"$\\bf{{{loss:.3f}}}$  {text}", color, "left")
    axis.set_title("Held-out loss (nats per byte) while fine-tuning", fontsize=10.5, loc="left")
    axis.set_xlabel("step", fontsize=9.5)
    axis.set_xlim(-0.62 * last, 1.55 * last)
    axis.set_xticks([tick for tick in axis.get_xticks() if 0 <= tick <= last])
    axis.tick_params(labelsize=9, colors=GREY)
    axis.grid(alpha=0.25)
    axis.spines["bottom"].set_bounds(0, last)
    plain(axis, "top", "right", "left")


def label(axis: Any, place: tuple[float, float], text: str, color: str, side: str) -> None:
    """Write text beside a point."""
    written = axis.annotate(text, place, (8 if side == "left" else -8, 0), ha=side, va="center",
                            textcoords="offset points", fontsize=9.5, color=color)
    written.set_in_layout(False)


def apart(ends: Sequence[tuple[float, str, str]],
          distance: float) -> list[tuple[float, float, str, str]]:
    """(value, height, ...) of labels from low to high, moved up where one would cover another."""
    placed: list[tuple[float, float, str, str]] = []
    for value, text, color in sorted(ends):
        height = value if not placed else max(value, placed[-1][1] + distance)
        placed.append((value, height, text, color))
    return placed


def costs(results: Mapping[str, Any]) -> list[tuple[str, str, dict[str, float], Any]]:
    """(panel, heading, {run: value}, how a value is shown) of what LoRA and full are compared by.

    Bytes are the same for both texts.
    """
    rows = results["models"]
    before = rows["base"]["loss"]["code"]
    forgotten, disk, memory = {}, {}, {}
    for text, runs in results["runs"].items():
        for method in runs:
            row = rows[f"{method} on {text}"]
            forgotten[f"{method} on {text}"] = row["loss"]["code"] - before
            disk[method], memory[method] = row["bytes"], sum(row["memory"].values())
    return [("code", "Forgotten on code (nats per byte)", forgotten, "{:+.3f}".format),
            ("disk", "Bytes on disk", disk, size),
            ("memory", "Memory of training, beyond the model", memory, size)]


def bars(axis: Any, heading: str, values: Mapping[str, float], shown: Any) -> None:
    """A bar for each run, with its number."""
    for place, (name, value) in enumerate(values.items()):
        color = COLORS[name.partition(" ")[0]]
        axis.barh(place, max(value, 0), color=color, height=0.72)
        label(axis, (max(value, 0), place), shown(value), color, "left")
    axis.set_yticks(range(len(values)), list(values), fontsize=9.5)
    axis.tick_params(length=0, colors=GREY)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.32 * max(*values.values(), 1e-9))
    axis.set_xticks([])
    axis.set_title(heading, fontsize=10.5, loc="left")
    plain(axis, "top", "right", "bottom")


def plain(axis: Any, *sides: str) -> None:
    """Leave out lines of the frame."""
    for side in sides:
        axis.spines[side].set_visible(False)
