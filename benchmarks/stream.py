"""Merges an adapter into a checkpoint on disk with `lorafx merge`, beside a plain copy of its files and beside PEFT.

The checkpoint is made here: a Llama's tensors in bfloat16, in shards. Each way runs in a process of its own, in rounds
that alternate; what it wrote is on the disk (fsync) before its clock stops. Memory is the process's peak resident set.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import safetensors.torch
import torch
from report import aligned, size

from lorafx._adapter.adapter import Adapter, Pair, Stored
from lorafx._adapter.config import LoRAConfig
from lorafx._formats.table import write_adapter

COPY, LORAFX, PEFT, NOTHING = "copy the files", "lorafx merge", "PEFT: load, merge_and_unload, save", "import lorafx"
PEAK = """
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print("peak", peak)  # in KiB, of this program alone: getrusage begins with that of the process which started it
"""
LORAFX_CODE = """
import sys
from lorafx._cli.main import main
assert main(sys.argv[1:]) == 0
""" + PEAK
PEFT_CODE = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(base, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
""" + PEAK


def shapes(hidden: int, layers: int, vocabulary: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of a Llama, in order, with an MLP of 4 hidden."""
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for i in range(layers):
        prefix = f"model.layers.{i}."
        yield from ((f"{prefix}self_attn.{name}_proj.weight", (hidden, hidden)) for name in "qkvo")
        yield from ((f"{prefix}mlp.{name}_proj.weight", (4 * hidden, hidden)) for name in ("gate", "up"))
        yield f"{prefix}mlp.down_proj.weight", (hidden, 4 * hidden)
        yield from ((f"{prefix}{name}_layernorm.weight", (hidden,)) for name in ("input", "post_attention"))
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def make(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Write the checkpoint and two files of one adapter for all its linear layers; says what was made."""
    base = folder / "base"
    base.mkdir()
    layers = max(round((options.bytes / 2 / options.hidden - 2 * options.vocabulary) / (16 * options.hidden)), 1)
    tensors = dict(shapes(options.hidden, layers, options.vocabulary))
    shards: list[list[str]] = [[]]
    for name, shape in tensors.items():
        if sum(2 * torch.Size(tensors[other]).numel() for other in [*shards[-1], name]) > options.shard and shards[-1]:
            shards.append([])
        shards[-1].append(name)
    places = {}
    noise = torch.randn(max(torch.Size(shape).numel() for shape in tensors.values()), dtype=torch.bfloat16) * 0.02
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        part = {name: noise[:torch.Size(tensors[name]).numel()].view(tensors[name]).clone() for name in names}
        safetensors.torch.save_file(part, base / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    total = sum(2 * torch.Size(shape).numel() for shape in tensors.values())
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total},
                                                                   "weight_map": places}))
    (base / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": options.hidden,
        "intermediate_size": 4 * options.hidden, "num_hidden_layers": layers, "num_attention_heads": 8,
        "num_key_value_heads": 8, "vocab_size": options.vocabulary, "tie_word_embeddings": False, "dtype": "bfloat16"}))
    sites = [name.removesuffix(".weight") for name, shape in tensors.items() if "_proj." in name]
    make_adapters(folder, sites, tensors, options.rank)
    return {"bytes": total, "shards": len(shards), "layers": layers, "sites": len(sites),
            "largest": max(2 * torch.Size(shape).numel() for shape in tensors.values())}


def make_adapters(folder: Path, sites: Sequence[str], tensors: dict[str, tuple[int, ...]], rank: int) -> None:
    """One adapter in lorafx's format and in PEFT's."""
    pairs, stored = {}, {}
    for site in sites:
        out_features, in_features = tensors[f"{site}.weight"]
        pairs[site] = Pair(torch.randn(rank, in_features) * 0.02, torch.randn(out_features, rank) * 0.02, 1.0)
        stored[site] = Stored((out_features, in_features))
    write_adapter(Adapter("demo", LoRAConfig(rank, targets=list(sites)), pairs, stored=stored), folder / "demo.safetensors",
          None, None)
    (folder / "peft").mkdir()
    safetensors.torch.save_file({f"base_model.model.{site}.lora_{letter}.weight": tensor for site, pair in pairs.items()
                                 for letter, tensor in zip("AB", pair[:2])}, folder / "peft/adapter_model.safetensors")
    (folder / "peft/adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "target_modules": list(sites), "r": rank, "lora_alpha": rank, "task_type": "CAUSAL_LM"}))


def run(code: str, *arguments: str | Path) -> dict[str, Any]:
    """Seconds and peak resident bytes of a Python program that says its own peak in the end."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"a program ended with {done.returncode}: {done.stderr[-2000:]}")
    return {"seconds": time.perf_counter() - began, "peak": 1024 * int(done.stdout.split()[-1])}


def copy(folder: Path, out: Path) -> dict[str, Any]:
    """Seconds for copying the checkpoint's files one by one, each flushed to the disk."""
    began = time.perf_counter()
    out.mkdir()
    for path in (folder / "base").iterdir():
        shutil.copyfile(path, out / path.name)
        with open(out / path.name, "rb+") as file:
            os.fsync(file.fileno())
    return {"seconds": time.perf_counter() - began, "peak": None}


def flush(folder: Path) -> None:
    """Let files that another program wrote reach the disk."""
    for path in folder.iterdir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())


