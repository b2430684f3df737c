"""Set-ups of FSDP1 (FullyShardedDataParallel with use_orig_params=True)."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import init_device_mesh
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing
)
from torch.distributed.algorithms._comm_hooks.default_hooks import (
    DefaultState, reduce_scatter_hook
)
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

import lorafx
from tests.support.sharded import (
    STEPS, Layer, adapted, assert_same_file, batches, count_reduced, decoder, draw,
    largest_difference, loss_of, one_process, shared_folder, train
)
from tests.support.torchrun import setup

LAYERS = ModuleWrapPolicy({Layer})


def wrap(model: nn.Module, **options: Any) -> Any:
    """The model, wrapped."""
    options = {"use_orig_params": True, "device_id": torch.device("cpu"), **options}
    with warnings.catch_warnings():
        # a layer has frozen parameters and others, whose gradients are reduced together
        warnings.filterwarnings("ignore", ".*both parameters with requires_grad")
        warnings.filterwarnings("ignore", ".*NO_SHARD.*")  # DDP does the same and is meant for it
        return FullyShardedDataParallel(model, **options)


@setup
def policies_and_strategies() -> dict[str, float]:
    alone, found = one_process(adapted()), {}
    for strategy in ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"):
        for policy in (None, LAYERS):
            options = {"sharding_strategy": ShardingStrategy[strategy], "auto_wrap_policy": policy}
            model = wrap(adapted(), **options)
            losses = train(model, lorafx.parameters(model))
            name = f"{strategy}, {'the root' if policy is None else 'each layer'}"
            found[name] = largest_difference(losses, alone)
            assert found[name] < 1e-5, name
    return found


class Transposed(nn.Module):
    """Linear calls of weights that stand as (in, out), as GPT-2's do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(32, 16)
        self.weight = nn.Parameter(torch.randn(16, 32))

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.matmul(self.embedding(tokens), self.weight)


@setup
def weights_that_stand_transposed() -> float:
    model = wrap(adapted(Transposed()))
    alone = one_process(adapted(Transposed()))
    found = largest_difference(train(model, lorafx.parameters(model)), alone)
    assert found < 1e-5
    return found


@setup
def hybrid_sharding() -> float:
    """Shards in halves of the processes, and replicas of those."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2))
    model = wrap(adapted(), device_mesh=mesh, auto_wrap_policy=LAYERS,
                 sharding_strategy=ShardingStrategy.HYBRID_SHARD)
    with shared_folder() as folder:
        lorafx.save(adapted(), folder / f"{dist.get_rank()}.safetensors")
        lorafx.save(model, folder / "all.safetensors")
        dist.barrier()
        assert_same_file(folder / "all.safetensors", folder / "0.safetensors")
    found = largest_difference(train(model, lorafx.parameters(model)), one_process(adapted()))
    assert found < 1e-5
    return found


def alone_in_a_group(model: nn.Module, **options: Any) -> Any:
    """The model wrapped for this process alone: one that shares nothing, in the same precision."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    return wrap(model, process_group=groups[dist.get_rank()], **options)


def train_on_parts(model: Any) -> list[float]:
    """The losses of `train` in one process that takes the batch in as many parts."""
    optimizer = torch.optim.AdamW(lorafx.parameters(model), lr=1e-2)
    losses = []
    for tokens in batches():
        parts = tokens.chunk(dist.get_world_size())
        optimizer.zero_grad()
        total = 0.0
        for part in parts:
            loss = loss_of(model(part).float(), part) / len(parts)
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        losses.append(total)
    return losses


@setup
def mixed_precision() -> float:
    """Against one process that computes in the same precision."""
    precision = MixedPrecision(torch.bfloat16, torch.float32)
    options = {"mixed_precision": precision, "auto_wrap_policy": LAYERS}
    alone = train_on_parts(alone_in_a_group(adapted(), **options))
    model = wrap(adapted(), **options)
    losses = train(lambda tokens: model(tokens).float(), lorafx.parameters(model))
    found = largest_difference(losses, alone)
    assert found < 1e-5
    return found


@setup
def activation_checkpointing() -> float:
    model = wrap(adapted(), auto_wrap_policy=LAYERS)
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Layer))
    found = largest_difference(train(model, lorafx.parameters(model)), one_process(adapted()))
    assert found < 1e-5
    return found


