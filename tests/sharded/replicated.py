"""Set-ups of DDP (DistributedDataParallel), and of a model that torch.compile wraps."""

import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lorafx
from tests.support.sharded import (
    STEPS, adapted, assert_same_file, batches, count_reduced, decoder, largest_difference, loss_of,
    one_process, shared_folder, train
)
from tests.support.torchrun import setup


@setup
def losses_and_what_is_reduced() -> dict[str, float]:
    model = DistributedDataParallel(adapted(trainable="head"))
    reduced = count_reduced(model)
    losses = train(model, lorafx.parameters(model))
    mine = sum(parameter.numel() for parameter in lorafx.parameters(model))
    assert sum(reduced) == STEPS * mine
    found = largest_difference(losses, one_process(adapted(trainable="head")))
    assert found < 1e-5
    return {"losses": found, "reduced": sum(reduced) // STEPS, "of the adapter": mine}


@setup
def other_ways_to_wrap() -> dict[str, float]:
    alone, found = one_process(adapted()), {}
    for option in ("static_graph", "find_unused_parameters", "gradient_as_bucket_view"):
        model = DistributedDataParallel(adapted(), **{option: True})
        found[option] = largest_difference(train(model, lorafx.parameters(model)), alone)
    compiled = torch.compile(adapted(), backend="eager")
    model = DistributedDataParallel(compiled)
    found["of a compiled model"] = largest_difference(
        train(model, lorafx.parameters(model)), alone)
    model = torch.compile(DistributedDataParallel(adapted()), backend="eager")
    found["compiled"] = largest_difference(train(model, lorafx.parameters(model)), alone)
    for name, difference in found.items():
        assert difference < 1e-5, name
    return found


def accumulated(model: Any, parts: list[torch.Tensor], pause: Callable[[], Any]) -> list[Any]:
    """The gradients of several parts of a batch together, of which the last ends the pause."""
    with pause():
        for part in parts[:-1]:
            (loss_of(model(part), part) / len(parts)).backward()
    (loss_of(model(parts[-1]), parts[-1]) / len(parts)).backward()
    return [parameter.grad for parameter in lorafx.parameters(model)]


@setup
def gradients_that_accumulate() -> None:
    tokens, size = batches()[0], dist.get_world_size()
    own = tokens.chunk(size)[dist.get_rank()]
    model = DistributedDataParallel(adapted())
    ours = accumulated(model, list(own.chunk(2)), model.no_sync)
    whole = adapted()
    loss_of(whole(tokens), tokens).backward()
    for gradient, parameter in zip(ours, lorafx.parameters(whole), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)


def wrapped() -> dict[str, Any]:
    """The same model behind each kind of wrapper, and behind two."""
    return {"DDP": DistributedDataParallel(adapted()),
            "compile": torch.compile(adapted(), backend="eager"),
            "DDP of compile": DistributedDataParallel(torch.compile(adapted(), backend="eager")),
            "compile of DDP": torch.compile(DistributedDataParallel(adapted()), backend="eager")}


@setup
def all_functions_take_the_wrapper() -> None:
    whole, tokens = adapted(), batches()[0]
    names = [name for name, _ in lorafx.named_parameters(whole)]
    for model in wrapped().values():
        assert [name for name, _ in lorafx.named_parameters(model)] == names
        assert len(list(lorafx.parameters(model))) == len(names)
        assert str(lorafx.summary(model, norms=False)) == str(lorafx.summary(whole, norms=False))
        with lorafx.disabled(model):
            torch.testing.assert_close(model(tokens), decoder()(tokens))
        merged, ejected = lorafx.merge(model), lorafx.eject(model)
        assert type(merged) is type(ejected) is type(decoder())
        torch.testing.assert_close(merged(tokens), whole(tokens))
        assert torch.equal(ejected(tokens), decoder()(tokens))
        lorafx.compose(model, {"default": 1.0}, "same")
        lorafx.rename(model, "same", "equal")
        assert lorafx.adapters(model) == ["default", "equal"]
        lorafx.activate(model, "default")
        torch.testing.assert_close(model(tokens), whole(tokens))
        lorafx.remove(model, "equal")
        assert lorafx.adapters(model) == ["default"]


@setup
def a_file_is_that_of_one_process() -> None:
    """Where all of the processes save, and where the first one does alone."""
    whole = adapted()
    with shared_folder() as folder:
        lorafx.save(whole, folder / f"{dist.get_rank()}.safetensors")
        for model in wrapped().values():
            if dist.get_rank() == 0:
                lorafx.save(model, folder / "first.safetensors")
            lorafx.save(model, folder / "all.safetensors")
            dist.barrier()
            for name in ("first", "all"):
                assert_same_file(folder / f"{name}.safetensors", folder / "0.safetensors")
            assert lorafx.load(model, folder / "all.safetensors", "again") is model
            assert lorafx.adapters(model) == ["default", "again"]


@setup
def training_goes_on() -> float:
    with shared_folder() as folder:
        path = folder / "training.safetensors"
        model = DistributedDataParallel(adapted())
        optimizer = torch.optim.AdamW(lorafx.parameters(model), lr=1e-2)
        train(model, (), optimizer=optimizer)
        lorafx.save(model, path, optimizer=optimizer, step=STEPS)
        expected = train(model, (), optimizer=optimizer)
        dist.barrier()
        again = DistributedDataParallel(lorafx.load(decoder(), path))
        optimizer = torch.optim.AdamW(lorafx.parameters(again), lr=1e-2)
        assert lorafx.resume(again, optimizer, path) == STEPS
        found = largest_difference(train(again, (), optimizer=optimizer), expected)
    assert found < 1e-5
    return found


def with_another() -> Any:
    """A decoder with a second adapter, that is not active."""
    model = adapted()
    lorafx.add(model, "other", rank=2, targets="square")
    return model


@setup
def what_ddp_does_not_reduce() -> float:
    """`activate` of what was frozen or not there yet is refused; the order it names is tried."""
    alone = with_another()
    lorafx.activate(alone, "other")
    path = tempfile.mkdtemp() + "/other.safetensors"
    lorafx.save(alone, path)
    expected = one_process(alone)
    frozen, added = DistributedDataParallel(with_another()), DistributedDataParallel(adapted())
    lorafx.add(added, "other", rank=2, targets="square")
    for model in (frozen, added):
        for which in ("other", ["default", "other"]):
            with pytest.raises(lorafx.UnsupportedModelError, match="wrap that again"):
                lorafx.activate(model, which)
        with torch.inference_mode(), pytest.raises(lorafx.UnsupportedModelError):
            lorafx.activate(model, "other")
        with pytest.raises(lorafx.UnsupportedModelError, match="those of what takes its place"):
            lorafx.load(model, path, adapter="default", replace=True)
        lorafx.load(model, path, replace=True)
        for which in ("default", []):
            lorafx.activate(model, which)
    lorafx.activate(frozen.module, "other")
    again = DistributedDataParallel(frozen.module)
    lorafx.activate(again, "other")
    found = largest_difference(train(again, lorafx.parameters(again)), expected)
    assert found < 1e-5
    return found


@setup
def a_wrapper_of_a_base_is_refused() -> None:
    base: nn.Module = decoder()
    with pytest.raises(lorafx.UnsupportedModelError, match="inject into model.module and wrap"):
        lorafx.inject(DistributedDataParallel(base))
    model = DistributedDataParallel(base)
    again = DistributedDataParallel(lorafx.inject(model.module, targets="linear"))
    torch.testing.assert_close(again(batches()[0]), base(batches()[0]))
