"""Set-ups of FSDP2 over a base whose layers are packed."""

from typing import Any

import bitsandbytes
import torch
import torch.distributed as dist
from torch import nn

import lorafx
from tests.sharded.fsdp2_files import shard, shared_folder
from tests.support.quantised import Grouped
from tests.support.sharded import (
    adapted, batches, decoder, largest_difference, one_process, train)
from tests.support.torchrun import setup


def packed(layer: nn.Linear) -> nn.Module:
    """The layer in 4 bits."""
    made = bitsandbytes.nn.Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None,
        compute_dtype=torch.float32, quant_type="nf4")
    made.load_state_dict(layer.state_dict())
    return made.to("cpu")


def grouped(layer: nn.Linear) -> nn.Module:
    """Another layer, of GPTQ's kind."""
    return Grouped(layer.in_features, layer.out_features)


def quantised(make: Any) -> Any:
    """A decoder whose blocks have such layers, with an adapter; the same in every process."""
    base = decoder()
    for layer in base.layers:
        for name, child in list(layer.named_children()):
            if isinstance(child, nn.Linear):
                setattr(layer, name, make(child))
    return adapted(base)


def compared(make: Any) -> float:
    """How far the losses of a sharded model are from those of one process."""
    alone = one_process(quantised(make))
    model = shard(quantised(make))
    found = largest_difference(train(model, lorafx.parameters(model)), alone)
    assert found < 1e-5 and alone[-1] < alone[0]
    return found


@setup
def four_bits() -> float:
    return compared(packed)


@setup
def groups_of_buffers() -> float:
    return compared(grouped)


@setup
def saved_from_all() -> None:
    model = shard(quantised(packed))
    train(model, lorafx.parameters(model))
    tokens = batches()[0]
    y = model(tokens)
    with shared_folder() as folder:
        lorafx.save(model, folder / "a.safetensors")
        dist.barrier()
        again = lorafx.load(lorafx.eject(quantised(packed)), folder / "a.safetensors")
    assert (again(tokens) - y).abs().max() < 1e-5