def two_adapters(other: str = "square", **config: Any) -> Any:
    """A decoder with adapters `default`, which is active, and `other`, both not zero."""
    model = adapted(**config)
    lorafx.add(model, "other", rank=2, targets=other)
    lorafx.activate(model, "other")
    draw(model)
    lorafx.activate(model, "default")
    return model


@setup
def files_are_those_of_one_process() -> None:
    """Each adapter's, before and after training, and in the middle of a step."""
    whole = two_adapters(trainable="head")
    for strategy in ("FULL_SHARD", "SHARD_GRAD_OP"):
        model = wrap(two_adapters(trainable="head"), auto_wrap_policy=LAYERS,
                     sharding_strategy=ShardingStrategy[strategy])
        with shared_folder() as folder:
            for adapter in ("default", "other"):
                lorafx.save(whole, folder / f"{dist.get_rank()}.safetensors", adapter)
                lorafx.save(model, folder / "all.safetensors", adapter)
                assert_same_file(folder / "all.safetensors", folder / "0.safetensors")
                dist.barrier()  # nobody reads any more when the next are written
            loss = model(batches()[0]).sum()
            lorafx.save(whole, folder / f"{dist.get_rank()}.safetensors", "default")
            lorafx.save(model, folder / "all.safetensors", "default")
            loss.backward()
            assert_same_file(folder / "all.safetensors", folder / "0.safetensors")
            lorafx.save(model, folder / "other.pth", "other")
            lorafx.save(model, folder / "peft", "default")
            assert (folder / "other.pth").is_file() and (folder / "peft").is_dir()


def first_steps(model: Any, path: Path) -> None:
    """Train five steps and save adapter and optimizer."""
    optimizer = torch.optim.AdamW(lorafx.parameters(model), lr=1e-2)
    train(model, (), optimizer=optimizer)
    lorafx.save(model, path, optimizer=optimizer, step=5)


@setup
def training_goes_on() -> float:
    """From a file that all saved to what one process goes on to, and into another wrapping."""
    with shared_folder() as folder:
        torch.manual_seed(5)
        first_steps(wrap(adapted(trainable="head"), auto_wrap_policy=LAYERS),
                    folder / "all.safetensors")
        torch.manual_seed(5)
        alone = adapted(trainable="head")
        optimizer = torch.optim.AdamW(lorafx.parameters(alone), lr=1e-2)
        train(alone, (), split=False, optimizer=optimizer)
        own = folder / f"{dist.get_rank()}.safetensors"
        lorafx.save(alone, own, optimizer=optimizer, step=5)
        if dist.get_rank() == 0:  # whose random generators the file has the states of
            assert_same_file(folder / "all.safetensors", own, rtol=1e-4, atol=1e-6)
        expected = train(alone, (), split=False, optimizer=optimizer)
        model = wrap(lorafx.load(decoder(), folder / "all.safetensors"))
        optimizer = torch.optim.AdamW(lorafx.parameters(model), lr=1e-2)
        assert lorafx.resume(model, optimizer, folder / "all.safetensors") == 5
        found = largest_difference(train(model, (), optimizer=optimizer), expected)
    assert found < 1e-5
    return found


@setup
def switching_after_wrapping() -> float:
    """`activate` of an adapter that was frozen when the model was wrapped, `disabled`, `remove`."""
    whole = two_adapters("head", targets="square")
    model = wrap(two_adapters("head", targets="square"), auto_wrap_policy=LAYERS)
    tokens = batches()[0]
    with lorafx.disabled(model), torch.no_grad():
        torch.testing.assert_close(model(tokens), decoder()(tokens))
    assert lorafx.adapters(model) == ["default", "other"]
    for one in (whole, model):
        lorafx.activate(one, "other")
    found = largest_difference(train(model, lorafx.parameters(model)), one_process(whole))
    assert found < 1e-5
    torch.testing.assert_close(model(tokens), whole(tokens))
    assert str(lorafx.summary(model, norms=False)) == str(lorafx.summary(whole, norms=False))
    assert {row.relative_norm for row in lorafx.summary(model).sites} == {None}
    lorafx.remove(model, "other")
    assert lorafx.adapters(model) == ["default"]
    return found


