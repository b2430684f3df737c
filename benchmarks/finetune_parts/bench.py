"""What all stages of the fine-tuning benchmark share: options, texts, checks, rows of results."""

import argparse
import copy
import dataclasses
import platform
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.minimind import MiniMind
from common.minimind_layers import Config
from finetune_parts.ranks import Ranks, whole
from finetune_parts.texts import Text
from finetune_parts.training import Plan, Run, evaluate

# AdamW's rate when all parameters train; at 1e-3 and 2e-3 full fine-tuning learned less in as many
# steps.
FULL_RATE = 3e-3
PHASES = {"code": 1, "prose": 2, "table": 3}


@dataclasses.dataclass
class Bench:
    """The options and texts of one run, the claims checked so far, and a row for each model.

    Each of the processes that run it together has one, with the same in it.
    """

    options: argparse.Namespace
    texts: Mapping[str, Text]
    ranks: Ranks = Ranks()
    checks: list[str] = dataclasses.field(default_factory=list)
    rows: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def check(self, holds: bool, claim: str, hint: str = "") -> None:
        """Note that a claim holds, or fail."""
        if not holds:
            raise AssertionError(f"This should hold and does not: {claim}.{hint}")
        self.checks.append(claim)

    def plan(self, text: str, steps: int, rate: float) -> Plan:
        """How to train on a text. Seeds torch too: no phase depends on which ran before it."""
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
        self.rows[name] = {
            "loss": self.losses(model), "trainable": trainable, "parameters": parameters(model),
            "bytes": file.stat().st_size, "seconds": run and run.seconds,
            "memory": run and run.memory}


def config(options: argparse.Namespace) -> Config:
    """The base model's sizes."""
    return Config(hidden=options.hidden, layers=options.layers, heads=4, kv_heads=2,
                  max_length=4 * options.length)


def checkpoint(bench: Bench) -> Path:
    """The file of the pre-trained model: its name says all that the weights depend on."""
    o = bench.options
    rest = repr((bench.texts["code"].checksum, FULL_RATE, config(o)))
    # The number of threads decides the order of sums.
    where = o.device if o.device != "cpu" else f"cpu{bench.ranks.threads()}"
    return o.checkpoints / (
        f"minimind_{o.hidden}x{o.layers}_steps{o.pretrain_steps}_batch{o.batch}x{o.length}"
        f"_seed{o.seed}_python{platform.python_version()}_torch{torch.__version__}"
        f"_{where.replace(':', '')}_{zlib.crc32(rest.encode()):08x}.pth")


def fresh_base(bench: Bench, path: Path) -> MiniMind:
    """The pre-trained model, as another process would load it."""
    model = MiniMind(config(bench.options))
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["model"])
    return model.to(bench.options.device).eval()


def save_whole(bench: Bench, model: MiniMind, name: str) -> Path:
    """Write all weights of a model to a file."""
    path: Path = bench.options.out / f"{name}_{bench.options.hidden}.pth"
    weights = {key: whole(tensor) for key, tensor in model.state_dict().items()}
    bench.ranks.first_does(partial(torch.save, weights, path))
    return path


def parameters(model: nn.Module) -> int:
    """The number of a model's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def frozen(model: MiniMind) -> MiniMind:
    """A copy that trains nothing: kernels, and so the last bit, can depend on requires_grad."""
    return copy.deepcopy(model).requires_grad_(False)


def snapshot(model: nn.Module) -> tuple[list[Tensor], list[Any]]:
    """Copies of a model's tensors; their names and requires_grad flags, the modules' classes."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    copies = [tensor.detach().clone() for tensor in tensors.values()]
    flags = [(name, tensor.requires_grad) for name, tensor in tensors.items()]
    return copies, [*flags, *map(type, model.modules())]


def equal(some: Any, others: Any) -> bool:
    """Whether two series of tensors are the same, bit for bit."""
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def close(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors differ by float32 rounding at most, relative to the largest value."""
    return bool((one - other).abs().max() <= 2e-5 * other.abs().max())
