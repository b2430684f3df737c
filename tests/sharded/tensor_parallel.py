"""Set-ups of tensor parallelism: training, in both orders, equals that of one process.

Those of kinds of weights and of what is done with a spread model are registered with these.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel, PrepareModuleInput, PrepareModuleOutput, RowwiseParallel, SequenceParallel,
    loss_parallel, parallelize_module
)

import lorafx
from tests.support.communication import Communication
from tests.support.sharded import (
    adapted, batches, decoder, largest_difference, loss_of, one_process
)
from tests.support.tensor_parallel import (
    all_processes, both_orders, compare, decoder_loss, differing, gradients, parallel, saved, whole
)
from tests.support.torchrun import setup


def tied() -> Any:
    """A decoder whose head has the embedding's weight."""
    model = decoder()
    model.head.weight = model.embedding.weight
    return model


@setup
def linears_in_both_orders() -> list[float]:
    return both_orders(decoder, parallel, decoder_loss)


@setup
def clipped_gradients() -> float:
    return compare(parallel(adapted()), adapted(), clip=0.05)


@setup
def outputs_of_other_layouts() -> list[float]:
    """An embedding by columns, DTensors between layers, and dropout that is off in eval."""
    one = compare(parallel(adapted(), embedding=ColwiseParallel(output_layouts=Replicate())),
                  adapted())
    other = compare(parallel(adapted(), head=ColwiseParallel(use_local_output=False)), adapted())
    third = compare(parallel(adapted(dropout=0.5).eval()), adapted(dropout=0.5).eval())
    return [one, other, third]


@setup
def loss_of_split_logits() -> None:
    model, tokens = parallel(adapted(), head=ColwiseParallel(use_local_output=False)), batches()[0]
    with loss_parallel():
        logits = model(tokens)[:, :-1].flatten(0, 1)
        F.cross_entropy(logits, tokens[:, 1:].flatten()).backward()
    expected = gradients(adapted(), decoder_loss)
    for name, parameter in lorafx.named_parameters(model):
        torch.testing.assert_close(whole(parameter.grad), expected[name], rtol=1e-4, atol=1e-7)


def in_sequence(model: Any) -> Any:
    """The decoder with its activations split between layers, along the batch, that divides."""
    split: Any = Shard(0)
    plan: dict[str, Any] = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=split),
        "layers.*.norm": SequenceParallel(sequence_dim=0),
        "norm": SequenceParallel(sequence_dim=0),
        "head": ColwiseParallel(input_layouts=split, output_layouts=Replicate())}
    for name in ("q", "k", "v", "up"):
        plan[f"layers.*.{name}"] = ColwiseParallel(input_layouts=split)
    for name in ("o", "down"):
        plan[f"layers.*.{name}"] = RowwiseParallel(output_layouts=split)
    return parallelize_module(model, all_processes(), plan)


@setup
def sequence_parallel() -> list[float]:
    """The norms too, one of which is trained whole."""
    return both_orders(decoder, in_sequence, decoder_loss, trainable=["norm"])