def refused(action: Callable[[], Any], words: str) -> None:
    with pytest.raises(lorafx.UnsupportedModelError, match=words):
        action()


@setup
def what_comes_too_late() -> None:
    """Each refusal names an order of steps, which is tried here."""
    with shared_folder() as folder:
        path = folder / "trained.safetensors"
        refused(lambda: lorafx.inject(wrap(decoder())), "inject first and shard the result")
        model = wrap(adapted(), auto_wrap_policy=LAYERS)
        train(model, lorafx.parameters(model))
        lorafx.save(model, path)
        first = "give the model its adapters first"
        refused(lambda: lorafx.add(model, "new"), first)
        refused(lambda: lorafx.load(model, path, "new"), first)
        refused(lambda: lorafx.compose(model, {"default": 1.0}, "new"), first)
        refused(lambda: lorafx.rename(model, "default", "new"), "lorafx.rename before that")
        refused(lambda: lorafx.merge(model), "lorafx.load it into the base model")
        refused(lambda: lorafx.eject(model), "lorafx.load it into the base model")
        refused(lambda: lorafx.save(wrap(adapted()).module, folder / "x.pth"), "pass that")
        refused(lambda: lorafx.merge(wrap(adapted()).module), "pass that")
        whole = lorafx.load(decoder(), path)
        expected = model(batches()[0])
        torch.testing.assert_close(lorafx.merge(whole)(batches()[0]), expected)
        lorafx.add(whole, "new", targets="square")
        lorafx.load(whole, path, "again")
        lorafx.compose(whole, {"again": 0.5}, "weaker")
        torch.testing.assert_close(wrap(whole, auto_wrap_policy=LAYERS)(batches()[0]), expected)


@setup
def parameters_that_cannot_be_told_apart() -> None:
    with pytest.raises(ValueError, match="uniform `requires_grad`"):  # says torch
        wrap(adapted(), use_orig_params=False)
    whole = adapted()
    model = wrap(whole, use_orig_params=False, ignored_states=list(lorafx.parameters(whole)))
    refused(lambda: lorafx.summary(model), "use_orig_params=True")


def count_scattered(model: Any) -> list[int]:
    """The sizes of all gradients that FSDP1 will reduce and scatter, as it does so."""
    found: list[int] = []

    def hook(state: DefaultState, gradient: Tensor, part: Tensor) -> None:
        found.append(gradient.numel())
        reduce_scatter_hook(state, gradient, part)

    model.register_comm_hook(DefaultState(model.process_group), hook)
    return found


@setup
def gradients_of_whole_flat_parameters() -> dict[str, int]:
    """FSDP1 reduces those of the frozen parameters too, as it knows flat parameters only."""
    model = wrap(adapted(), auto_wrap_policy=LAYERS)
    reduced = count_scattered(model)
    model(batches()[0]).sum().backward()
    whole = adapted()
    total = sum(parameter.numel() for parameter in whole.parameters())
    mine = sum(parameter.numel() for parameter in lorafx.parameters(whole))
    assert total <= sum(reduced) < total * 1.1  # padded
    return {"reduced": sum(reduced), "parameters": total, "of the adapter": mine}


@setup
def a_sharded_base_and_a_replicated_adapter() -> dict[str, float]:
    """FSDP1 shards what is frozen, DDP reduces the rest, which is exactly the adapter's."""
    whole, alone = adapted(), one_process(adapted())
    sharded = wrap(whole, auto_wrap_policy=LAYERS, ignored_states=list(lorafx.parameters(whole)))
    model = DistributedDataParallel(sharded, init_sync=False)
    scattered, reduced = count_scattered(sharded), count_reduced(model)
    losses = train(model, lorafx.parameters(model))
    mine = sum(parameter.numel() for parameter in lorafx.parameters(model))
    assert sum(reduced) == STEPS * mine and not scattered
    found = largest_difference(losses, alone)
    assert found < 1e-5
    with shared_folder() as folder:
        lorafx.save(model, folder / "all.safetensors")
        again = lorafx.load(decoder(), folder / "all.safetensors")
    torch.testing.assert_close(again(batches()[0]), model(batches()[0]))
    return {"losses": found, "reduced": sum(reduced) // STEPS, "of the adapter": mine}
