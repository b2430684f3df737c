"""Set-ups of tensor parallelism: what is done with a model that is spread, and what is refused."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import (
    DTensor, Replicate, Shard, distribute_module, distribute_tensor
)
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import lorafx
from tests.support.sharded import adapted, batches, decoder, largest_difference
from tests.support.tensor_parallel import (
    all_processes, by_hand, compare, decoder_loss, parallel, saved, shared_folder, square_loss,
    whole
)
from tests.support.torchrun import setup


def assert_same(model: Any, alone: Any) -> None:
    """The outputs of a model are those of another."""
    tokens = batches()[0]
    with torch.no_grad():
        torch.testing.assert_close(whole(model(tokens)), alone(tokens), rtol=1e-5, atol=1e-5)


@setup
def verbs() -> None:
    model, alone = parallel(adapted(trainable=["norm"])), adapted(trainable=["norm"])
    path = saved(adapted(rank=2))
    for each in (model, alone):
        torch.manual_seed(7)
        lorafx.add(each, "fresh", rank=2)
        lorafx.load(each, path, "loaded")
        lorafx.compose(each, {"default": 0.5, "loaded": 2.0}, "both")
    assert str(lorafx.summary(model, norms=False)) == str(lorafx.summary(alone, norms=False))
    ours, theirs = lorafx.sites(model), lorafx.sites(alone)
    assert [site.name for site in ours] == [site.name for site in theirs]
    for chosen in ("fresh", "loaded", "both", {"default": 0.5, "loaded": 2.0}, []):
        lorafx.activate(model, chosen)
        lorafx.activate(alone, chosen)
        assert_same(model, alone)
    lorafx.activate(model, "both")
    with lorafx.disabled(model):
        assert_same(model, decoder())
    lorafx.remove(model, "both")
    lorafx.activate(model, "fresh")
    lorafx.activate(alone, "fresh")
    compare(model, alone)
    assert_same(copy.deepcopy(model), alone)


@setup
def merged_and_ejected() -> None:
    """Models of the original class that still run: nothing is gathered, and hooks are kept."""
    model, alone = parallel(adapted(trainable=["head"])), adapted(trainable=["head"])
    lorafx.eject(model)
    assert_same(model, alone)
    errors = lorafx.merge_error(alone, dtype=torch.bfloat16)
    assert 1e-4 < max(errors.values()) <= 1
    assert lorafx.merge_error(model, dtype=torch.bfloat16) == pytest.approx(errors, rel=1e-3)
    with CommDebugMode() as comm:  # which leaves hooks behind
        merged = lorafx.merge(model)
        ejected = lorafx.eject(model)
    assert comm.get_total_counts() == 0
    assert type(merged) is type(ejected) is type(decoder())
    assert merged.state_dict().keys() == decoder().state_dict().keys()
    for name, parameter in merged.named_parameters():
        if "norm" not in name:
            assert parameter.placements == ejected.get_parameter(name).placements
    assert_same(merged, lorafx.merge(alone))
    assert_same(ejected, decoder())


@setup
def saved_as_by_one_process() -> int:
    """The same bytes; A and B are gathered, and no W is."""
    model, alone = parallel(adapted(trainable=["norm"])), adapted(trainable=["norm"])
    folder = shared_folder()
    with CommDebugMode() as comm:
        lorafx.save(model, folder / "ours.safetensors")
    gathered = comm.get_comm_counts()[torch.ops.c10d_functional.all_gather_into_tensor]
    assert gathered == len(lorafx.summary(model).sites)  # of each pair one is replicated
    if dist.get_rank() == 0:
        lorafx.save(alone, folder / "theirs.safetensors")
        theirs = (folder / "theirs.safetensors").read_bytes()
        assert (folder / "ours.safetensors").read_bytes() == theirs
    return gathered


@setup
def resumed() -> list[float]:
    """Training goes on as it would have: loaded before the model is spread, or after, or alone."""
    path = shared_folder() / "adapter.safetensors"
    model = parallel(adapted())
    optimizer = torch.optim.AdamW(lorafx.parameters(model), lr=1e-2)

    def step(model: Any, optimizer: Any) -> float:
        loss = decoder_loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    for _ in range(2):
        step(model, optimizer)
    lorafx.save(model, path, optimizer=optimizer, step=2)
    expected, found = [step(model, optimizer) for _ in range(3)], []
    for again in (parallel(lorafx.load(decoder(), path)), lorafx.load(parallel(decoder()), path),
                  lorafx.load(decoder(), path)):
        optimizer = torch.optim.AdamW(lorafx.parameters(again), lr=1e-2)
        assert lorafx.resume(again, optimizer, path) == 2
        found.append(largest_difference([step(again, optimizer) for _ in range(3)], expected))
    assert max(found) < 1e-6
    return found


class Bare(nn.Module):
    """Matrices of its own, and children beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = (nn.Parameter(torch.randn(16, 16) / 4) for _ in range(2))
        self.inner = nn.Sequential(nn.Linear(16, 16), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(F.linear(F.linear(x, self.w1).relu(), self.w2))


def nested() -> Any:
    """Layers, and a module that has both matrices and layers, one of which is trained whole."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), Bare())
    return adapted(net, trainable=["2.inner.0"])


def by_parameters(name: str, module: nn.Module, mesh: Any) -> None:
    """As the documentation of torch splits linear layers."""
    if isinstance(module, nn.Linear):
        for key, parameter in module.named_parameters():
            split = distribute_tensor(parameter, mesh, [Shard(0)])
            module.register_parameter(key, nn.Parameter(split, requires_grad=False))


def by_attribute(name: str, module: nn.Module, mesh: Any) -> None:
    if isinstance(module, nn.Linear):
        split = distribute_tensor(module.weight, mesh, [Shard(0)])
        module.weight = nn.Parameter(split, requires_grad=False)


def unseen(name: str, module: nn.Module, mesh: Any) -> None:
    for key, parameter in list(module._parameters.items()):
        if isinstance(module, nn.Linear):
            split = distribute_tensor(parameter, mesh, [Shard(0)])
            module._parameters[key] = nn.Parameter(split, requires_grad=False)


@setup
def distribute_module_with_all_kinds_of_functions() -> list[float]:
    """None, which replicates all; those that split what they find; who goes behind modules."""
    found = []
    for function in (None, by_parameters, by_attribute):
        model = distribute_module(nested(), all_processes(), function)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        found.append(compare(model, nested(), square_loss))
    model = distribute_module(nested(), all_processes(), unseen)
    with pytest.raises(lorafx.UnsupportedModelError, match="parallelize_module"):
        square_loss(model)
    return found


@setup
def plans_with_wildcards() -> None:
    """`*` means the user's children, and no adapter is asked to be parallel."""
    layer = nested()[2]
    parallelize_module(layer, all_processes(), {"*.0": ColwiseParallel(output_layouts=Replicate())})
    assert isinstance(layer.inner[0].frozen_weight, DTensor)
    assert not isinstance(layer._parameters["w1"], DTensor)


@setup
def what_would_be_baked_in_is_refused() -> None:
    """W + s B A handed to distribute_tensor; W itself works, as does the order it names."""
    for grad in (False, True):
        layer = adapted().head
        with torch.set_grad_enabled(grad), pytest.raises(lorafx.AdaptedWeightError,
                                                         match="parallelize_module"):
            distribute_tensor(layer.weight, all_processes(), [Shard(0)])
    net = nn.Sequential(nn.Linear(16, 16))
    by_hand(adapted(net), {"0.weight": 0, "0.bias": 0})
    split = by_hand(net, {"0.weight": 0, "0.bias": 0})
    assert torch.isfinite(square_loss(lorafx.inject(split, targets="linear")))


@setup
def tied_and_trained_whole_is_spread_in_one_way_or_refused() -> None:
    def tied() -> Any:
        model = decoder()
        model.head.weight = model.embedding.weight
        return adapted(model, targets=["q"], trainable=["head"])

    one = parallelize_module(tied(), all_processes(),
                             {"head": ColwiseParallel(output_layouts=Replicate())})
    with pytest.raises(lorafx.UnsupportedModelError, match="spread both in the same way"):
        one(batches()[0])
    with pytest.raises(lorafx.UnsupportedModelError, match="choose one"):
        parallel(tied(), embedding=ColwiseParallel(output_layouts=Replicate()))


@setup
def another_mesh_is_refused() -> None:
    """By one sentence, after which nothing has changed; the order that it names works."""
    if dist.get_world_size() < 4:
        return
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    model = parallel(adapted(), mesh["a"])
    layer = model.layers[0].q
    held = layer.frozen_weight
    other = nn.Parameter(distribute_tensor(whole(held), mesh["b"], [Shard(0)]), requires_grad=False)
    with pytest.raises(lorafx.UnsupportedModelError, match="lorafx.save the adapter"):
        layer.weight = other
    assert layer.frozen_weight is held
    path = shared_folder() / "adapter.safetensors"
    lorafx.save(model, path)
    compare(lorafx.load(parallel(decoder(), mesh["b"]), path), adapted())


@setup
def forward_communicates_as_the_base_does() -> None:
    model, plain = parallel(adapted()).requires_grad_(False), parallel(decoder())
    with CommDebugMode() as frozen:
        decoder_loss(model)
    with CommDebugMode() as base:
        decoder_loss(plain)
    ours, theirs = frozen.get_comm_counts(), base.get_comm_counts()
    assert ours == theirs, (ours, theirs)
