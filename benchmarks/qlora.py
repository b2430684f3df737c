"""What training over a 4-bit base takes, memory and time, with lorafx and with PEFT.

A Llama of about 200 million parameters, all layers of bitsandbytes' nf4 with scales quantised too,
computing in bfloat16; float32 A and B of the same rank on every linear layer but the head. Each
contender trains in processes of its own, in rounds that alternate. Memory is the peak resident set
while it trains, above that of the model before it is adapted, and the whole.

    python benchmarks/qlora.py [--rounds 3] [--steps 4] [--tokens 256] [--json FILE]
"""

import argparse
import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from common.machine import in_words, machine
from common.tables import aligned, size

CONTENDERS = ("PEFT", "lorafx")
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_base(options: argparse.Namespace) -> nn.Module:
    """A Llama whose layers are packed as they are made, so that it is never whole in bfloat16."""
    import bitsandbytes
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=options.vocabulary, hidden_size=options.hidden, num_attention_heads=8,
        intermediate_size=options.hidden * 11 // 4, num_hidden_layers=options.layers,
        tie_word_embeddings=True, dtype=torch.bfloat16)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, layer in part.named_children():
                if name in LAYERS:
                    setattr(part, name, packed(bitsandbytes, layer))
    return model.train()


def packed(bitsandbytes: Any, layer: nn.Linear) -> nn.Module:
    """The layer in 4 bits."""
    made = bitsandbytes.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16,
        quant_type="nf4", compress_statistics=True)
    made.weight = bitsandbytes.nn.Params4bit(
        layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True,
        module=made)
    return made.to("cpu")


def adapted(name: str, base: nn.Module, rank: int) -> tuple[nn.Module, list[nn.Parameter]]:
    """The model and what trains."""
    if name == "lorafx":
        import lorafx

        model = lorafx.inject(base, rank=rank, alpha=rank, targets=LAYERS)
        return model, list(lorafx.parameters(model))
    from peft import LoraConfig, get_peft_model

    base.is_loaded_in_4bit = True
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=rank, target_modules=LAYERS))
    return model, [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train one contender in this process: seconds of each step, losses, bytes."""
    torch.manual_seed(0)
    base = make_base(options)
    before = resident("VmRSS")
    model, parameters = adapted(name, base, options.rank)
    del base
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    seconds, losses = [], []
    reset_peak()
    for step in range(options.steps):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(options.vocabulary, (1, options.tokens), generator=generator)
        began = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
        losses.append(float(loss.detach()))
    peak = resident("VmHWM")
    return {"seconds": min(seconds[1:] or seconds), "losses": losses, "peak": peak,
            "above": peak - before, "trained": sum(p.numel() for p in parameters)}


def resident(field: str) -> int:
    """A line of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"this system does not say {field}")


def reset_peak() -> None:
    """Give freed memory back, and let the peak be what there is now."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All contenders, in rounds; every second round runs backwards."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for number in range(options.rounds):
        for name in CONTENDERS[::-1 if number % 2 else 1]:
            found[name].append(train(name, options) if options.tiny else in_process(name, options))
    rows = {}
    for name, rounds in found.items():
        rows[name] = {key: median(one[key] for one in rounds) for key in ("peak", "above")}
        rows[name] |= {"seconds": min(one["seconds"] for one in rounds),
                       "losses": rounds[0]["losses"], "trained": rounds[0]["trained"]}
    return {"machine": machine(torch.device("cpu")), "rows": rows, "rounds": options.rounds,
            "tokens": options.tokens, "rank": options.rank, "parameters": parameters_of(options)}


def in_process(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a fresh process finds of one contender."""
    given = [f"--{key}={getattr(options, key)}" for key in
             ("hidden", "layers", "vocabulary", "rank", "steps", "tokens", "threads")]
    command = [sys.executable, __file__, "--only", name, *given]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ended.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def parameters_of(options: argparse.Namespace) -> int:
    """The number of parameters of the base."""
    width, inner = options.hidden, options.hidden * 11 // 4
    return options.layers * (4 * width * width + 3 * width * inner) + options.vocabulary * width


def table(found: dict[str, Any]) -> str:
    """A line for each contender."""
    body = []
    for name, row in found["rows"].items():
        body.append([name, size(row["peak"]), size(row["above"]), f"{row['seconds']:.2f} s",
                     f"{row['losses'][0]:.4f}", f"{row['losses'][-1]:.4f}"])
    return aligned(["", "peak memory", "above the base", "step", "first loss", "last loss"], body)


def readme(found: dict[str, Any]) -> list[str]:
    """The section of benchmarks/README.md, from what the JSON file holds."""
    return ["`benchmarks/qlora.py` trains float32 A and B of rank "
            f"{found['rank']} on a Llama of {found['parameters'] / 1e6:.0f} million parameters in "
            f"4 bits (nf4, bfloat16 products), {found['tokens']} tokens a step, each contender in "
            "processes of its own; memory is the peak resident set while it trains, and time the "
            f"fastest step. {in_words(found['machine'], 'peft')}, {found['rounds']} rounds, "
            f"beside other work (load {found['machine']['load_before']}; times are noise):",
            table(found)]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    for option, default in (("hidden", 1024), ("layers", 14), ("vocabulary", 32000), ("rank", 16),
                            ("steps", 4), ("tokens", 256), ("rounds", 3)):
        add(f"--{option}", type=int, default=default)
    add("--threads", type=int, default=torch.get_num_threads())
    add("--only", choices=CONTENDERS, help="train one, in this process, and print it as JSON")
    add("--tiny", action="store_true",
        help="a model too small to say anything, in this process, to try the script")
    add("--json", type=Path, default=Path("out/qlora.json"), metavar="FILE",
        help="where results go")
    options = parser.parse_args(argv)
    if options.tiny:
        options.hidden, options.layers, options.vocabulary, options.rounds = 64, 1, 64, 1
        options.tokens = 16
    return options


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the table and write the file; returns what it holds."""
    options = parse(argv)
    torch.set_num_threads(options.threads)
    if options.only is not None:
        row = train(options.only, options)
        print(json.dumps(row))
        return row
    found = measure(options)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=1))
    print(table(found))
    return found


if __name__ == "__main__":
    main()
