"""The stages of the fine-tuning benchmark; each checks what it made against what the stage before it left."""

import argparse
import copy
import dataclasses
import platform
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from keep import Keep
from minimind import Config, MiniMind
from texts import Text
from torch import Tensor, nn
from training import Plan, Run, evaluate, train

import lorafx

# AdamW's rate when all parameters train; at 1e-3 and 2e-3 full fine-tuning learned less in as many steps.
FULL_RATE = 3e-3
# An adapter has learned if its held-out loss is this much, in nats per byte, below the base's.
MARGIN = 0.05
TOO_SHORT = " If the run is too short to learn, --no-check-learning leaves this out."
PHASES = {"code": 1, "prose": 2, "table": 3}
HALVES = {"prose": 0.5, "table": 0.5}


@dataclasses.dataclass
class Bench:
    """The options and texts of one benchmark, the claims that were checked, and a row of results for each model."""

    options: argparse.Namespace
    texts: Mapping[str, Text]
    checks: list[str] = dataclasses.field(default_factory=list)
    rows: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def check(self, holds: bool, claim: str, hint: str = "") -> None:
        """Note that a claim holds, or fail."""
        if not holds:
            raise AssertionError(f"This should hold and does not: {claim}.{hint}")
        self.checks.append(claim)

    def plan(self, text: str, steps: int, rate: float) -> Plan:
        """How to train on a text. Seeds torch too, so that no phase depends on which ran before it."""
        seed = 10 * self.options.seed + PHASES[text]
        torch.manual_seed(seed)
        return Plan(steps, rate, seed, self.options.batch, self.options.length)

    def windows(self, text: str) -> Tensor:
        """The held-out windows of a text: (count, length + 1)."""
        return self.texts[text].evaluation(self.options.length).to(self.options.device)

    def losses(self, model: MiniMind) -> dict[str, float]:
        """The held-out loss on each text."""
        return {text: evaluate(model, self.windows(text)) for text in self.texts}

    def logits(self, model: MiniMind) -> Tensor:
        """What the model computes from the held-out prose: (count, length, vocabulary)."""
        with torch.no_grad():
            return model(self.windows("prose")[:, :-1]).logits

    def add_row(self, name: str, model: MiniMind, file: Path, run: Run | None = None,
                trainable: int | None = None) -> None:
        """Add a model's results."""
        self.rows[name] = {"loss": self.losses(model), "trainable": trainable, "parameters": parameters(model),
                           "bytes": file.stat().st_size, "seconds": run and run.seconds, "memory": run and run.memory}


def config(options: argparse.Namespace) -> Config:
    """The base model's sizes."""
    return Config(hidden=options.hidden, layers=options.layers, heads=4, kv_heads=2, max_length=4 * options.length)


def checkpoint(bench: Bench) -> Path:
    """The file of the pre-trained model: its name says all that the weights depend on."""
    o = bench.options
    rest = zlib.crc32(repr((bench.texts["code"].checksum, FULL_RATE, config(o))).encode())
    where = o.device if o.device != "cpu" else f"cpu{torch.get_num_threads()}"  # threads decide the order of sums
    return o.checkpoints / (f"minimind_{o.hidden}x{o.layers}_steps{o.pretrain_steps}_batch{o.batch}x{o.length}"
                            f"_seed{o.seed}_python{platform.python_version()}_torch{torch.__version__}"
                            f"_{where.replace(':', '')}_{rest:08x}.pth")


def pretrain(bench: Bench, path: Path) -> None:
    """Train the base model on code and save it with its losses."""
    plan = bench.plan("code", bench.options.pretrain_steps, FULL_RATE)
    model = MiniMind(config(bench.options)).to(bench.options.device)
    run = train(model, model.parameters(), bench.texts["code"], plan, "pre-train on code")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    torch.save({"model": model.state_dict(), "losses": run.training}, unfinished)
    unfinished.replace(path)


def fresh_base(bench: Bench, path: Path) -> MiniMind:
    """The pre-trained model, as another process would load it."""
    model = MiniMind(config(bench.options))
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["model"])
    return model.to(bench.options.device).eval()


def adapt(bench: Bench, base: MiniMind, path: Path) -> tuple[MiniMind, dict[str, Run]]:
    """Inject one adapter and train it, add the other and train that; then switch to and fro. `path` has the base."""
    options, runs = bench.options, {}
    plan = bench.plan("prose", options.steps, options.rate)
    model = lorafx.inject(base, options.rank, targets=options.targets, adapter="prose")
    bench.check(torch.equal(bench.logits(model), bench.logits(frozen(base))), "injection changes no output")
    runs["prose"] = train(model, lorafx.parameters(model), bench.texts["prose"], plan, "LoRA on prose",
                          Keep(options, model, "prose", path))
    plan = bench.plan("table", options.steps, options.rate)
    lorafx.add(model, "table", options.rank)
    lorafx.activate(model, "table")
    runs["table"] = train(model, lorafx.parameters(model), bench.texts["table"], plan, "LoRA on table",
                          Keep(options, model, "table", path))
    for name in ("prose", "table", "prose"):
        lorafx.activate(model, name)
        bench.check(evaluate(model, bench.windows(name)) == runs[name].held_out[-1][1],
                    f"switched back to {name}, the model has the loss it had after training")
    return model, runs