class Residual(nn.Module):
    """A module that is given and gives activations that are split."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


@setup
def prepared_inputs_and_outputs() -> list[float]:
    """PrepareModuleInput and PrepareModuleOutput around a module with adapted layers."""
    def make() -> Residual:
        torch.manual_seed(1)
        return Residual()

    def spread(model: Residual) -> Any:
        parallelize_module(model, all_processes(), {
            "inner": PrepareModuleInput(input_layouts=Replicate(),
                                        desired_input_layouts=Replicate()),
            "inner.0": ColwiseParallel(),
            "inner.2": RowwiseParallel(output_layouts=Shard(0), use_local_output=False)})
        return parallelize_module(model, all_processes(), {
            "inner": PrepareModuleOutput(output_layouts=Shard(0),
                                         desired_output_layouts=Replicate())})

    def loss(model: Any) -> torch.Tensor:
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(5))
        return whole(model(x)).square().mean()

    return both_orders(make, spread, loss)


@setup
def modules_trained_whole() -> list[float]:
    return both_orders(decoder, parallel, decoder_loss, trainable=["head", "layers.0.o", "norm"])


@setup
def tied_embedding_and_head() -> list[float]:
    """Parallelizing breaks the tie of W; the adapter, and what is trained whole, stay one."""
    found = []
    for config in ({}, {"targets": ["q", "head"]}, {"trainable": ["head"], "targets": ["q"]}):
        found.append(compare(parallel(adapted(tied(), **config)), adapted(tied(), **config)))
    path = saved(adapted(tied()))
    model = parallel(tied())
    model.head.weight = model.embedding.weight
    return [*found, compare(lorafx.load(model, path), adapted(tied()))]


@setup
def a_loss_that_reads_weights() -> float:
    def loss(model: Any) -> torch.Tensor:
        head, query = model.head.weight, model.layers[0].q.weight
        return decoder_loss(model) + whole(head.square().mean()) + whole(query.abs().mean())

    return compare(parallel(adapted()), adapted(), loss)


@setup
def a_is_one_whatever_the_seeds() -> None:
    base, other = decoder(), decoder()
    partly = parallelize_module(decoder(), all_processes(), {"layers.*.q": ColwiseParallel()})
    torch.manual_seed(100 + dist.get_rank())
    assert not differing(parallel(lorafx.inject(base, targets="linear")))
    assert not differing(lorafx.inject(parallel(other), targets="linear"))
    assert not differing(lorafx.inject(partly, targets="linear"))


@setup
def gradients_are_summed_once() -> dict[str, int]:
    """The bytes of those of A by columns and B by rows, each once; nothing in the optimizer."""
    model, base = parallel(adapted()), parallel(decoder())
    x, moved = base.embedding(batches()[0]), []
    for each in (base, model):
        given = x.detach().requires_grad_()
        with Communication() as communication:
            each.head(each.norm(each.layers[1](each.layers[0](given)))).sum().backward()
        moved.append(communication)
    replicated = [parameter for parameter in lorafx.parameters(model)
                  if parameter.placements[0].is_replicate()]
    assert len(replicated) == len(lorafx.summary(model).sites)
    more = moved[1].reduced - moved[0].reduced
    assert more == sum(parameter.nbytes for parameter in replicated)
    assert moved[1].gathered == moved[0].gathered
    for parameter in lorafx.parameters(model):
        assert parameter.grad.placements == parameter.placements
    with Communication() as communication:
        torch.optim.AdamW(lorafx.parameters(model)).step()
    assert communication.reduced == communication.gathered == 0
    return {"reduced of adapters": more, "reduced of activations": moved[0].reduced}


@setup
def fsdp2_on_top() -> list[float]:
    """Layers split over one dimension of a mesh, and gathered over the other; saved and resumed."""
    if dist.get_world_size() < 4:
        return []
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "tp"))

    def spread(model: Any) -> Any:
        parallel(model, mesh["tp"])
        for layer in model.layers:
            fully_shard(layer, mesh=mesh["dp"])
        return fully_shard(model, mesh=mesh["dp"])

    def train(model: Any, optimizer: Any, data: Any) -> list[float]:
        losses = []
        for tokens in data:
            tokens = tokens.chunk(2)[mesh["dp"].get_local_rank()]
            loss = loss_of(whole(model(tokens)), tokens)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            losses.append(float(mean) / dist.get_world_size())
        return losses

    alone, expected = adapted(), one_process(adapted())
    one_process(alone)
    model = spread(adapted())
    optimizer = torch.optim.AdamW(lorafx.parameters(model), lr=1e-2)
    losses = train(model, optimizer, batches()[:3])
    path = saved(adapted())
    lorafx.save(model, path, optimizer=optimizer, step=3)
    losses += train(model, optimizer, batches()[3:])
    resumed = spread(lorafx.load(decoder(), path))
    optimizer = torch.optim.AdamW(lorafx.parameters(resumed), lr=1e-2)
    assert lorafx.resume(resumed, optimizer, path) == 3
    again = losses[:3] + train(resumed, optimizer, batches()[3:])
    for ours, theirs in zip(lorafx.parameters(resumed), lorafx.parameters(alone)):
        torch.testing.assert_close(whole(ours.detach()), theirs.detach(), rtol=1e-4, atol=1e-5)
    found = [largest_difference(losses, expected), largest_difference(again, expected)]
    assert max(found) < 1e-5
    return found
