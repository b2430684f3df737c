"""The set-ups: how each brings the model to its processes, in the way its users do."""

import functools
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor.parallel import (
    ColwiseParallel, RowwiseParallel, parallelize_module)
from torch.nn.parallel import DistributedDataParallel

from common.minimind import Block, MiniMind
from sharded_parts.traffic import Traffic
from sharded_parts.training import (
    RATE, STEPS, Found, adapted, base, batches, loss_of, train, with_counts)

PLAN = {
    "attention.q_proj": ColwiseParallel(), "attention.k_proj": ColwiseParallel(),
    "attention.v_proj": ColwiseParallel(), "attention.o_proj": RowwiseParallel(),
    "feed_forward.gate_proj": ColwiseParallel(), "feed_forward.up_proj": ColwiseParallel(),
    "feed_forward.down_proj": RowwiseParallel()}


def mesh(*shape: int) -> DeviceMesh:
    """All processes, as a grid: those that share a batch, by those that share a layer."""
    return dist.init_device_mesh("cpu", shape, mesh_dim_names=("data", "layer")[:len(shape)])


def sharded(model: Any, **options: Any) -> Any:
    """Each layer, then the root."""
    # Of keys and values for a cache, which nothing changes in place.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(FSDPBlock\) returned a view")
    for layer in model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def parallel(model: Any, layer_mesh: DeviceMesh) -> Any:
    """The linear layers of each block, split by columns, then by rows."""
    for layer in model.layers:
        parallelize_module(layer, layer_mesh, PLAN)
    return model


@functools.cache
def one() -> Found:
    """One process."""
    return train(adapted(), processes=1)


def ddp() -> Found:
    """Each process has the model."""
    model = adapted()
    return train(model, dist.get_world_size(), forward=DistributedDataParallel(model))


def fsdp2() -> Found:
    """Each process has a part of each weight."""
    return train(sharded(adapted()), dist.get_world_size())


def fsdp2_mixed(count: int | None = None) -> Found:
    """Parameters and activations in bfloat16; reduced in float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    count = count or dist.get_world_size()
    grid = mesh(dist.get_world_size() // count, count)["layer"]
    return train(sharded(adapted(), mp_policy=policy, mesh=grid), count, processes=count)


def one_mixed() -> Found:
    """The same in one process."""
    return fsdp2_mixed(1)


def fsdp1() -> Found:
    """Each process has a part of each row of weights that belong together."""
    model = adapted()
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"),
                                       auto_wrap_policy=ModuleWrapPolicy({Block}))
    return train(wrapped, dist.get_world_size())


def tensor_parallel() -> Found:
    """Each process has a part of each linear layer, and sees all of the batch."""
    return train(parallel(adapted(), mesh(dist.get_world_size())))


def fsdp2_on_tensor_parallel() -> Found:
    """Two processes share a layer, as many pairs as there are a batch."""
    pairs = dist.get_world_size() // 2
    grid = mesh(pairs, 2)
    return train(sharded(parallel(adapted(), grid["layer"]), mesh=grid["data"]), pairs)


class Stage(nn.Module):
    """Some layers of a model, with its beginning and its end where these are."""

    def __init__(self, model: MiniMind, index: int, count: int) -> None:
        super().__init__()
        each = len(model.layers) // count
        self.layers = nn.ModuleList(model.layers[index * each:(index + 1) * each])
        self.embedding = model.embedding if index == 0 else nn.Identity()
        self.norm = model.norm if index == count - 1 else nn.Identity()
        self.head = model.head if index == count - 1 else nn.Identity()
        self.register_buffer("cos", model.cos)
        self.register_buffer("sin", model.sin)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (batch, length), or what the stage before gave."""
        x = self.embedding(x)
        rotation = self.cos[:x.shape[1]], self.sin[:x.shape[1]]
        for layer in self.layers:
            x, _ = layer(x, rotation, None, None)
        logits: Tensor = self.head(self.norm(x))
        return logits


def pipeline() -> Found:
    """Each process has some of the layers."""
    rank, count = dist.get_rank(), dist.get_world_size()
    model = adapted()
    stage = Stage(model, rank, count)
    schedule = ScheduleGPipe(PipelineStage(stage, rank, count, torch.device("cpu")),
                             n_microbatches=4, loss_fn=loss_of)
    trained = [parameter for parameter in stage.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)
    found = Found(count, [])
    traffic = Traffic(stage)
    for step, tokens in enumerate(batches(), 1):
        losses: list[Tensor] = []
        with traffic if step == STEPS else nullcontext():
            optimizer.zero_grad()
            inputs = (tokens[:, :-1].contiguous(),) if rank == 0 else ()
            more = {"target": tokens[:, 1:], "losses": losses} if rank == count - 1 else {}
            schedule.step(*inputs, **more)
            optimizer.step()
        loss = torch.stack(losses).mean().detach() if losses else torch.zeros(())
        dist.all_reduce(loss)
        found.losses.append(loss.item())
    return with_counts(found, traffic)


def offloaded() -> Found:
    """The base's weights wait on the CPU, and are in their places while a layer runs."""
    from accelerate import cpu_offload

    return train(adapted(cpu_offload(base(), torch.device("cpu"))), processes=1)


# {name: (the set-up, the one-process run that it is compared with)}
SETUPS: dict[str, tuple[Callable[[], Found], Callable[[], Found]]] = {
    "one process": (one, one),
    "DDP": (ddp, one),
    "FSDP2": (fsdp2, one),
    "FSDP2, bfloat16": (fsdp2_mixed, one_mixed),
    "FSDP1": (fsdp1, one),
    "tensor parallel": (tensor_parallel, one),
    "FSDP2 on tensor parallel": (fsdp2_on_tensor_parallel, one),
    "pipeline": (pipeline, one),
    "offloaded by accelerate": (offloaded, one),
}
