"""The processes that train together: those that torchrun started, or this one alone."""

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import lorafx
from common.minimind import MiniMind, Output

WAYS = ("ddp", "fsdp2")
Forward = Callable[[Tensor], Output]


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Which of `count` processes this is, and the way in which they train one model."""

    rank: int = 0
    count: int = 1
    way: str = "ddp"

    @property
    def first(self) -> bool:
        """True in the process that prints and writes for all."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """True if no process holds all of a model that is trained."""
        return self.count > 1 and self.way == "fsdp2"

    def say(self, text: str) -> None:
        """Print, once for all."""
        if self.first:
            print(text)

    def first_does(self, work: Callable[[], None]) -> None:
        """Work that is done once for all, who wait for its end."""
        if self.first:
            work()
        if self.count > 1:
            dist.barrier()

    def save(self, model: MiniMind, path: Path, adapter: str | None = None,
             **training: Any) -> None:
        """lorafx.save: every process of a sharded model calls it, and of others the first."""
        save = partial(lorafx.save, model, path, adapter, **training)
        if self.sharded:
            save()
            self.first_does(lambda: None)
        else:
            self.first_does(save)

    def shard(self, model: MiniMind) -> None:
        """Leave to each process its part of the weights, if that is the way."""
        if self.sharded:
            # Of keys and values for a cache, which nothing changes in place.
            warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(FSDPBlock\) returned a view")
            mesh = dist.init_device_mesh(model.embedding.weight.device.type, (self.count,))
            for layer in model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)

    def forward(self, model: MiniMind) -> Forward:
        """What a training step calls, so that gradients are the mean over all processes."""
        if self.count == 1 or self.sharded:
            return model
        return DistributedDataParallel(model)

    def part(self, windows: Tensor) -> Tensor:
        """This process's part of a batch: (batch / count, length + 1) of (batch, length + 1)."""
        return windows.chunk(self.count)[self.rank]

    def mean(self, loss: Tensor) -> float:
        """The mean loss over all parts of a batch."""
        total = loss.clone()
        if self.count > 1:
            dist.all_reduce(total)
        return total.item() / self.count

    def threads(self) -> int:
        """Those of all processes together: as many as one process would use."""
        return self.count * torch.get_num_threads()


@contextmanager
def together(way: str, device: str, batch: int) -> Iterator[Ranks]:
    """Join the processes that torchrun started, which share each batch equally."""
    joining = dist.is_torchelastic_launched() and not dist.is_initialized()
    if joining:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    if dist.is_initialized():
        ranks = Ranks(dist.get_rank(), dist.get_world_size(), way)
    else:
        ranks = Ranks(way=way)
    if device == "cuda" and ranks.count > 1:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        if batch % ranks.count:
            raise SystemExit(f"{ranks.count} processes cannot share a batch of {batch} equally: "
                             f"--batch {batch // ranks.count * ranks.count or ranks.count} does.")
        yield ranks
    finally:
        if joining:
            dist.destroy_process_group()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; where it is sharded, every process asks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
