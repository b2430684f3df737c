"""The numbers that LoRA guides repeat, counted here on meta tensors: real modules, no memory.

Two models: a decoder of 40 billion parameters (MiniMind with hidden 8192, 58 layers, 64 heads, 8 of
them for keys and values, a feed-forward of 21888 and 6400 tokens) and BERT-large (24 layers, hidden
1024). Guides say of BERT-large at rank 8 that "about 1.4M" parameters train; each reading of "the
linear layers" is counted beside it.

    python benchmarks/claims.py [--json FILE]

Sizes on disk are those of the tensors; a file's header adds some hundred bytes for each.
"""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertModel

import lorafx
from common.arguments import json_file
from common.minimind import Config, MiniMind
from common.tables import aligned, size

RANK = 8
GUIDES = 1_400_000
# A reading agrees with "about 1.4M" if it rounds to it.
ROUNDING = 50_000
DECODER = Config(hidden=8192, layers=58, heads=64, kv_heads=8, feed_forward=21888, vocabulary=6400)
BERT_LARGE = BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
                        intermediate_size=4096)
# (how the guides' words may be read, lorafx's targets, what it excludes)
READINGS: dict[str, list[tuple[str, Any, Any]]] = {
    "40B decoder": [
        ("square: q, o", "square", ()),
        ("all but the head", "linear", "head"),
        ("all linears", "linear", ()),
    ],
    "BERT-large": [
        ("q, v", ["query", "value"], ()),
        ("q, k, v, o", "square", "pooler.dense"),
        ("square: q, k, v, o, pooler", "square", ()),
        ("all linears", "linear", ()),
    ],
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One reading: its sites and parameters, the base's, bytes by dtype, seconds to inject."""

    model: str
    reading: str
    sites: int
    base: int
    trainable: int
    float32_bytes: int
    float16_bytes: int
    seconds: float

    @property
    def share(self) -> float:
        """The trainable parameters over the base's."""
        return self.trainable / self.base


def count(model: str, base: nn.Module, reading: str, targets: Any, exclude: Any) -> Row:
    """Inject into a model on the meta device and count."""
    began = time.perf_counter()
    injected = lorafx.inject(base, RANK, targets=targets, exclude=exclude)
    seconds = time.perf_counter() - began
    sites = len(list(lorafx.parameters(injected))) // 2
    trainable = sum(tensor.numel() for tensor in lorafx.parameters(injected))
    total = sum(tensor.numel() for tensor in base.parameters())
    return Row(model, reading, sites, total, trainable, 4 * trainable, 2 * trainable, seconds)


def rows() -> list[Row]:
    """All readings of both models."""
    with torch.device("meta"):
        models = {"40B decoder": MiniMind(DECODER), "BERT-large": BertModel(BERT_LARGE)}
    found = []
    for name, readings in READINGS.items():
        for reading in readings:
            found.append(count(name, models[name], *reading))
    assert 39e9 <= found[0].base <= 41e9
    return found


def table(found: Sequence[Row]) -> str:
    """The rows as text."""
    header = ["model", "adapted at rank 8", "sites", "base", "trainable", "share", "float32",
              "float16", "injected in"]
    body = []
    for row in found:
        body.append([row.model, row.reading, f"{row.sites}", f"{row.base:,}", f"{row.trainable:,}",
                     f"{100 * row.share:.4f} %", size(row.float32_bytes), size(row.float16_bytes),
                     f"{row.seconds:.2f} s"])
    return aligned(header, body, left=2)


def verdict(found: Sequence[Row]) -> str:
    """Which reading, if any, gives the guides' number for BERT-large."""
    bert = [row for row in found if row.model == "BERT-large"]
    agreeing = [row.reading for row in bert if abs(row.trainable - GUIDES) <= ROUNDING]
    nearest = min(bert, key=lambda row: abs(row.trainable - GUIDES))
    claim = f"Guides say about {GUIDES / 1e6:.1f}M for BERT-large at rank {RANK}: "
    if agreeing:
        return f"{claim}{', '.join(agreeing)} gives it."
    return (f"{claim}no reading gives it. The nearest is '{nearest.reading}' with "
            f"{nearest.trainable / 1e6:.2f}M ({100 * (nearest.trainable / GUIDES - 1):+.0f} %).")


def readme(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The section of benchmarks/README.md, from what the JSON file holds."""
    names = [field.name for field in dataclasses.fields(Row)]
    found = [Row(**{name: row[name] for name in names}) for row in results]
    return ["`benchmarks/claims.py` computes the numbers that LoRA guides repeat, on meta tensors, "
            "without memory:", f"{table(found)}\n{verdict(found)}"]


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Print the table and the verdict; returns the rows."""
    path = json_file(__doc__, argv)
    found = rows()
    print(table(found))
    print(verdict(found))
    if path is not None:
        content = [dataclasses.asdict(row) | {"share": row.share} for row in found]
        path.write_text(json.dumps(content, indent=1))
    return found


if __name__ == "__main__":
    main()
