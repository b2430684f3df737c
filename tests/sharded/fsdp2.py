"""Set-ups of FSDP2 (fully_shard): training, and what it moves between processes."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing, checkpoint_wrapper)
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

import lorafx
from tests.sharded.fsdp2_files import shard
from tests.support.sharded import (
    WIDTH, Decoder, Layer, adapted, batches, largest_difference, loss_of, one_process,
    reduces_the_adapter_only, train)
from tests.support.torchrun import setup


def compared(
    sharded: Callable[[Any], Any] = shard, model: Callable[[], Any] = adapted,
) -> float:
    """How far the losses of a model so sharded are from those of one process; asserted small."""
    alone = _alone(model)
    spread = sharded(model())
    found = largest_difference(train(spread, lorafx.parameters(spread)), alone)
    assert found < 1e-5
    assert alone[-1] < alone[0]  # it learns
    return found


@functools.cache
def _alone(model: Callable[[], Any]) -> list[float]:
    return one_process(model())


@setup
def each_layer_then_the_root() -> float:
    return compared()


@setup
def every_linear_by_itself() -> float:
    def sharded(model: Any) -> Any:
        for module in list(model.modules()):
            if isinstance(module, nn.Linear):
                fully_shard(module)
        return fully_shard(model)

    return compared(sharded)


@setup
def resharded_after_forward_or_not() -> list[float]:
    return [compared(lambda model: shard(model, reshard_after_forward=often))
            for often in (True, False)]


@setup
def offloaded_to_the_cpu() -> float:
    return compared(lambda model: shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False)))


@setup
def checkpointed_before_sharding() -> float:
    def sharded(model: Any) -> Any:
        for number, layer in enumerate(model.layers):
            model.layers[number] = checkpoint_wrapper(layer)
        return shard(model)

    return compared(sharded)


@setup
def checkpointed_after_sharding() -> float:
    def sharded(model: Any) -> Any:
        model = shard(model)
        apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, Layer))
        return model

    return compared(sharded)


class NormsLast(Layer):
    """A layer that ends in a norm, whose weight is freed when the next linear call keeps its x."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.last = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(super().forward(x))
        return y


class OfNormsLast(Decoder):
    """Such layers, and a head that reads what the last gives."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(NormsLast(WIDTH) for _ in self.layers)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(x)
        return logits


@setup
def layers_that_end_in_a_norm() -> float:
    return compared(model=lambda: adapted(seeded(OfNormsLast)))


class Checkpointed(Decoder):
    """A decoder that computes its layers again in the backward pass."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        logits: Tensor = self.head(self.norm(x))
        return logits


class ReadsItsHead(Decoder):
    """A decoder whose Python decides something, and reads the weight of its head."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        if float(x.detach().abs().max()) > 1e6:
            raise AssertionError("far too large")
        return F.linear(self.norm(x), self.head.weight)


def seeded(cls: type[nn.Module]) -> nn.Module:
    """A model of a class, the same in every process."""
    torch.manual_seed(1)
    return cls()


@setup
def checkpointed_in_its_forward() -> float:
    return compared(model=lambda: adapted(seeded(Checkpointed)))


@setup
def a_forward_that_reads_a_weight() -> float:
    return compared(model=lambda: adapted(seeded(ReadsItsHead)))


@setup
def layers_compiled_one_by_one() -> float:
    def sharded(model: Any) -> Any:
        for layer in model.layers:
            layer.compile(backend="eager")
        return shard(model)

    found = compared(sharded)
    model, alone = sharded(adapted()), adapted()
    for verb in (lorafx.merge, lorafx.eject):
        expected = verb(alone).state_dict()
        torch.testing.assert_close(verb(model).state_dict(), expected, atol=0, rtol=0)
    torch.compiler.reset()
    return found


@setup
def several_adapters() -> float:
    def model() -> Any:
        made = adapted()
        torch.manual_seed(5)
        lorafx.add(made, "other", rank=8)
        lorafx.activate(made, {"default": 0.5, "other": 2.0})
        return made

    return compared(model=model)


@setup
def modules_trained_whole() -> float:
    return compared(model=lambda: adapted(targets="linear", trainable=["norm", "layers.1.norm",
                                                                       "embedding"]))


class Rare(nn.Module):
    """Rows of one matrix for q, k and v; a matrix that stands as (in, out); a stack of experts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.turned = nn.Parameter(torch.randn(width, width) / 4)
        self.bias = nn.Parameter(torch.zeros(width))
        self.experts = nn.Parameter(torch.randn(4, width, width) / 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        rows = x.flatten(0, 1)
        x = x + torch.addmm(self.bias, rows, self.turned).view_as(x)
        parts = torch.bmm(x.flatten(0, 1).expand(4, -1, -1), self.experts)
        return x + parts.mean(0).view_as(x)


class RareDecoder(Decoder):
    """A decoder of such layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Rare(self.head.in_features) for _ in range(2))


@setup
def rows_transposed_and_experts() -> list[str]:
    targets = ["layers.*.qkv[q]", "layers.*.qkv[v]", "layers.*.turned", "layers.*.experts", "head"]
    compared(model=lambda: adapted(seeded(RareDecoder), targets=targets))
    model = adapted(seeded(RareDecoder), targets=targets)
    return [site.name for site in lorafx.summary(model).sites]


@setup
def mixed_precision() -> float:
    """In bfloat16, reduced in float32, against one process that computes each part so."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    model = shard(adapted(), mp_policy=policy)
    ours = train(lambda tokens: model(tokens).float(), lorafx.parameters(model))
    found = largest_difference(ours, _in_bfloat16(adapted(), dist.get_world_size()))
    assert found < 1e-5
    return found


def _in_bfloat16(model: Any, parts: int) -> list[float]:
    """Losses of five steps on float32 adapters, each part of a batch computed in bfloat16."""
    trained = list(lorafx.parameters(model))
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for tokens in batches():
        cast = {name: parameter.detach().bfloat16().requires_grad_(parameter.requires_grad)
                for name, parameter in model.named_parameters()}
        means = [torch.zeros_like(parameter) for parameter in trained]
        total = 0.0
        for part in tokens.chunk(parts):
            loss = loss_of(torch.func.functional_call(model, cast, part).float(), part)
            moving = [tensor for tensor in cast.values() if tensor.requires_grad]
            for mean, gradient in zip(means, torch.autograd.grad(loss, moving)):
                mean += gradient.float() / parts
            total += float(loss.detach()) / parts
        for parameter, mean in zip(trained, means):
            parameter.grad = mean
        optimizer.step()
        losses.append(total)
    return losses


@setup
def gradients_reduced_are_the_adapters() -> dict[str, int]:
    model = shard(adapted())
    communication = reduces_the_adapter_only(model)
    return {"reduced": communication.reduced, "gathered": communication.gathered}


@setup
def resetting_draws_once_for_all() -> None:
    """reset_parameters of sharded factors gives what one process draws."""
    model = shard(adapted())
    torch.manual_seed(9 + dist.get_rank())
    factors = model.layers[0].q.lora.default
    factors.reset_parameters()
    torch.manual_seed(9)
    drawn = torch.empty(4, 16).normal_(0, 0.02)
    torch.testing.assert_close(factors.A.full_tensor(), drawn)
    assert not factors.B.full_tensor().any()
