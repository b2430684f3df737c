"""Tensor parallelism in tests: meshes, a plan for the decoder, comparison with one process."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import lorafx
from tests.support.sharded import STEPS, adapted, batches, largest_difference, loss_of

Loss = Callable[[Any], Tensor]
LINEARS = {"q": ColwiseParallel, "k": ColwiseParallel, "v": ColwiseParallel, "o": RowwiseParallel,
           "up": ColwiseParallel, "down": RowwiseParallel}


def all_processes() -> DeviceMesh:
    """A mesh of one dimension."""
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))


def parallel(model: Any, mesh: DeviceMesh | None = None, **more: Any) -> Any:
    """The decoder, all of its linear layers and its embedding parallelized; `more` of the plan."""
    plan = {f"layers.*.{name}": style() for name, style in LINEARS.items()}
    plan["embedding"] = RowwiseParallel(input_layouts=Replicate())
    plan["head"] = ColwiseParallel(output_layouts=Replicate())
    return parallelize_module(model, mesh or all_processes(), plan | more)


def by_hand(model: Any, axes: dict[str, int | None], mesh: DeviceMesh | None = None) -> Any:
    """A model, each of these parameters split along this axis, or copied to all processes."""
    for name, axis in axes.items():
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        old = owner._parameters[attribute]
        placement = Replicate() if axis is None else Shard(axis)
        tensor = distribute_tensor(old.detach(), mesh or all_processes(), [placement])
        setattr(owner, attribute, nn.Parameter(tensor, requires_grad=old.requires_grad))
    return model


def whole(tensor: Any) -> Tensor:
    """All of a tensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def decoder_loss(model: Any, tokens: Tensor | None = None) -> Tensor:
    """The decoder's loss of the first batch, or of this."""
    tokens = batches()[0] if tokens is None else tokens
    return loss_of(whole(model(tokens)), tokens)


def square_loss(model: Any) -> Tensor:
    """A loss of (3, 16) values, given to a model with DTensors as one."""
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(5))
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        x = distribute_tensor(x, all_processes(), [Replicate()])
    return whole(model(x)).square().mean()


def gradients(model: Any, loss: Loss) -> dict[str, Tensor]:
    """{name: the whole gradient} of all active adapters' tensors, which are left without."""
    loss(model).backward()
    found = {}
    for name, parameter in lorafx.named_parameters(model):
        found[name] = whole(parameter.grad)
        parameter.grad = None
    return found


def steps(model: Any, loss: Loss, clip: float | None = None) -> list[float]:
    """The losses of five steps of AdamW."""
    optimizer, losses = torch.optim.AdamW(lorafx.parameters(model), lr=1e-2), []
    for _ in range(STEPS):
        found = loss(model)
        optimizer.zero_grad()
        found.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(lorafx.parameters(model), clip)
        optimizer.step()
        losses.append(float(found.detach()))
    return losses


def compare(model: Any, alone: Any, loss: Loss = decoder_loss, clip: float | None = None) -> float:
    """How far losses are from those of one process: at most 1e-5, and gradients are the same."""
    ours, theirs = gradients(model, loss), gradients(alone, loss)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-7)
    expected = steps(alone, loss, clip)
    assert abs(expected[0] - expected[-1]) > 1e-4
    found = largest_difference(steps(model, loss, clip), expected)
    assert found < 1e-5
    return found


def shared_folder() -> Path:
    """A new folder, the same in all processes."""
    made = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(made)
    return Path(made[0])


def saved(model: Any) -> Path:
    """The file of an adapter of a model that is whole in each process, the same for all."""
    path = shared_folder() / "adapter.safetensors"
    if dist.get_rank() == 0:
        lorafx.save(model, path)
    dist.barrier()
    return path


def both_orders(make: Callable[[], Any], spread: Callable[[Any], Any], loss: Loss,
                **config: Any) -> list[float]:
    """`compare` for inject, then spread, and for spread, then load."""
    path = saved(adapted(make(), **config))
    after = compare(spread(adapted(make(), **config)), adapted(make(), **config), loss)
    before = compare(lorafx.load(spread(make()), path), adapted(make(), **config), loss)
    return [after, before]


def differing(model: Any) -> list[str]:
    """The adapters' tensors that processes hold whole, and not alike."""
    found = []
    for name, parameter in lorafx.named_parameters(model):
        if isinstance(parameter, DTensor):
            if not parameter.placements[0].is_replicate():
                continue
            parameter = parameter.to_local()
        held = [torch.empty_like(parameter) for _ in range(dist.get_world_size())]
        dist.all_gather(held, parameter.detach().contiguous())
        if any(not torch.equal(held[0], other) for other in held):
            found.append(name)
    return found
