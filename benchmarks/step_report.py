"""How the step benchmark shows its results: a table for each cell, a picture of all, and a section of the README."""

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import merge
from report import aligned, size
from step_contenders import BASE, LORAFX, LORAFX_NARROW, NOISE, PATCHED, PEFT, PEFT_WIDE, SINGLE

# The colours of the picture.
COLORS = {NOISE: "0.8", PEFT: "tab:orange", PEFT_WIDE: "tab:red", PATCHED: "tab:green", SINGLE: "lightskyblue",
          LORAFX: "tab:blue", LORAFX_NARROW: "navy"}


Row = Mapping[str, Any]


def interval(found: Sequence[float] | None, digits: int = 3) -> str:
    """An estimate and its 95 % interval: 1.234 [1.201, 1.302]."""
    return "-" if found is None else f"{found[0]:.{digits}f} [{found[1]:.{digits}f}, {found[2]:.{digits}f}]"


def time_of(name: str, row: Row, kind: str) -> str:
    """The ratio to the frozen base; of that the time itself."""
    if kind not in row:
        return "-"
    return f"{row[kind]['seconds']:.4g} s" if name == BASE else interval(row[kind]["ratio"])


def error(value: float | None) -> str:
    """A relative error."""
    return "-" if value is None else f"{value:.1e}"


# The columns of a cell's table: what a contender, by its name and row, has in each.
COLUMNS: dict[str, Callable[[str, Row], str]] = {
    "step / base": lambda name, row: time_of(name, row, "step"),
    "forward / base": lambda name, row: time_of(name, row, "forward"),
    "saved": lambda name, row: size(row["saved_bytes"]),
    "peak": lambda name, row: size(row["peak_bytes"]),
    "operators": lambda name, row: str(row["operators"]),
    "compiled in": lambda name, row: f"{row['compile_seconds']:.1f} s",
    "graphs": lambda name, row: str(row["graphs"]),
    "breaks": lambda name, row: str(row["breaks"]),
    "error: y": lambda name, row: error(row["errors"]["output"]),
    "dX": lambda name, row: error(row["errors"]["dx"]),
    "dA": lambda name, row: error(row["errors"]["da"]),
    "dB": lambda name, row: error(row["errors"]["db"]),
    "adapted in": lambda name, row: f"{row['inject_seconds']:.3f} s",
}
EAGER_ONLY, COMPILED_ONLY = {"operators"}, {"compiled in", "graphs", "breaks"}


def table(cell: Mapping[str, Any], columns: Iterable[str] = COLUMNS) -> str:
    """A cell as text: a line for each contender that passed the gate, and why the others did not."""
    hidden = EAGER_ONLY if cell["compiled"] else COMPILED_ONLY
    shown = [column for column in columns if column not in hidden]
    sound = [[name, *(COLUMNS[column](name, row) for column in shown)]
             for name, row in cell["rows"].items() if not row["void"]]
    void = [f"{name}: void, {row['void']}" for name, row in cell["rows"].items() if row["void"]]
    return "\n".join([cell["label"], aligned(["", *shown], sound), *void, *verdicts(cell)])


def verdicts(cell: Mapping[str, Any]) -> list[str]:
    """What lorafx adds as a share of what PEFT adds, and whether it is slower, in words."""
    found = []
    for pair in cell["shares"]:
        ours, theirs, (_, low, high) = pair["ours"], pair["theirs"], pair["step"]
        judged = "slower" if low > 1 else "faster" if high < 1 else "neither slower nor faster beyond noise"
        found.append(f"{ours} adds {interval(pair['added']['step'], 2)} of what {theirs} adds to a step; its step "
                     f"takes {interval(pair['step'])} of that one's: {judged}.")
    return found


LEGEND = """\
step: forward, loss and backward, dX through every layer. forward: alone, without gradients. Both are the median over
rounds of the ratio to the frozen base in the same round, with a 95 % interval; the frozen base again is the noise.
saved: bytes for backward, each storage once, without the model's own. peak: of torch's allocator in a step. operators:
of a step, without views and allocation. error: |found - true| / |true| against float64; of dA, dB the worst layer."""


