"""Set-ups of models made on the meta device: sharded first, then given memory and a base."""

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, set_model_state_dict
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import lorafx
from tests.support.sharded import (
    Decoder, Layer, adapted, decoder, largest_difference, one_process, train
)
from tests.support.torchrun import setup

CONFIG: dict[str, Any] = {"targets": "linear", "rank": 4, "trainable": "head"}


def shared_folder() -> Path:
    """A new folder, the same for all processes."""
    names: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(names)
    return Path(names[0])


def shard(model: Any) -> Any:
    for layer in model.layers:
        fully_shard(layer)
    return fully_shard(model)


def empty() -> Decoder:
    with torch.device("meta"):
        return Decoder()


def injected(base: nn.Module, **config: Any) -> nn.Module:
    """A new adapter, of which each process draws the same."""
    torch.manual_seed(2)
    return lorafx.inject(base, **config)


def base_tensors(model: nn.Module) -> dict[str, Any]:
    """What a checkpoint of the base has, of this model."""
    state: dict[str, Any] = get_model_state_dict(model)
    return {name: tensor for name, tensor in state.items()
            if ".lora." not in name and ".trained." not in name}


def from_checkpoint(model: nn.Module) -> None:
    """torch.distributed.checkpoint, into the tensors that the model has."""
    folder = shared_folder()
    dcp.save(decoder().state_dict(), checkpoint_id=folder)
    model.to_empty(device="cpu")
    dcp.load(base_tensors(model), checkpoint_id=folder)


def from_first_process(model: nn.Module) -> None:
    """The whole base of one process, of which each gets its part."""
    whole = decoder().state_dict() if dist.get_rank() == 0 else {}
    model.to_empty(device="cpu")
    set_model_state_dict(model, whole, options=StateDictOptions(
        full_state_dict=True, broadcast_from_rank0=True, strict=False))


def by_assignment(model: nn.Module) -> None:
    """The parts of the base, each process its own, in the place of tensors on meta."""
    parts, live = {}, model.state_dict()
    for name, tensor in decoder().state_dict().items():
        parts[name] = distribute_tensor(tensor, live[name].device_mesh, live[name].placements)
    model.load_state_dict(parts, strict=False, assign=True)


WAYS = (from_checkpoint, from_first_process, by_assignment)


def same_as_alone(model: Any) -> float:
    """The losses of an adapter that `reset_parameters` made, against one process's."""
    alone = injected(decoder(), **CONFIG)
    first = {name: tensor.detach().clone() for name, tensor in lorafx.named_parameters(alone)}
    torch.manual_seed(2 + dist.get_rank())  # only the first process's draw counts
    lorafx.reset_parameters(model)
    for name, tensor in lorafx.named_parameters(model):
        assert torch.equal(tensor.full_tensor(), first[name]), name  # type: ignore[attr-defined]
    alone_losses = one_process(alone)
    found = largest_difference(train(model, lorafx.parameters(model)), alone_losses)
    assert found < 1e-5
    path = shared_folder() / "adapter.safetensors"
    lorafx.save(model, path)
    for name, tensor in lorafx.named_parameters(lorafx.load(decoder(), path)):
        expected = dict(lorafx.named_parameters(alone))[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=2e-5)
    return found


@setup
def fully_sharded_then_given_a_base() -> dict[str, float]:
    found = {}
    for give in WAYS:
        model = shard(lorafx.inject(empty(), **CONFIG))
        give(model)
        found[give.__name__] = same_as_alone(model)
    return found


@setup
def a_loaded_adapter_is_kept() -> dict[str, float]:
    path, found = shared_folder() / "adapter.safetensors", {}
    alone = adapted(trainable="head")
    if dist.get_rank() == 0:
        lorafx.save(alone, path)
    dist.barrier()
    losses = one_process(alone)
    for give in WAYS:
        model = shard(lorafx.load(empty(), path))
        give(model)
        lorafx.reset_parameters(model)
        found[give.__name__] = largest_difference(train(model, lorafx.parameters(model)), losses)
        assert found[give.__name__] < 1e-5
    return found


def tensor_parallel(model: Any) -> Any:
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:
        parallelize_module(layer, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


@setup
def tensor_parallel_on_meta() -> float:
    alone = injected(decoder(), **CONFIG)
    model = tensor_parallel(lorafx.inject(empty(), **CONFIG))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, tensor in decoder().state_dict().items():
            live = model.state_dict()[name]
            spread = hasattr(live, "device_mesh")
            live.copy_(distribute_tensor(tensor, live.device_mesh, live.placements)
                       if spread else tensor)
    torch.manual_seed(2)
    lorafx.reset_parameters(model)
    losses = one_process(alone)
    found = largest_difference(train(model, lorafx.parameters(model), split=False), losses)
    assert found < 1e-5
    return found


@setup
def fsdp1_gives_memory_by_reset_parameters() -> float:
    """Each process has an empty model, of which an adapter was loaded already."""
    path, alone = shared_folder() / "adapter.safetensors", adapted()
    if dist.get_rank() == 0:
        lorafx.save(alone, path)
    dist.barrier()
    model = FullyShardedDataParallel(
        lorafx.load(empty(), path), use_orig_params=True, device_id=torch.device("cpu"),
        auto_wrap_policy=ModuleWrapPolicy({Layer}))
    base = dict(decoder().named_parameters())
    with FullyShardedDataParallel.summon_full_params(model), torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora." not in name:
                parameter.copy_(base[name.replace("_fsdp_wrapped_module.", "")])
    losses = one_process(alone)
    found = largest_difference(train(model, lorafx.parameters(model)), losses)
    assert found < 1e-5
    return found
