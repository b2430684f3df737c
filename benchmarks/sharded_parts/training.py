"""What all set-ups train: a small MiniMind with an adapter, five steps of AdamW, in one process."""

import dataclasses
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import lorafx
from common.counting import local
from common.minimind import MiniMind
from common.minimind_layers import Config
from sharded_parts.traffic import Kind, Traffic

CONFIG = Config(hidden=64, layers=4, heads=4, kv_heads=4, max_length=32)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, STEPS, BATCH, LENGTH, RATE = 8, 5, 8, 20, 1e-2


@dataclasses.dataclass
class Found:
    """What a set-up gave in its first process."""

    processes: int
    losses: list[float]
    traffic: dict[str, int] = dataclasses.field(default_factory=dict)  # {kind: bytes of a step}
    held: int = 0  # bytes of parameters between steps
    most: int = 0


def base() -> MiniMind:
    """The same weights in every process."""
    torch.manual_seed(0)
    return MiniMind(CONFIG)


def adapted(model: nn.Module | None = None) -> Any:
    """With an adapter at every linear layer of the blocks, the same in every process."""
    model = base() if model is None else model
    torch.manual_seed(1)
    return lorafx.inject(model, RANK, targets=TARGETS)


def adapter_bytes() -> int:
    """Those of A and B at all sites."""
    return sum(parameter.nbytes for parameter in lorafx.parameters(adapted()))


def batches() -> list[Tensor]:
    """Tokens (BATCH, LENGTH + 1) of each step, of all processes together: always the same."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(CONFIG.vocabulary, (BATCH, LENGTH + 1), generator=generator)
    return [tokens] * STEPS


def loss_of(logits: Tensor, next_tokens: Tensor) -> Tensor:
    """The mean of -log p(next token)."""
    return F.cross_entropy(logits.flatten(0, 1).float(), next_tokens.flatten())


def part(tokens: Tensor, of: int) -> Tensor:
    """The rows of this process, where groups of processes share a batch with `of` others."""
    return tokens.chunk(of)[dist.get_rank() * of // dist.get_world_size()]


def train(model: nn.Module, split: int = 1, parameters: Iterable[nn.Parameter] | None = None,
          forward: Callable[[Tensor], Any] | None = None, processes: int | None = None) -> Found:
    """Five steps; a batch is split into so many parts. The last step's bytes are counted.

    `forward` is what is called, if that is not the model itself.
    """
    forward = forward or model
    optimizer = torch.optim.AdamW(list(parameters or lorafx.parameters(model)), lr=RATE)
    found = Found(processes or dist.get_world_size(), [])
    traffic = Traffic(model)
    for step, tokens in enumerate(batches(), 1):
        tokens = part(tokens, split)
        with traffic if step == STEPS else nullcontext():
            loss = loss_of(forward(tokens[:, :-1]).logits, tokens[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found.losses.append(mean(loss))
    return with_counts(found, traffic)


def with_counts(found: Found, traffic: Traffic) -> Found:
    """Put in what was counted."""
    found.traffic = {kind.value: traffic.bytes[kind] for kind in Kind}
    found.held, found.most = traffic.held.bytes, traffic.held.most
    return found


def mean(loss: Tensor) -> float:
    """Over all processes."""
    total = local(loss.detach()).clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()
