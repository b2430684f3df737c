"""How the fine-tuning benchmark shows its results: one table, and a section of the README."""

from collections.abc import Mapping
from typing import Any

from common.tables import aligned, size

ON_CPU = "saved for backward + gradients + optimizer state"


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """All models, a line each."""
    total = rows["base"]["parameters"]
    header = ["model", *rows["base"]["loss"], "trainable", "share", "on disk", "s/step", "memory"]
    return aligned(header, [cells(name, row, total) for name, row in rows.items()])


def cells(name: str, row: Mapping[str, Any], total: int) -> list[str]:
    """One model's results as the cells of the table; `total` counts the base's parameters."""
    trained, share = "-", "-"
    if row["trainable"] is not None:
        trained, share = f"{row['trainable']:,}", f"{100 * row['trainable'] / total:.2f} %"
    return [name, *(f"{loss:.3f}" for loss in row["loss"].values()), trained, share,
            size(row["bytes"]),
            f"{row['seconds']:.3f}" if row["seconds"] else "-",
            size(sum(row["memory"].values())) if row["memory"] else "-"]


def summary(rows: Mapping[str, Mapping[str, Any]], device: str) -> str:
    """The table, and what its columns mean."""
    memory = "torch's peak" if device.startswith("cuda") else ON_CPU
    texts = ", ".join(rows["base"]["loss"])
    return "\n".join([
        "", table(rows), f"{texts}: held-out loss, nats per byte. s/step: the median.",
        f"memory: beyond the model, {memory}.",
        "on disk: of adapters the .safetensors file, of whole models the weights by torch.save."])


def readme(results: Mapping[str, Any]) -> list[str]:
    """The section of benchmarks/README.md, from what results.json holds."""
    cores, versions = results["threads"], results["versions"]
    python = versions["python"].rpartition(".")[0]
    return [
        f"`benchmarks/finetune.py` is the whole workflow. On {cores} core{'s' * (cores != 1)}, "
        f"Python {python}, torch {versions['torch'].partition('+')[0]}, on {results['date']} it "
        f"took {results['seconds']:.0f} s, checked {len(results['checks'])} claims and printed "
        "this (held-out losses in nats per byte; `memory` is what training needs beyond the model: "
        "tensors saved for backward, gradients and optimizer state, counted exactly):",
        table(results["models"])]
