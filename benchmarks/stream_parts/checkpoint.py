"""A checkpoint of a Llama's size and shapes with random values, and an adapter for it, on disk."""

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

Shapes = Mapping[str, tuple[int, ...]]
BYTES = 2  # of a value, in bfloat16


def shapes(hidden: int, layers: int, vocabulary: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of a Llama, in order, with an MLP of 4 hidden."""
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name in "qkvo":
            yield f"{prefix}self_attn.{name}_proj.weight", (hidden, hidden)
        for name in ("gate", "up"):
            yield f"{prefix}mlp.{name}_proj.weight", (4 * hidden, hidden)
        yield f"{prefix}mlp.down_proj.weight", (hidden, 4 * hidden)
        for name in ("input", "post_attention"):
            yield f"{prefix}{name}_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def split(tensors: Shapes, limit: float) -> list[list[str]]:
    """The tensors' names by shard, in order; a shard of several is within the limit of bytes."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, shape in tensors.items():
        count = BYTES * math.prod(shape)
        if shards[-1] and held + count > limit:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += count
    return shards


def make(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Write `base` and, for all its linear layers, `peft`; returns what was made, in numbers."""
    rows = options.bytes / BYTES / options.hidden - 2 * options.vocabulary
    layers = max(round(rows / (16 * options.hidden)), 1)
    tensors = dict(shapes(options.hidden, layers, options.vocabulary))
    sizes = {name: BYTES * math.prod(shape) for name, shape in tensors.items()}
    shards = split(tensors, options.shard)
    write_base(folder / "base", tensors, shards)
    (folder / "base" / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "hidden_size": options.hidden, "intermediate_size": 4 * options.hidden,
        "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 8,
        "vocab_size": options.vocabulary, "tie_word_embeddings": False, "dtype": "bfloat16"}))
    sites = [name.removesuffix(".weight") for name in tensors if "_proj." in name]
    write_adapter(folder / "peft", sites, tensors, options.rank)
    return {"bytes": sum(sizes.values()), "shards": len(shards), "layers": layers,
            "sites": len(sites), "largest": max(sizes.values())}


def write_base(folder: Path, tensors: Shapes, shards: Sequence[Sequence[str]]) -> None:
    """Write the shards and their index."""
    folder.mkdir()
    most = max(math.prod(shape) for shape in tensors.values())
    noise = torch.randn(most, dtype=torch.bfloat16) * 0.02
    places = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        part = {}
        for name in names:
            shape = tensors[name]
            part[name] = noise[:math.prod(shape)].view(shape).clone()
        safetensors.torch.save_file(part, folder / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    total = sum(BYTES * math.prod(shape) for shape in tensors.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": places}))


def write_adapter(folder: Path, sites: Sequence[str], tensors: Shapes, rank: int) -> None:
    """Write an adapter in PEFT's format, which both programs read."""
    folder.mkdir()
    factors = {}
    for site in sites:
        out_features, in_features = tensors[f"{site}.weight"]
        prefix = f"base_model.model.{site}"
        factors[f"{prefix}.lora_A.weight"] = torch.randn(rank, in_features) * 0.02
        factors[f"{prefix}.lora_B.weight"] = torch.randn(out_features, rank) * 0.02
    safetensors.torch.save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "target_modules": list(sites), "r": rank, "lora_alpha": rank,
        "task_type": "CAUSAL_LM"}))


def check(base: Path, out: Path) -> None:
    """Raise unless a weight with an adapter changed and one that no adapter touches did not."""
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    adapted, untouched = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
    for name, changed in ((adapted, True), (untouched, False)):
        file = index[name]
        before = safetensors.safe_open(base / file, "pt").get_tensor(name)
        after = safetensors.safe_open(out / file, "pt").get_tensor(name)
        assert torch.equal(before, after) is not changed, name
