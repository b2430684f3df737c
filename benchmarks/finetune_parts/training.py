"""Training and evaluation of a byte-level MiniMind, with what a step costs; no word of lorafx."""

import dataclasses
import time
from collections.abc import Iterable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.counting import held_bytes, local
from common.minimind import MiniMind
from common.progress import progress
from finetune_parts.ranks import Forward, Ranks
from finetune_parts.texts import Text


@dataclasses.dataclass(frozen=True)
class Plan:
    """How AdamW trains: its rate rises to `rate` in a tenth of the steps, then falls to 0."""

    steps: int
    rate: float
    seed: int
    batch: int
    length: int
    evaluations: int = 10

    def factor(self, step: int) -> float:
        """What the learning rate is multiplied by at a step."""
        return min((step + 1) / max(1, self.steps // 10), 1 - step / self.steps)

    def evaluated(self, step: int) -> bool:
        """Whether the held-out loss is taken after this many steps."""
        return step == self.steps or step % max(1, self.steps // self.evaluations) == 0


@dataclasses.dataclass
class Run:
    """What a training run gave: the loss of each batch, (step, held-out loss), the cost of a step.

    `seconds` is the median over the steps after the first. `memory` is in bytes, beyond the model
    itself: on a CPU the tensors saved for the backward pass, the gradients and the optimizer's
    state, each counted exactly; on a GPU the highest that torch allocated.
    """

    training: list[float] = dataclasses.field(default_factory=list)
    held_out: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    memory: dict[str, int] = dataclasses.field(default_factory=dict)


def loss_of(forward: Forward, windows: Tensor) -> Tensor:
    """The mean of -log p(next byte) in nats, a scalar: windows (batch, length + 1)."""
    logits = forward(windows[:, :-1]).logits  # (batch, length, vocabulary)
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def evaluate(model: MiniMind, windows: Tensor) -> float:
    """The loss in eval mode and without gradients; the model's mode is put back."""
    training = model.training
    model.eval()
    with torch.no_grad():
        loss = loss_of(model, windows).item()
    model.train(training)
    return loss


class Keeper(Protocol):
    """Where a training run is kept while it lasts, and from where it is continued."""

    def load(self, optimizer: torch.optim.Optimizer) -> tuple[int, Run, list[float]]:
        """Put back what was kept: the steps done, the Run so far and the seconds of each step."""

    def save(self, optimizer: torch.optim.Optimizer, step: int, run: Run,
             seconds: list[float]) -> None:
        """Called after each step."""


def train(model: MiniMind, parameters: Iterable[nn.Parameter], text: Text, plan: Plan, label: str,
          keeper: Keeper | None = None, ranks: Ranks = Ranks()) -> Run:
    """Train these parameters on a text, from where the keeper is; equal seeds, equal batches.

    Several processes share each batch, and each takes the held-out loss by itself.
    """
    device = model.embedding.weight.device
    held_out = text.evaluation(plan.length).to(device)  # (count, length + 1)
    optimizer = torch.optim.AdamW(list(parameters), plan.rate)
    done, run, seconds = (0, Run(), list[float]()) if keeper is None else keeper.load(optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, plan.factor, last_epoch=done - 1)
    generator = torch.Generator().manual_seed(plan.seed)
    for _ in range(done):
        text.batch(plan.batch, plan.length, generator)
    if not done:
        run.held_out = [(0, evaluate(model, held_out))]
    model.train()
    forward = ranks.forward(model)
    start = gpu_start(device)
    with progress(total=plan.steps, initial=done, desc=label, unit="step",
                  disable=not ranks.first) as bar:
        for step in range(done + 1, plan.steps + 1):
            windows = ranks.part(text.batch(plan.batch, plan.length, generator)).to(device)
            began = time.perf_counter()
            loss = advance(model, forward, windows, optimizer, run if step == 1 else None)
            run.training.append(ranks.mean(loss))
            seconds.append(time.perf_counter() - began)
            schedule.step()
            if plan.evaluated(step):
                run.held_out.append((step, evaluate(model, held_out)))
            if keeper is not None:
                keeper.save(optimizer, step, run, seconds)
            bar.set_postfix(loss=f"{run.training[-1]:.3f}",
                            held_out=f"{run.held_out[-1][1]:.3f}", refresh=False)
            bar.update()
    run.seconds = sorted(seconds[1:] or seconds)[len(seconds[1:]) // 2]
    if device.type == "cuda":
        run.memory = {"peak allocated": torch.cuda.max_memory_allocated(device) - start}
    model.eval()
    return run


def gpu_start(device: torch.device) -> int:
    """The bytes that torch has allocated on a GPU before training, from which its peak counts."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def advance(model: MiniMind, forward: Forward, windows: Tensor, optimizer: torch.optim.Optimizer,
            measured: Run | None) -> Tensor:
    """One step on windows (batch, length + 1): its loss. `measured` gets the bytes it holds."""
    optimizer.zero_grad()
    if measured is None:
        loss = loss_of(forward, windows)
    else:
        losses: list[Tensor] = []
        held = held_bytes(lambda: losses.append(loss_of(forward, windows)), windows.device)
        loss = losses.pop()
    loss.backward()
    optimizer.step()
    if measured is not None:
        measured.memory = {"saved for backward": held.after, **optimizer_bytes(optimizer)}
    return loss.detach()


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """The bytes of the gradients of an optimizer's parameters, and of its state."""
    gradients = state = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradients += 0 if parameter.grad is None else local(parameter.grad).nbytes
    for entry in optimizer.state.values():
        values: list[Any] = list(entry.values())
        state += sum(local(value).nbytes for value in values if isinstance(value, Tensor))
    return {"gradients": gradients, "optimizer": state}
