"""How the step benchmark shows its results: a table for each cell, and one of all."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from common.contenders import BASE, KEPT, LORAFX, NOISE, PATCHED, PEFT, PEFT_WIDE, SINGLE
from common.machine import in_words
from common.tables import aligned, interval, size
from merge_parts import report as merge_report

Row = Mapping[str, Any]


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
    "alive": lambda name, row: size(row["alive_bytes"]),
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
    """A cell as text: a line for each contender that passed the gate, or why it did not."""
    hidden = EAGER_ONLY if cell["compiled"] else COMPILED_ONLY
    shown = [column for column in columns if column not in hidden]
    sound, void = [], []
    for name, row in cell["rows"].items():
        if row["void"]:
            void.append(f"{name}: void, {row['void']}")
        else:
            sound.append([name, *(COLUMNS[column](name, row) for column in shown)])
    return "\n".join([cell["label"], aligned(["", *shown], sound), *void, *verdicts(cell)])


def verdicts(cell: Mapping[str, Any]) -> list[str]:
    """What lorafx adds as a share of what PEFT adds, and whether it is slower, in words."""
    found = []
    for pair in cell["shares"]:
        ours, theirs, (_, low, high) = pair["ours"], pair["theirs"], pair["step"]
        judged = "neither slower nor faster beyond noise"
        if low > 1 or high < 1:
            judged = "slower" if low > 1 else "faster"
        found.append(f"{ours} adds {interval(pair['added']['step'], 2)} of what {theirs} adds to a "
                     f"step; its step takes {interval(pair['step'])} of that one's: {judged}.")
    return found


LEGEND = """\
step: forward, loss and backward, dX through every layer. forward: alone, without gradients. Both
are the median over rounds of the ratio to the frozen base in the same round, with a 95 % interval;
the frozen base again is the noise. alive: bytes of torch's allocator between forward and backward
pass, beyond the model's own. peak: the most in a step. operators: of a step, without views and
allocation. error: |found - true| / |true| against float64; of dA, dB the worst layer."""


def overview(cells: Sequence[Mapping[str, Any]]) -> str:
    """What each contender adds to each frozen base's step, and lorafx's share of what PEFT adds."""
    names = [NOISE, PEFT, PATCHED, SINGLE, KEPT, LORAFX]
    body = []
    for cell in cells:
        rows = cell["rows"]
        shares = {}
        for pair in cell["shares"]:
            shares[pair["ours"], pair["theirs"]] = interval(pair["added"]["step"], 2)
        body.append([cell["label"], *(percent(rows[name]) for name in names),
                     shares.pop((LORAFX, PEFT), "-")])
        for (ours, theirs), found in shares.items():
            shown = {PEFT: percent(rows[theirs]), LORAFX: percent(rows[ours])}
            body.append([f"  {ours} / {theirs}", *(shown.get(name, "") for name in names), found])
    header = ["step over the frozen base's", "again", PEFT, "patched", "group=False",
              "recompute=False", LORAFX, "of PEFT's"]
    return aligned(header, body)


def percent(row: Row) -> str:
    """What a contender adds to the frozen base's step."""
    return f"{100 * (row['step']['ratio'][0] - 1):+.1f} %" if "step" in row else "void"


README_COLUMNS = ("step / base", "forward / base", "alive", "peak", "operators", "compiled in",
                  "graphs", "breaks")
NARROW_COLUMNS = ("step / base", "alive", "error: y", "dX", "dA", "dB")


def readme(step: Mapping[str, Any], merged: Mapping[str, Any] | None = None) -> list[str]:
    """The paragraphs and tables about speed, from what the benchmarks' JSON files hold."""
    cells = step["cells"]
    paragraphs = [
        "`benchmarks/step.py` times a training step beside PEFT and beside a forward patched by "
        "hand: one process, the same weights, A, B and data, in interleaved rounds, after every "
        "output and gradient has been compared with float64. "
        f"{in_words(step['machine'], 'peft')}, in {step['seconds']:.0f} s, this is what each adds "
        "to the frozen base's step (the base again shows the noise), and what lorafx adds as a "
        "share of what PEFT adds, with its 95 % interval, by the processor's time in one thread, "
        "or by the clock where threads are named:",
        overview(cells), "The first of these:", table(cells[0], README_COLUMNS)]
    compiled = [cell for cell in cells if cell["compiled"]]
    if compiled:
        paragraphs += ["Compiled:", table(compiled[0], README_COLUMNS)]
    narrow = [cell for cell in cells if PEFT_WIDE in cell["rows"]]
    if narrow:
        paragraphs += ["In bfloat16, where lorafx's A and B are float32 unless asked otherwise:",
                       table(narrow[0], NARROW_COLUMNS)]
    paragraphs.append(" ".join(LEGEND.split()))
    return paragraphs + ([] if merged is None else merge_report.readme(merged))
