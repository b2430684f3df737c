"""Keeps the training of an adapter on the disk, so that another process can go on with it."""

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

import lorafx
from common.minimind import MiniMind
from finetune_parts.ranks import Ranks
from finetune_parts.training import Run

# What decides neither what is trained nor on what: these may differ between the run that was
# stopped and this one.
FREE = ("out", "checkpoints", "check_learning", "resume", "save_every", "parallel")


def folder(options: argparse.Namespace) -> Path:
    """Where unfinished training is kept; gone after a run that comes to its end."""
    path: Path = options.out / "unfinished"
    return path


def forget(options: argparse.Namespace) -> None:
    """Remove what is kept."""
    shutil.rmtree(folder(options), ignore_errors=True)


class AdapterKeeper:
    """The training of one adapter: a file by lorafx.save, and its Run so far beside it.

    The Run is written first, and so may be ahead of the adapter if the process dies in between; it
    is cut to fit.
    """

    def __init__(self, options: argparse.Namespace, ranks: Ranks, model: MiniMind, adapter: str,
                 base: Path) -> None:
        self.options, self.ranks, self.model, self.adapter = options, ranks, model, adapter
        self.path = folder(options) / f"{adapter}.safetensors"
        self.made_with = {"base": base.name}
        for name, value in vars(options).items():
            if name not in FREE:
                self.made_with[name] = str(value)

    def load(self, optimizer: torch.optim.Optimizer) -> tuple[int, Run, list[float]]:
        """Put adapter, optimizer, random numbers back: the steps done, the Run, their seconds."""
        if not (self.options.resume and self.path.exists()):
            return 0, Run(), []
        record: dict[str, Any] = json.loads(self.path.with_suffix(".json").read_text())
        for name, value in record["made_with"].items():
            if self.made_with.get(name) != value:
                raise SystemExit(
                    f"{self.path} was trained with {name} = {value}, not "
                    f"{self.made_with.get(name)}: resume with the options of the run that was "
                    "stopped, or start anew without --resume.")
        step = lorafx.resume(self.model, optimizer, self.path, self.adapter)
        held_out = [(at, loss) for at, loss in record["held_out"] if at <= step]
        run = Run(record["training"][:step], held_out, memory=record["memory"])
        self.ranks.say(f"Resumed {self.adapter} after step {step}.")
        return step, run, record["seconds"][:step]

    def save(self, optimizer: torch.optim.Optimizer, step: int, run: Run,
             seconds: list[float]) -> None:
        """Keep the training after this step, if it is one of those after which it is kept."""
        if step % self.options.save_every and step != self.options.steps:
            return
        record = vars(run) | {"seconds": seconds, "made_with": self.made_with}
        if self.ranks.first:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = self.path.with_suffix(".tmp")
            unfinished.write_text(json.dumps(record))
            os.replace(unfinished, self.path.with_suffix(".json"))
        self.ranks.save(self.model, self.path, self.adapter, optimizer=optimizer, step=step)
