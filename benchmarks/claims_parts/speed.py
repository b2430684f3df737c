"""Times a step of full fine-tuning beside steps of LoRA on the same model, in alternating rounds.

A step is a forward pass, a backward pass and AdamW of all that trains. Of the three products with W
that full fine-tuning makes, x W^T, dY W and dY^T x, LoRA leaves out the third: where products take
all the time, it is 1.5 times faster at the most. AdamW of every weight is what it saves beside
that, and counts where a step has few tokens. The time is one thread's of the processor, so that
other programs do not count. Memory is what a step holds at its peak beyond the model, with AdamW's
moments, counted exactly.
"""

import copy
import dataclasses
import time

import torch
import torch.nn.functional as F
from torch import nn

import lorafx
from common import timing
from common.counting import held_bytes
from common.minimind import Config, MiniMind

MODEL = Config(hidden=512, layers=8, heads=8, kv_heads=2, vocabulary=6400)  # 26M
TOKENS = (16, 128, 1024)  # a step, in sequences of at most 256
FULL = "full fine-tuning"
METHODS: dict[str, str | None] = {FULL: None, "square": "square", "all linears": "linear"}


@dataclasses.dataclass(frozen=True)
class Step:
    """One method at one number of tokens: its median time, and how many times faster than FULL.

    `memory` is in bytes.
    """

    tokens: int
    method: str
    trains: int
    memory: int
    seconds: float
    faster: timing.Interval


class Training:
    """Full fine-tuning, or LoRA at these targets, on tokens (batch, length)."""

    def __init__(self, base: nn.Module, targets: str | None, tokens: torch.Tensor) -> None:
        self.tokens = tokens
        if targets is None:
            self.model = copy.deepcopy(base)
            self.trained = list(self.model.parameters())
        else:
            self.model = lorafx.inject(base, 8, targets=targets)
            self.trained = list(lorafx.parameters(self.model))
        self.trains = sum(parameter.numel() for parameter in self.trained)
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4)

    def step(self) -> None:
        """Forward, backward, AdamW."""
        logits = self.model(self.tokens).logits  # (batch, length, vocabulary)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), self.tokens[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def memory(self) -> int:
        """Bytes at the peak of a step, after the first."""
        moments = 0
        for state in self.optimizer.state.values():
            moments += state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes
        return moments + held_bytes(self.step, torch.device("cpu")).most

    def seconds(self) -> float:
        """Of a step, of this thread's processor time."""
        began = time.thread_time()
        self.step()
        return time.thread_time() - began


def steps(config: Config, counts: tuple[int, ...], rounds: int) -> list[Step]:
    """All methods at each number of tokens, in one thread."""
    torch.manual_seed(0)
    base, found = MiniMind(config), []
    for count in counts:
        tokens = torch.randint(config.vocabulary, (max(count // 256, 1), min(count, 256)))
        made = {name: Training(base, targets, tokens) for name, targets in METHODS.items()}
        with timing.threads(1):
            for training in made.values():
                training.step()
            times = timing.interleaved({name: each.seconds for name, each in made.items()}, rounds)
        for name, training in made.items():
            faster = timing.ratio(times[FULL], times[name])
            seconds = timing.median(times[name])
            found.append(
                Step(count, name, training.trains, training.memory(), seconds, faster))
    return found
