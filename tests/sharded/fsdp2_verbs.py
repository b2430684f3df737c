"""Set-ups of FSDP2 (fully_shard): what lorafx does with a model that is sharded already."""

import copy
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import lorafx
from lorafx import _save as save_module
from tests.support.communication import Communication
from tests.support.sharded import (
    Decoder, Layer, adapted, batches, decoder, largest_difference, loss_of, one_process, train)
from tests.support.torchrun import setup


def shard(model: Any, **policy: Any) -> Any:
    """Each layer, then the root, as everybody does it."""
    for layer in model.layers:
        fully_shard(layer, **policy)
    return fully_shard(model, **policy)


@contextmanager
def shared_folder() -> Iterator[Path]:
    """A new folder that all processes see."""
    made = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(made)
    yield Path(made[0])
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(made[0])


def whole_values(model: Any) -> dict[str, Tensor]:
    """All of an adapter's tensors, gathered by torch alone."""
    found = {}
    for name, parameter in lorafx.named_parameters(model):
        assert isinstance(parameter, DTensor), name
        found[name] = parameter.detach().full_tensor()
    return found


def with_values(model: Any, values: dict[str, Tensor]) -> Any:
    """A model of one process with these values in its adapter."""
    with torch.no_grad():
        for name, parameter in lorafx.named_parameters(model):
            parameter.copy_(values[name])
    return model


def second(model: Any, name: str = "second", rank: int = 8) -> Any:
    """A model with a second adapter, that alone is active and is not zero."""
    torch.manual_seed(6)
    lorafx.add(model, name, rank=rank)
    lorafx.activate(model, name)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in lorafx.parameters(model):
            values = torch.randn(parameter.shape, generator=generator) / 10
            if isinstance(parameter, DTensor):
                values = torch.distributed.tensor.distribute_tensor(
                    values, parameter.device_mesh, parameter.placements)
            parameter.copy_(values)
    return model


@setup
def saved_files_are_the_same_bytes() -> dict[str, int]:
    """Before training, after training, after an eval pass, to each format, without the base."""
    model = shard(adapted())
    with shared_folder() as folder:
        for moment in ("fresh", "trained", "evaluated"):
            if moment == "trained":
                train(model, lorafx.parameters(model))
            if moment == "evaluated":
                with torch.no_grad():
                    model.eval()(batches()[0])
            for ending in (".safetensors", ".pth", ""):
                path = folder / f"{moment}{ending}"
                with Communication() as communication:
                    lorafx.save(model, path)
                assert path.exists()  # for every process, as soon as it is back
                values = whole_values(model)
                assert communication.gathered == sum(value.nbytes for value in values.values())
                if dist.get_rank() == 0:
                    alone = folder / "alone" / path.name
                    lorafx.save(with_values(adapted(), values), alone)
                    _same_files(path, alone)
    return {"gathered": communication.gathered}


def _same_files(ours: Path, theirs: Path) -> None:
    if ours.is_dir():
        assert {file.name for file in ours.iterdir()} == {file.name for file in theirs.iterdir()}
        for file in ours.iterdir():
            assert file.read_bytes() == (theirs / file.name).read_bytes(), file
    else:
        assert ours.read_bytes() == theirs.read_bytes(), ours


