"""The stages of the fine-tuning benchmark; each checks what it made against the stage before."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lorafx
from common.minimind import MiniMind
from common.timing import threads
from finetune_parts.bench import (
    FULL_RATE, Bench, close, config, equal, fresh_base, frozen, parameters, save_whole, snapshot)
from finetune_parts.keep import AdapterKeeper
from finetune_parts.ranks import whole
from finetune_parts.training import Run, evaluate, train

# An adapter has learned if its held-out loss is this much, in nats per byte, below the base's.
MARGIN = 0.05
TOO_SHORT = " If the run is too short to learn, --no-check-learning leaves this out."
HALVES = {"prose": 0.5, "table": 0.5}


def pretrain(bench: Bench, path: Path) -> None:
    """Train the base model on code and save it with its losses: in one process, for all."""
    plan = bench.plan("code", bench.options.pretrain_steps, FULL_RATE)
    model = MiniMind(config(bench.options)).to(bench.options.device)
    with threads(bench.ranks.threads()):
        run = train(model, model.parameters(), bench.texts["code"], plan, "pre-train on code")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    torch.save({"model": model.state_dict(), "losses": run.training}, unfinished)
    unfinished.replace(path)


def adapt(bench: Bench, base: MiniMind, path: Path) -> tuple[MiniMind, dict[str, Run]]:
    """Inject an adapter, add another, train one, then the other; switch. `path` has the base."""
    options = bench.options
    runs, plans = {}, {"prose": bench.plan("prose", options.steps, options.rate)}
    model = lorafx.inject(base, options.rank, targets=options.targets, adapter="prose")
    bench.check(torch.equal(bench.logits(model), bench.logits(frozen(base))),
                "injection changes no output")
    plans["table"] = bench.plan("table", options.steps, options.rate)
    lorafx.add(model, "table", options.rank)
    bench.ranks.shard(model)  # with the adapters in it
    for name, plan in plans.items():
        lorafx.activate(model, name)
        keeper = AdapterKeeper(options, bench.ranks, model, name, path)
        runs[name] = train(model, lorafx.parameters(model), bench.texts[name], plan,
                           f"LoRA on {name}", keeper, bench.ranks)
    for name in ("prose", "table", "prose"):
        lorafx.activate(model, name)
        bench.check(evaluate(model, bench.windows(name)) == runs[name].held_out[-1][1],
                    f"switched back to {name}, the model has the loss it had after training")
    return model, runs


def save_and_load(bench: Bench, model: MiniMind, runs: Mapping[str, Run],
                  path: Path) -> MiniMind:
    """Bring both adapters through files, in both formats, into a fresh base."""
    loaded = fresh_base(bench, path)
    for name, run in runs.items():
        native = bench.options.out / "lora" / f"{name}_{bench.options.hidden}.safetensors"
        minimind = native.with_suffix(".pth")
        bench.ranks.save(model, native, name)
        bench.ranks.save(model, minimind, name)
        loaded = lorafx.load(loaded, native)
        rounded = lorafx.load(fresh_base(bench, path), minimind)
        saved = [whole(tensor) for tensor in lorafx.parameters(model, name)]
        bench.check(equal(lorafx.parameters(loaded, name), saved),
                    f"{native.name} holds {name} bit for bit")
        halves = (tensor.half().float() for tensor in saved)
        bench.check(equal(lorafx.parameters(rounded), halves),
                    f"{minimind.name} holds {name} rounded to float16")
        lorafx.activate(loaded, name)
        trainable = sum(tensor.numel() for tensor in saved)
        bench.add_row(f"LoRA on {name}", loaded, native, run, trainable)
        lorafx.activate(model, name)
        bench.check(bench.rows[f"LoRA on {name}"]["loss"] == bench.losses(model),
                    f"{name} loaded loses the same")
    return loaded


def compose(bench: Bench, model: MiniMind) -> None:
    """Use half of each adapter, and make that one adapter."""
    lorafx.activate(model, HALVES)
    together = bench.logits(model)
    lorafx.compose(model, HALVES, "both")
    lorafx.activate(model, "both")
    bench.check(close(bench.logits(model), together),
                "one composed adapter computes what both halves do")
    file = bench.options.out / "lora" / f"both_{bench.options.hidden}.safetensors"
    bench.ranks.save(model, file)
    bench.add_row("composed, half of each", model, file)


def merge(bench: Bench, model: MiniMind) -> None:
    """Fold the prose adapter into the weights."""
    lorafx.activate(model, "prose")
    before = bench.logits(model)
    merged = lorafx.merge(model, untie=True)
    bench.check(close(bench.logits(merged), before),
                "merged computes what unmerged does, within rounding")
    bench.check(torch.equal(bench.logits(model), before),
                "merging leaves the injected model as it was")
    bench.check(type(merged) is MiniMind, "the merged model is of the original class")
    bench.add_row("prose merged", merged, save_whole(bench, merged, "prose_merged"))


def full_finetune(bench: Bench, base: MiniMind) -> dict[str, Run]:
    """Train all parameters of a copy on each text, with the batches that the adapter had."""
    runs = {}
    for name in HALVES:
        plan = bench.plan(name, bench.options.steps, FULL_RATE)
        model = copy.deepcopy(base)
        bench.ranks.shard(model)
        runs[name] = train(model, model.parameters(), bench.texts[name], plan, f"full on {name}",
                           ranks=bench.ranks)
        file = save_whole(bench, model, f"{name}_full")
        bench.add_row(f"full on {name}", model, file, runs[name], parameters(model))
    return runs


def check_base(bench: Bench, model: MiniMind, base: MiniMind,
               before: tuple[list[Tensor], list[Any]]) -> None:
    """After everything the base is what it was, and is still what the injected model adds to."""
    now = snapshot(base)
    bench.check(equal(before[0], now[0]),
                "the base's parameters and buffers are unchanged, bit for bit")
    bench.check(before[1] == now[1],
                "the base's names, requires_grad flags and classes are unchanged")
    with lorafx.disabled(model):
        bench.check(torch.equal(bench.logits(model), bench.logits(frozen(base))),
                    "disabled, the model is the base")
    bench.check(equal(snapshot(lorafx.eject(model))[0], before[0]),
                "ejecting gives the base's weights back")


def check_learning(bench: Bench) -> str:
    """Each adapter lowers its own text's loss by more than the other does; this in words."""
    found = []
    for text, other in (("prose", "table"), ("table", "prose")):
        rows = ("base", f"LoRA on {text}", f"LoRA on {other}")
        base, own, foreign = (bench.rows[row]["loss"][text] for row in rows)
        bench.check(own < base - MARGIN,
                    f"the {text} adapter lowers the loss on {text} by over {MARGIN}", TOO_SHORT)
        bench.check(own < foreign - MARGIN,
                    f"the {other} adapter helps {text} less, by over {MARGIN}", TOO_SHORT)
        found.append(f"on {text} the base loses {base:.3f}, its own adapter {own:.3f}, the other "
                     f"one {foreign:.3f}")
    return "Each adapter learned its own text: " + "; ".join(found) + "."