def draw(path: Path, cells: Sequence[Mapping[str, Any]]) -> None:
    """Write a picture: for each cell what every contender adds to the frozen base's step, in per cent of it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(3, len(cells))
    down = -(-len(cells) // across)
    figure = Figure(figsize=(5.2 * across, 2.4 * down + 0.4), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flat
    for axis, cell in zip(axes, cells):
        rows = {name: row["step"]["ratio"] for name, row in cell["rows"].items() if "step" in row and name != BASE}
        for place, (name, found) in enumerate(rows.items()):
            middle, low, high = (100 * (value - 1) for value in found)
            axis.barh(place, middle, xerr=[[middle - low], [high - middle]], color=COLORS[name], capsize=3)
        if NOISE in rows:
            axis.axvspan(*(100 * (value - 1) for value in rows[NOISE][1:]), color="0.93", zorder=0)
        axis.axvline(0, color="0.35", linewidth=1)
        axis.set_yticks(range(len(rows)), list(rows))
        axis.invert_yaxis()
        axis.set_title("\n".join(textwrap.wrap(cell["label"], 60)), fontsize=8)
        axis.set_xlabel("% added to the frozen base's step", fontsize=8)
        axis.tick_params(labelsize=8)
    for axis in list(axes):
        axis.set_axis_off()
    FigureCanvasAgg(figure).print_figure(path, dpi=130)


def overview(cells: Sequence[Mapping[str, Any]]) -> str:
    """What each contender adds to a cell's frozen base's step, and lorafx's share of what PEFT adds, pair by pair."""
    names = [NOISE, PEFT, PATCHED, SINGLE, LORAFX]
    body = []
    for cell in cells:
        added = []
        for name in names:
            row = cell["rows"][name]
            added.append("void" if "step" not in row else f"{100 * (row['step']['ratio'][0] - 1):+.1f} %")
        shares = {(pair["ours"], pair["theirs"]): interval(pair["added"]["step"], 2) for pair in cell["shares"]}
        body.append([cell["label"], *added, shares.pop((LORAFX, PEFT), "-")])
        for (ours, theirs), found in shares.items():
            both = [cell["rows"][name]["step"]["ratio"][0] for name in (theirs, ours)]
            shown = dict(zip((PEFT, LORAFX), (f"{100 * (value - 1):+.1f} %" for value in both)))
            body.append([f"  {ours} / {theirs}", *(shown.get(name, "") for name in names), found])
    return aligned(["step over the frozen base's", "again", PEFT, "patched", "group=False", LORAFX, "of PEFT's"], body)


def machine_words(found: Mapping[str, Any]) -> str:
    """Where and when, as a sentence begins."""
    count = f"{found['threads']} core" + "s" * (found["threads"] != 1)
    where = found["device"] if found["device"] != "cpu" else f"{count} ({found['processor']})"
    return (f"On {where}, Python {found['python'].rpartition('.')[0]}, torch {found['torch'].partition('+')[0]}, PEFT "
            f"{found['peft']}, on {found['date']}")


README_COLUMNS = ("step / base", "forward / base", "saved", "peak", "operators", "compiled in", "graphs", "breaks")
NARROW_COLUMNS = ("step / base", "saved", "error: y", "dX", "dA", "dB")


def readme(step: Mapping[str, Any], merged: Mapping[str, Any] | None = None) -> str:
    """The README's section about performance, in Markdown, from what the benchmarks' JSON files hold."""
    cells = step["cells"]
    paragraphs = [
        "`benchmarks/step.py` times a training step beside PEFT and beside a forward patched by hand: one process, the "
        "same weights, A, B and data, in interleaved rounds, after every output and gradient has been compared with "
        f"float64. {machine_words(step['machine'])}, in {step['seconds']:.0f} s, this is what each adds to the frozen "
        "base's step (the base again shows the noise), and what lorafx adds as a share of what PEFT adds, with its "
        "95 % interval:",
        overview(cells), "The first of these:", table(cells[0], README_COLUMNS)]
    compiled = [cell for cell in cells if cell["compiled"]]
    if compiled:
        paragraphs += ["Compiled:", table(compiled[0], README_COLUMNS)]
    narrow = [cell for cell in cells if PEFT_WIDE in cell["rows"]]
    if narrow:
        paragraphs += ["In bfloat16, where lorafx's A and B are float32 unless asked otherwise:",
                       table(narrow[0], NARROW_COLUMNS)]
    paragraphs.append(" ".join(LEGEND.split()))
    if merged is not None:
        paragraphs += [f"`benchmarks/merge.py` folds adapters into the weights. {machine_words(merged['machine'])}:",
                       merge.tables(merged["rows"]),
                       " ".join(merge.LEGEND.split())]
    return "\n\n".join(f"```\n{text}\n```" if "\n" in text else textwrap.fill(text, 120) for text in paragraphs)