@setup
def mixed_precision_saves_float32() -> None:
    model = shard(adapted(), mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    with torch.no_grad():
        model(batches()[0])
    with shared_folder() as folder:
        lorafx.save(model, folder / "adapter.safetensors")
        kept = adapted()
        loaded = lorafx.load(decoder(), folder / "adapter.safetensors")
        values = dict(lorafx.named_parameters(loaded))
        for name, parameter in lorafx.named_parameters(kept):
            assert torch.equal(values[name], parameter)


@setup
def an_error_of_the_first_process_is_raised_in_all() -> list[str]:
    model, found = shard(adapted()), []
    with shared_folder() as folder:
        if dist.get_rank() == 0:
            (folder / "taken.pth").mkdir()
        dist.barrier()
        with pytest.raises(lorafx.FormatError, match="is a folder: name a file in it") as caught:
            lorafx.save(model, folder / "taken.pth")
        found.append(str(caught.value))
        with pytest.MonkeyPatch.context() as patch:
            if dist.get_rank() == 0:
                patch.setattr(save_module, "write_adapter", _full_disk)
            with pytest.raises(OSError, match="No space left on device"):
                lorafx.save(model, folder / "adapter.safetensors")
        lorafx.save(model, folder / "adapter.safetensors")  # and all are in step again
    return found


def _full_disk(*_: Any) -> None:
    raise OSError(28, "No space left on device")


@setup
def what_each_process_has_whole_each_saves() -> None:
    """Whoever calls save on a model that is not spread waits for nobody."""
    model = adapted()
    with tempfile.TemporaryDirectory() as folder:
        if dist.get_rank() == 1:
            lorafx.save(model, Path(folder) / "adapter.safetensors")
            assert (Path(folder) / "adapter.safetensors").exists()


@setup
def a_run_is_resumed() -> float:
    alone = one_process(adapted())
    with shared_folder() as folder:
        path = folder / "run.safetensors"
        model = shard(adapted())
        optimizer = torch.optim.AdamW(lorafx.parameters(model), lr=1e-2)
        losses = train(model, (), optimizer=optimizer, steps=slice(2))
        lorafx.save(model, path, optimizer=optimizer, step=2)
        model = shard(lorafx.load(decoder(), path))
        with torch.no_grad():
            model(batches()[0])  # its parameters are whole now
        optimizer = torch.optim.AdamW(lorafx.parameters(model), lr=1e-2)
        assert lorafx.resume(model, optimizer, path) == 2
        losses += train(model, (), optimizer=optimizer, steps=slice(2, None))
        dist.barrier()
        one = lorafx.load(decoder(), path)  # and a run of many goes on in one
        optimizer = torch.optim.AdamW(lorafx.parameters(one), lr=1e-2)
        lorafx.resume(one, optimizer, path)
        rest = train(one, (), split=False, optimizer=optimizer, steps=slice(2, None))
    found = max(largest_difference(losses, alone), largest_difference(rest, alone[2:]))
    assert found < 1e-5
    return found


@setup
def an_adapter_added_later_trains() -> float:
    """Its gradients, clipped, and the losses are those of one process."""
    model, alone = second(shard(adapted())), second(adapted())
    for moment in ("fresh", "trained"):
        _compare_gradients(model, alone)
        ours = train(model, lorafx.parameters(model))
        found = largest_difference(ours, one_process(alone))
        assert found < 1e-5, moment
    assert isinstance(model.layers[0], FSDPModule) and isinstance(model.layers[0], Layer)
    return found


def _compare_gradients(model: Any, alone: Any) -> None:
    tokens = batches()[0]
    part = tokens.chunk(dist.get_world_size())[dist.get_rank()]
    loss_of(model(part), part).backward()
    loss_of(alone(tokens), tokens).backward()
    norms = [nn.utils.clip_grad_norm_(lorafx.parameters(which), 0.01) for which in (model, alone)]
    torch.testing.assert_close(norms[0].full_tensor(), norms[1], atol=1e-6, rtol=1e-5)
    theirs = dict(lorafx.named_parameters(alone))
    for name, parameter in lorafx.named_parameters(model):
        gradient = parameter.grad.full_tensor()
        torch.testing.assert_close(gradient, theirs[name].grad, atol=1e-7, rtol=1e-4)


@setup
def gradients_of_an_adapter_added_later_are_reduced_once() -> dict[str, int]:
    model = second(shard(adapted()))
    tokens = batches()[0].chunk(dist.get_world_size())[dist.get_rank()]
    loss = loss_of(model(tokens), tokens)
    with Communication() as communication:
        loss.backward()
    expected = 4 * sum(parameter.numel() for parameter in lorafx.parameters(model))
    assert communication.reduced == expected, (communication.reduced, expected)
    return {"reduced": communication.reduced}


@setup
def new_sites_after_sharding() -> float:
    """An adapter of sites that had no branch when the model was sharded."""
    models = [adapted(targets=["*.q"]), adapted(targets=["*.q"])]
    shard(models[0])
    for model in models:
        torch.manual_seed(8)
        lorafx.add(model, "wide", targets="linear")
        lorafx.activate(model, ["default", "wide"])
    found = largest_difference(train(models[0], lorafx.parameters(models[0])),
                               one_process(models[1]))
    assert found < 1e-5
    return found


@setup
def loaded_composed_removed_and_chosen() -> float:
    """load, compose, remove, activate and disabled on a sharded model, against one process."""
    models = [shard(adapted()), adapted()]
    tokens = batches()[0]
    with shared_folder() as folder, torch.no_grad():
        path = folder / "other.safetensors"
        if dist.get_rank() == 0:
            lorafx.save(second(adapted()), path, "second")
        dist.barrier()
        for model in models:
            assert lorafx.load(model, path) is model
            lorafx.compose(model, {"default": 0.5, "second": 2.0}, "sum")
        found = []
        for which in ("default", "second", {"default": 0.5, "second": 2.0}, "sum", []):
            for model in models:
                lorafx.activate(model, which)
            found.append(_outputs_differ(models, tokens))
        for model in models:
            lorafx.activate(model, "default")
            lorafx.remove(model, "second")
            assert lorafx.adapters(model) == ["default", "sum"]
        found.append(_outputs_differ(models, tokens))
        with lorafx.disabled(models[0]), lorafx.disabled(models[1]):
            found.append(_outputs_differ(models, tokens))
            torch.testing.assert_close(models[0](tokens), decoder()(tokens))
    return max(found)


def _outputs_differ(models: list[Any], tokens: Tensor) -> float:
    ours, theirs = (model(tokens) for model in models)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    return float((ours - theirs).detach().abs().max())


@setup
def activate_reaches_unsharded_parameters() -> float:
    """Two adapters of one model, in turn, each after a pass that left the other unsharded."""
    models = []
    for sharded in (True, False):
        model = adapted()
        torch.manual_seed(5)
        lorafx.add(model, "other", rank=2)
        models.append(shard(model) if sharded else model)
    for name in ("default", "other", "default"):
        for model in models:
            with torch.no_grad():
                model(batches()[0])
            lorafx.activate(model, name)
        ours = train(models[0], lorafx.parameters(models[0]))
        found = largest_difference(ours, one_process(models[1]))
        assert found < 1e-5, name
    return found


@setup
def nothing_active_at_first() -> float:
    """FSDP2 looks at what trains when the first forward pass begins."""
    models = [adapted(), adapted()]
    shard(models[0])
    for model in models:
        lorafx.activate(model, [])
    with torch.no_grad():
        models[0](batches()[0])
    for model in models:
        lorafx.activate(model, "default")
    found = largest_difference(train(models[0], lorafx.parameters(models[0])),
                               one_process(models[1]))
    assert found < 1e-5
    return found


@setup
def merged_and_ejected() -> float:
    """A plain model of the original class, in each process, that trains and can be copied."""
    tokens, found = batches()[0], []
    config = {"targets": "linear", "trainable": "norm"}
    model, alone = shard(adapted(**config)), adapted(**config)
    hooked: list[Any] = []
    model.layers[0].q.register_forward_hook(lambda *given: hooked.append(given))
    with torch.no_grad():
        model(tokens)
    expected = {"merge": lorafx.merge(alone), "eject": lorafx.eject(alone)}
    for verb, plain in expected.items():
        made = getattr(lorafx, verb)(model)
        assert type(made) is Decoder and type(made.layers[0]) is Layer
        assert type(made.layers[0].q) is nn.Linear and made.layers[0].q._forward_hooks
        assert list(made.state_dict()) == list(plain.state_dict())
        for name, parameter in made.named_parameters():
            assert type(parameter) is nn.Parameter, name
            assert parameter.requires_grad == plain.get_parameter(name).requires_grad
            torch.testing.assert_close(parameter, plain.get_parameter(name), atol=0, rtol=0)
        count = len(hooked)
        loss_of(copy.deepcopy(made)(tokens), tokens).backward()
        assert len(hooked) == count + 1
        found.append(_outputs_differ([made, plain], tokens))
        made.load_state_dict(plain.state_dict())
    assert train(model, lorafx.parameters(model))  # it is what it was
    return max(found)


@setup
def merged_with_an_adapter_added_later() -> None:
    merged = lorafx.merge(second(shard(adapted())))
    for name, parameter in lorafx.merge(second(adapted())).named_parameters():
        torch.testing.assert_close(merged.get_parameter(name), parameter, atol=0, rtol=0)


@setup
def the_summary_is_that_of_one_process() -> str:
    model = shard(adapted())
    with torch.no_grad():
        model(batches()[0])
    assert str(lorafx.summary(model)) == str(lorafx.summary(adapted()))
    names = [name for name, _ in lorafx.named_parameters(model)]
    assert names == [name for name, _ in lorafx.named_parameters(adapted())]
    return lorafx.summary(model).headline()


@setup
def injected_after_sharding() -> str:
    """Refused, and the order that the sentence names works."""
    with pytest.raises(lorafx.UnsupportedModelError) as caught:
        lorafx.inject(shard(decoder()))
    assert str(caught.value).endswith("inject first and shard the result.")
    assert type(shard(lorafx.inject(decoder())).layers[0].q.lora.default.A) is not nn.Parameter
    return str(caught.value)


@setup
def refused_when_sharded() -> list[str]:
    """What FSDP2 would not reduce: each says what, and the order it names works."""
    found = []
    model = shard(adapted())
    before = list(model.state_dict())
    with pytest.raises(lorafx.UnsupportedModelError, match="before fully_shard") as caught:
        lorafx.add(model, "other", trainable="norm")
    found.append(str(caught.value))
    assert list(model.state_dict()) == before and lorafx.adapters(model) == ["default"]
    ignoring = adapted(targets="*.q")
    fully_shard(ignoring, ignored_params={ignoring.head.weight})
    with pytest.raises(lorafx.UnsupportedModelError, match="FSDP ignores") as caught:
        lorafx.add(ignoring, "other", targets="head")
    found.append(str(caught.value))
    shape = dist.get_world_size() // 2, 2
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "model"))
    twice = adapted()
    parallelize_module(twice, mesh["model"], {"layers.*.up": ColwiseParallel()})
    shard(twice, mesh=mesh["data"])
    for refused in (lambda: lorafx.add(twice, "other"), lambda: lorafx.merge(twice)):
        with pytest.raises(lorafx.UnsupportedModelError, match="tensor parallelism") as caught:
            refused()
        found.append(str(caught.value))
    for order in ({"trainable": "norm"}, {"targets": "head"}):
        model = adapted()
        lorafx.add(model, "other", **order)
        lorafx.activate(model, "other")
        train(shard(model), lorafx.parameters(model))
    return found


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
