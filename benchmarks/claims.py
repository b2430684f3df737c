"""The numbers that LoRA guides repeat: sizes, counted on meta tensors, and the speed of training.

Three models: a decoder of 40 billion parameters (MiniMind with hidden 8192, 58 layers, 64 heads, 8
of them for keys and values, a feed-forward of 21888 and 6400 tokens), Falcon-40B and BERT-large (24
layers, hidden 1024). Guides say of BERT-large at rank 8 that "about 1.4M" parameters train, and of
40B that an adapter has "a few hundred MB"; each reading of "the linear layers" is counted beside
it. They say that LoRA trains "5 to 10 times faster" than full fine-tuning:
`claims_parts/speed.py` times a model of 26M, and counts memory.

    python benchmarks/claims.py [--rounds 15] [--json FILE]

Sizes on disk are those of the tensors; a file's header adds some hundred bytes for each.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertModel, FalconConfig, FalconForCausalLM

import lorafx
from claims_parts.speed import FULL, MODEL, TOKENS, Step, steps
from common.machine import in_words, machine
from common.minimind import Config, MiniMind
from common.tables import aligned, size

RANK = 8
GUIDES = 1_400_000
# A reading agrees with "about 1.4M" if it rounds to it.
ROUNDING = 50_000
DECODER = Config(hidden=8192, layers=58, heads=64, kv_heads=8, feed_forward=21888, vocabulary=6400)
BERT_LARGE = BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
                        intermediate_size=4096)
FALCON_LAYERS = 60
HUNDREDS = (150e6, 500e6)  # bytes that one may call a few hundred MB
# (how the guides' words may be read, lorafx's targets, what it excludes)
READINGS: dict[str, list[tuple[str, Any, Any]]] = {
    "40B decoder": [
        ("square: q, o", "square", ()),
        ("all but the head", "linear", "head"),
        ("all linears", "linear", ()),
    ],
    "Falcon-40B": [
        ("attention", ["query_key_value", "self_attention.dense"], ()),
        ("all but the head", "linear", "lm_head"),
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
    """One reading: its sites and parameters, the base's, bytes by dtype, CPU seconds to inject."""

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
    began = time.process_time()
    injected = lorafx.inject(base, RANK, targets=targets, exclude=exclude)
    seconds = time.process_time() - began
    sites = len(list(lorafx.parameters(injected))) // 2
    trainable = sum(tensor.numel() for tensor in lorafx.parameters(injected))
    total = sum(tensor.numel() for tensor in base.parameters())
    return Row(model, reading, sites, total, trainable, 4 * trainable, 2 * trainable, seconds)


def falcon(layers: int) -> FalconForCausalLM:
    """Falcon-40B with so many layers."""
    return FalconForCausalLM(FalconConfig(
        vocab_size=65024, hidden_size=8192, num_hidden_layers=layers, num_attention_heads=128,
        num_kv_heads=8, new_decoder_architecture=True))


def rows(falcon_layers: int) -> list[Row]:
    """All readings of all models."""
    with torch.device("meta"):
        models = {"40B decoder": MiniMind(DECODER), "BERT-large": BertModel(BERT_LARGE),
                  "Falcon-40B": falcon(falcon_layers)}
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


def verdict_on_40B(found: Sequence[Row]) -> str:
    """Which readings, if any, give a few hundred MB for 40B."""
    sizes: dict[str, int] = {}
    for row in found:
        if "40B" in row.model:
            sizes[f"{row.model}, {row.reading}, in float32"] = row.float32_bytes
            sizes[f"{row.model}, {row.reading}, in float16"] = row.float16_bytes
    agreeing = [name for name, count in sizes.items() if HUNDREDS[0] <= count <= HUNDREDS[1]]
    low, high = size(min(sizes.values())), size(max(sizes.values()))
    return (f"Guides say a few hundred MB for 40B: at rank {RANK} it is {low} to {high}. "
            f"{size(HUNDREDS[0])} or more: {'; '.join(agreeing) or 'none'}.")


def speed_table(found: Sequence[Step]) -> str:
    """The steps as text."""
    header = ["tokens a step", "what trains", "parameters", "memory", "step", "times faster"]
    body = []
    for step in found:
        middle, low, high = step.faster
        faster = "1" if step.method == FULL else f"{middle:.2f} [{low:.2f}, {high:.2f}]"
        body.append([f"{step.tokens:,}", step.method, f"{step.trains:,}", size(step.memory),
                     f"{1000 * step.seconds:.1f} ms", faster])
    return aligned(header, body, left=2)


def verdict_on_speed(found: Sequence[Step]) -> str:
    """Whether any step is 5 times faster."""
    lora = [step for step in found if step.method != FULL]
    low, high = (bound(step.faster[0] for step in lora) for bound in (min, max))
    holds = [f"{step.method} at {step.tokens} tokens" for step in lora if step.faster[0] >= 5]
    return (f"Guides say 5 to 10 times faster: here it is {low:.1f} to {high:.1f} times; "
            f"{', '.join(holds) or 'none'} reaches 5.")


def readme(results: Mapping[str, Any]) -> list[str]:
    """The section of benchmarks/README.md, from what the JSON file holds."""
    names = [field.name for field in dataclasses.fields(Row)]
    found = [Row(**{name: row[name] for name in names}) for row in results["rows"]]
    timed = [Step(**step) for step in results["steps"]]
    return ["`benchmarks/claims.py` computes the numbers that LoRA guides repeat, on meta tensors, "
            "without memory:", f"{table(found)}\n{verdict(found)}\n{verdict_on_40B(found)}",
            "It times a step (forward, backward and AdamW) of full fine-tuning and of LoRA at rank "
            f"{RANK} on the MiniMind of 26M, by one thread's processor time, in rounds that "
            "alternate, with 95 % intervals; memory is what a step holds at its peak beyond the "
            "model, with AdamW's moments, counted. LoRA makes two of full fine-tuning's three "
            "products with W; what it gains beyond 1.5 times is AdamW of all weights, which few "
            f"tokens do not hide. {in_words(results['machine'])}:",
            f"{speed_table(timed)}\n{verdict_on_speed(timed)}"]


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Print the tables and the verdicts; returns the rows."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="of the steps that are timed")
    parser.add_argument("--tiny", action="store_true",
                        help="time a model of one layer, once; count one layer of Falcon-40B")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it to this file")
    options = parser.parse_args(argv)
    where = machine(torch.device("cpu"))
    found = rows(1 if options.tiny else FALCON_LAYERS)
    config = dataclasses.replace(MODEL, hidden=32, layers=1) if options.tiny else MODEL
    timed = steps(config, TOKENS[:1] if options.tiny else TOKENS, 1 if options.tiny
                  else options.rounds)
    for text in (table(found), verdict(found), verdict_on_40B(found), speed_table(timed),
                 verdict_on_speed(timed)):
        print(text)
    if options.json is not None:
        content = {"rows": [dataclasses.asdict(row) | {"share": row.share} for row in found],
                   "steps": [dataclasses.asdict(step) for step in timed], "machine": where}
        options.json.write_text(json.dumps(content, indent=1))
    return found


if __name__ == "__main__":
    main()
