"""Set-ups of the benchmarks that several processes run."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel, RowwiseParallel, parallelize_module)
from torch.nn.parallel import DistributedDataParallel

import lorafx
from tests.support.torchrun import ROOT, setup

sys.path.insert(0, str(ROOT / "benchmarks"))  # as pytest does for its own process

import finetune  # noqa: E402
from finetune_parts import keep  # noqa: E402
from sharded_parts.traffic import Kind, Traffic  # noqa: E402

TINY = ["--hidden", "16", "--layers", "1", "--steps", "6", "--pretrain-steps", "3", "--batch", "4",
        "--length", "16", "--device", "cpu", "--no-check-learning", "--save-every", "2"]


def fine_tuned(way: str, name: str, *more: str) -> dict[str, Any]:
    """What the benchmark returns, and what each process printed."""
    folder = Path(os.environ["OUT"])
    options = [*TINY, "--parallel", way, "--out", str(folder / name), "--checkpoints",
               str(folder / "checkpoints"), *more]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        results = finetune.main(options)
    texts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(texts, printed.getvalue())
    return {"results": results, "printed": texts}


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """Within this context all processes die in the middle of the second adapter's training."""
    save = keep.AdapterKeeper.save

    def save_or_die(self: Any, optimizer: Any, step: int, *rest: Any) -> None:
        if self.adapter == "table" and step == 5:
            raise InterruptedError
        save(self, optimizer, step, *rest)

    keep.AdapterKeeper.save = save_or_die  # type: ignore[method-assign]
    try:
        yield
    except InterruptedError:
        pass
    finally:
        keep.AdapterKeeper.save = save  # type: ignore[method-assign]


@setup
def finetune_ddp() -> dict[str, Any]:
    return {"whole": fine_tuned("ddp", "ddp")}


@setup
def finetune_fsdp2() -> dict[str, Any]:
    """A whole run, and one that was stopped and goes on."""
    whole = fine_tuned("fsdp2", "fsdp2")
    with stopping():
        fine_tuned("fsdp2", "fsdp2_stopped")
    return {"whole": whole, "resumed": fine_tuned("fsdp2", "fsdp2_stopped", "--resume")}


def mlp() -> Any:
    """W (32, 16), W (16, 32), no biases; A (4, 16), B (32, 4), A (4, 32), B (16, 4)."""
    torch.manual_seed(0)
    layers = nn.Linear(16, 32, bias=False), nn.ReLU(), nn.Linear(32, 16, bias=False)
    return lorafx.inject(nn.Sequential(*layers), rank=4, targets="linear")


def counts(model: nn.Module, forward: Any = None) -> dict[str, int]:
    """The numbers (of 4 bytes) that the third step of training exchanges, and holds."""
    optimizer = torch.optim.AdamW(lorafx.parameters(model), lr=0.1)
    traffic = Traffic(model)
    for step in range(3):  # before, DDP arranges its buckets, and DTensor learns the shapes
        with traffic if step == 2 else contextlib.nullcontext():
            (forward or model)(torch.ones(6, 16)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return {kind.value: traffic.bytes[kind] // 4 for kind in Kind} | {
        "held": traffic.held.bytes // 4, "most": traffic.held.most // 4}


WEIGHTS, FACTORS = 2 * 16 * 32, 2 * 4 * (16 + 32)


def expected(gradients: int, weights: int, activations: int, held: int, most: int) -> Any:
    """As `counts` has them."""
    return {"gradients reduced": gradients, "weights gathered": weights,
            "activations": activations, "held": held, "most": most}


@setup
def traffic_of_ddp() -> None:
    model = mlp()
    found = counts(model, DistributedDataParallel(model))
    assert found == expected(FACTORS, 0, 0, WEIGHTS + FACTORS, WEIGHTS + FACTORS), found


@setup
def traffic_of_fsdp2() -> None:
    """Each layer is gathered for forward and again for backward; nobody has both at once."""
    model = mlp()
    for layer in (model[0], model[2]):
        fully_shard(layer)
    found, all_of_it = counts(fully_shard(model)), WEIGHTS + FACTORS
    assert found == expected(FACTORS, 2 * all_of_it, 0, all_of_it // 2, all_of_it), found


@setup
def traffic_of_tensor_parallel() -> None:
    """y is reduced, and the gradients of the factors that are whole in each process."""
    mesh = dist.init_device_mesh("cpu", (2,))
    model = parallelize_module(mlp(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    found, in_whole = counts(model), 4 * 16 + 16 * 4  # A of the first layer, B of the second
    held = (WEIGHTS + FACTORS - in_whole) // 2 + in_whole
    assert found == expected(in_whole, 0, 6 * 16, held, held), found


@setup
def traffic_that_is_sent() -> None:
    tensor = torch.ones(3, 5)
    with Traffic(nn.Identity()) as traffic:
        if dist.get_rank() == 0:
            dist.send(tensor, 1)
        else:
            dist.recv(tensor, 0)
        dist.barrier()
    sent = 60 if dist.get_rank() == 0 else 0
    assert traffic.bytes == {Kind.GRADIENTS: 0, Kind.WEIGHTS: 0, Kind.ACTIVATIONS: sent}
