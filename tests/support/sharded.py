"""A small decoder, five steps of AdamW on it, and the same in one process to compare with."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import lorafx
from tests.support.communication import Communication

VOCABULARY, WIDTH, STEPS = 32, 16, 5


class Layer(nn.Module):
    """Attention with query, key and value of one x, and a feed-forward, both with residuals."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.o = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = self.q(h), self.k(h), self.v(h)
        heads = [part.unflatten(-1, (-1, 4)).transpose(1, 2) for part in (q, k, v)]
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(-2))
        return x + self.down(F.silu(self.up(x)))


class Decoder(nn.Module):
    """tokens (batch, length) -> logits (batch, length, vocabulary)."""

    def __init__(self, width: int = WIDTH, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def decoder() -> Decoder:
    """The same weights in every process."""
    torch.manual_seed(1)
    return Decoder()


def adapted(base: nn.Module | None = None, **config: Any) -> Any:
    """A decoder with an adapter that is not zero, the same in every process."""
    torch.manual_seed(2)
    model = lorafx.inject(base or decoder(), **{"targets": "linear", "rank": 4, **config})
    draw(model)
    return model


def draw(model: nn.Module, std: float = 0.1) -> None:
    """Give the active adapters random values, of plain tensors, as if they had been trained."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in lorafx.parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=std)


def batches() -> list[Tensor]:
    """Tokens (8, 6) for each step, of all processes together."""
    generator = torch.Generator().manual_seed(4)
    return list(torch.randint(VOCABULARY, (STEPS, 8, 6), generator=generator))


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """The mean loss of the next token."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def train(
    model: Callable[[Tensor], Tensor], parameters: Iterable[nn.Parameter], split: bool = True,
    optimizer: torch.optim.Optimizer | None = None, steps: slice = slice(None),
) -> list[float]:
    """Losses of all processes together in five steps of AdamW, or in these of the five.

    `split`: each process has its part of a batch, and not all of it.
    """
    optimizer = optimizer or torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for tokens in batches()[steps]:
        if split:
            tokens = tokens.chunk(dist.get_world_size())[dist.get_rank()]
        loss = loss_of(model(tokens), tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        if split:
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        losses.append(float(mean))
    return losses


def one_process(model: nn.Module) -> list[float]:
    """The losses of the same steps without any other process."""
    return train(model, lorafx.parameters(model), split=False)


def largest_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """How far two runs are from each other."""
    return max(abs(mine - other) for mine, other in zip(ours, theirs, strict=True))


@contextmanager
def shared_folder() -> Iterator[Path]:
    """A folder of all processes, deleted at the end."""
    with tempfile.TemporaryDirectory() as own:
        found = [own]
        dist.broadcast_object_list(found)
        yield Path(found[0])
        dist.barrier()


def assert_same_file(path: Path, other: Path, **tolerance: float) -> None:
    """Two files of lorafx differ in the values of their tensors at most, and those by little."""
    with safe_open(path, "pt") as ours, safe_open(other, "pt") as theirs:
        assert ours.metadata() == theirs.metadata()
        assert list(ours.keys()) == list(theirs.keys())
        for name in ours.keys():
            expected = theirs.get_tensor(name)
            if tolerance and expected.is_floating_point():
                torch.testing.assert_close(ours.get_tensor(name), expected, **tolerance)
            else:
                assert torch.equal(ours.get_tensor(name), expected)


def count_reduced(model: Any) -> list[int]:
    """The sizes of all gradients that DDP will reduce, as it does so."""
    found: list[int] = []

    def hook(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        found.append(bucket.buffer().numel())
        return allreduce_hook(dist.group.WORLD, bucket)

    model.register_comm_hook(None, hook)
    return found


def reduces_the_adapter_only(model: Any) -> Communication:
    """What a backward pass communicates; asserted: of gradients the bytes of A and B, no more."""
    tokens = batches()[0].chunk(dist.get_world_size())[dist.get_rank()]
    loss = loss_of(model(tokens), tokens)
    with Communication() as communication:
        loss.backward()
    expected = 4 * sum(parameter.numel() for parameter in lorafx.parameters(model))
    assert communication.reduced == expected, (communication.reduced, expected)
    return communication
