"""How the fine-tuning benchmark shows its results: one table, and a picture of the loss curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training import Run


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table as text: the first columns, `left` of them, set to the left and the others to the right."""
    table = [header, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) if column < left else cell.rjust(width)
                       for column, (cell, width) in enumerate(zip(row, widths))) for row in table]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def size(count: float) -> str:
    """Bytes in the largest unit that leaves at least 1."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def summary(rows: Mapping[str, Mapping[str, Any]], device: str) -> str:
    """The table of all models, and what its columns mean."""
    first = rows["base"]["loss"]
    header = ["model", *first, "trainable", "share", "on disk", "s/step", "memory"]
    held = "torch's peak" if device.startswith("cuda") else "saved for backward + gradients + optimizer state"
    return "\n".join([
        "", aligned(header, [cells(name, row, rows["base"]["parameters"]) for name, row in rows.items()]),
        f"{', '.join(first)}: held-out loss, nats per byte. s/step: the median. memory: beyond the model, {held}.",
        "on disk: of adapters the .safetensors file, of whole models the weights by torch.save."])


def cells(name: str, row: Mapping[str, Any], total: int) -> list[str]:
    """One model's results as the cells of the table; `total` is the number of the base's parameters."""
    trained = row["trainable"] is not None
    return [name, *(f"{loss:.3f}" for loss in row["loss"].values()),
            f"{row['trainable']:,}" if trained else "-",
            f"{100 * row['trainable'] / total:.2f} %" if trained else "-",
            size(row["bytes"]),
            f"{row['seconds']:.3f}" if row["seconds"] else "-",
            size(sum(row["memory"].values())) if row["memory"] else "-"]


def draw(path: Path, pretraining: Sequence[float], runs: Mapping[str, Mapping[str, Run]]) -> None:
    """Write a picture: the pre-training, then for each text the runs that were trained on it.

    `runs` is {text: {how it was trained: Run}}.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * (1 + len(runs)), 4.0), layout="constrained")
    axes = figure.subplots(1, 1 + len(runs))
    axes[0].plot(range(1, len(pretraining) + 1), pretraining, color="0.35", linewidth=1)
    axes[0].set(title="Base model: pre-training on code", ylabel="loss (nats per byte)")
    for axis, (text, by_way) in zip(axes[1:], runs.items()):
        for color, (way, run) in zip(("tab:blue", "tab:orange"), by_way.items()):
            axis.plot(range(1, len(run.training) + 1), run.training, color=color, linewidth=0.7, alpha=0.35)
            axis.plot(*zip(*run.held_out), color=color, marker="o", markersize=3.5,
                      label=f"{way}, held-out (faint: training)")
        base = next(iter(by_way.values())).held_out[0][1]
        axis.axhline(base, color="0.35", linestyle="--", linewidth=1, label="base model, held-out")
        axis.set(title=f"Fine-tuning on {text}")
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_figure(path, dpi=150)