def save_and_load(bench: Bench, model: MiniMind, runs: Mapping[str, Run], path: Path) -> MiniMind:
    """Bring both adapters through files, in both formats, into a fresh base."""
    loaded = fresh_base(bench, path)
    for name, run in runs.items():
        native = bench.options.out / "lora" / f"{name}_{bench.options.hidden}.safetensors"
        minimind = native.with_suffix(".pth")
        lorafx.save(model, native, name)
        lorafx.save(model, minimind, name)
        loaded, rounded = lorafx.load(loaded, native), lorafx.load(fresh_base(bench, path), minimind)
        saved = list(lorafx.parameters(model, name))
        bench.check(equal(lorafx.parameters(loaded, name), saved), f"{native.name} holds {name} bit for bit")
        bench.check(equal(lorafx.parameters(rounded), (tensor.half().float() for tensor in saved)),
                    f"{minimind.name} holds {name} rounded to float16")
        lorafx.activate(loaded, name)
        bench.add_row(f"LoRA on {name}", loaded, native, run, sum(tensor.numel() for tensor in saved))
        lorafx.activate(model, name)
        bench.check(bench.rows[f"LoRA on {name}"]["loss"] == bench.losses(model), f"{name} loaded loses the same")
    return loaded


def compose(bench: Bench, model: MiniMind) -> None:
    """Use half of each adapter, and make that one adapter."""
    lorafx.activate(model, HALVES)
    together = bench.logits(model)
    lorafx.compose(model, HALVES, "both")
    lorafx.activate(model, "both")
    bench.check(close(bench.logits(model), together), "one composed adapter computes what both halves do")
    file = bench.options.out / "lora" / f"both_{bench.options.hidden}.safetensors"
    lorafx.save(model, file)
    bench.add_row("composed, half of each", model, file)


def merge(bench: Bench, model: MiniMind) -> None:
    """Fold the prose adapter into the weights."""
    lorafx.activate(model, "prose")
    before = bench.logits(model)
    merged = lorafx.merge(model, untie=True)
    bench.check(close(bench.logits(merged), before), "merged computes what unmerged does, within rounding")
    bench.check(torch.equal(bench.logits(model), before), "merging leaves the injected model as it was")
    bench.check(type(merged) is MiniMind, "the merged model is of the original class")
    bench.add_row("prose merged", merged, save_whole(bench, merged, "prose_merged"))


def full_finetune(bench: Bench, base: MiniMind) -> dict[str, Run]:
    """Train all parameters of a copy on each text, with the batches that the adapter had."""
    runs = {}
    for name in HALVES:
        plan = bench.plan(name, bench.options.steps, FULL_RATE)
        model = copy.deepcopy(base)
        runs[name] = train(model, model.parameters(), bench.texts[name], plan, f"full on {name}")
        bench.add_row(f"full on {name}", model, save_whole(bench, model, f"{name}_full"), runs[name], parameters(model))
    return runs


def save_whole(bench: Bench, model: MiniMind, name: str) -> Path:
    """Write all weights of a model to a file."""
    path = bench.options.out / f"{name}_{bench.options.hidden}.pth"
    torch.save(model.state_dict(), path)
    return path


def parameters(model: nn.Module) -> int:
    """The number of a model's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def frozen(model: MiniMind) -> MiniMind:
    """A copy that trains nothing: which kernels torch picks, and so the last bit, can depend on requires_grad."""
    return copy.deepcopy(model).requires_grad_(False)


def snapshot(model: nn.Module) -> tuple[list[Tensor], list[Any]]:
    """Copies of all tensors of a model; their names and requires_grad flags, and the modules' classes."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    return ([tensor.detach().clone() for tensor in tensors.values()],
            [*((name, tensor.requires_grad) for name, tensor in tensors.items()), *map(type, model.modules())])


def equal(some: Any, others: Any) -> bool:
    """Whether two series of tensors are the same, bit for bit."""
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def close(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors differ by no more than float32 rounding, relative to the largest value."""
    return bool((one - other).abs().max() <= 2e-5 * other.abs().max())


def check_base(bench: Bench, model: MiniMind, base: MiniMind, before: tuple[list[Tensor], list[Any]]) -> None:
    """After everything the base is what it was, and is still what the injected model adds to."""
    now = snapshot(base)
    bench.check(equal(before[0], now[0]), "the base's parameters and buffers are unchanged, bit for bit")
    bench.check(before[1] == now[1], "the base's names, requires_grad flags and classes are unchanged")
    with lorafx.disabled(model):
        bench.check(torch.equal(bench.logits(model), bench.logits(frozen(base))), "disabled, the model is the base")
    bench.check(equal(snapshot(lorafx.eject(model))[0], before[0]), "ejecting gives the base's weights back")


def check_learning(bench: Bench) -> str:
    """Each adapter lowers the loss on its own text, and by more than the other adapter does; returns this in words."""
    said = []
    for text, other in (("prose", "table"), ("table", "prose")):
        base, own, foreign = (bench.rows[row]["loss"][text] for row in ("base", f"LoRA on {text}", f"LoRA on {other}"))
        bench.check(own < base - MARGIN, f"the {text} adapter lowers the loss on {text} by over {MARGIN}", TOO_SHORT)
        bench.check(own < foreign - MARGIN, f"the {other} adapter helps {text} less, by over {MARGIN}", TOO_SHORT)
        said.append(f"on {text} the base loses {base:.3f}, its own adapter {own:.3f}, the other one {foreign:.3f}")
    return "Each adapter learned its own text: " + "; ".join(said) + "."