def peft(folder: Path, out: Path) -> dict[str, Any]:
    """PEFT's way, in a process."""
    began = time.perf_counter()
    found = run(PEFT_CODE, folder / "base", folder / "peft", out)
    flush(out)
    return {**found, "seconds": time.perf_counter() - began}


def why_not_peft(total: int) -> str:
    """Why PEFT's way is left out, if it is: it holds the whole model."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return f"it needs about {size(1.5 * total)} of memory, and {size(free)} are free" if free < 1.5 * total else ""


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All about one checkpoint, as plain data."""
    about = make(folder, options)
    ways = {COPY: lambda out: copy(folder, out),
            LORAFX: lambda out: run(LORAFX_CODE, "merge", folder / "base", folder / "demo.safetensors", "-o", out)}
    skipped = {PEFT: options.no_peft and "--no-peft" or why_not_peft(about["bytes"])}
    if not skipped[PEFT]:
        ways[PEFT] = lambda out: peft(folder, out)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for number in range(options.rounds):
        for name in [*ways][::-1 if number % 2 else 1]:
            out = folder / "out"
            os.sync()
            found[name].append(ways[name](out))
            if name == LORAFX and number == 0:
                check(folder / "base", out)
            shutil.rmtree(out)
    rows = {name: {"seconds": median(one["seconds"] for one in several), "times": [one["seconds"] for one in several],
                   "peak": None if name == COPY else max(one["peak"] for one in several)}
            for name, several in found.items()}
    ratios = [one["seconds"] / other["seconds"] for one, other in zip(found[LORAFX], found[COPY])]
    start = run("import lorafx" + PEAK)
    above = rows[LORAFX]["peak"] - start["peak"]
    return {**about, "rows": rows, "skipped": {name: why for name, why in skipped.items() if why},
            "import": start, "of_copy": median(ratios), "ratios": ratios, "above_import": above,
            "tensors": above / about["largest"]}


def check(base: Path, out: Path) -> None:
    """Raise unless one merged weight is the rounded sum, and one that no adapter touches the same."""
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    for name, changed in (("model.layers.0.mlp.up_proj.weight", True), ("model.norm.weight", False)):
        before, after = (safetensors.safe_open(folder / index[name], "pt").get_tensor(name) for folder in (base, out))
        assert torch.equal(before, after) is not changed, name


def table(found: dict[str, Any]) -> str:
    """The ways, a line for each, and what lorafx is judged by."""
    first = found["rows"][COPY]["seconds"]
    rows = [[name, f"{row['seconds']:.1f} s", f"{row['seconds'] / first:.2f}",
             size(found["bytes"] / row["seconds"]) + "/s",
             "-" if row["peak"] is None else size(row["peak"])] for name, row in found["rows"].items()]
    rows.append([NOTHING, f"{found['import']['seconds']:.1f} s", "-", "-", size(found["import"]["peak"])])
    head = (f"{size(found['bytes'])} in {found['shards']} shards, {found['sites']} sites adapted, "
            f"largest tensor {size(found['largest'])}")
    lines = [head, aligned(["", "time", "x copy", "rate", "peak memory"], rows)]
    lines += [f"{name} was left out: {why}." for name, why in found["skipped"].items()]
    return "\n".join([
        *lines, f"lorafx merge took {found['of_copy']:.2f} times what copying took (at most 1.5 wanted), and "
        f"{size(max(found['above_import'], 0))}, {max(found['tensors'], 0):.2f} of the largest tensor, above what "
        "importing takes (at most 3 wanted)."])


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the table and write the file; returns what it holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=float, default=8e9, help="of the checkpoint (8e9)")
    parser.add_argument("--shard", type=float, default=2e9, help="bytes of a shard (2e9)")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-peft", action="store_true", help="leave PEFT's way out")
    parser.add_argument("--tiny", action="store_true", help="a checkpoint too small to say anything, to try the script")
    parser.add_argument("--folder", type=Path, help="where the files go meanwhile; needs twice the bytes")
    parser.add_argument("--json", type=Path, default=Path("out/stream.json"), metavar="FILE", help="where results go")
    options = parser.parse_args(argv)
    if options.tiny:
        options.bytes, options.shard, options.hidden, options.vocabulary, options.rounds = 2e6, 5e5, 64, 100, 1
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = measure(Path(folder), options)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=1))
    print(table(found))
    return found


if __name__ == "__main__":
    main()
