"""Set-ups of FSDP2 (fully_shard): what lorafx does with a model that is sharded already."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import lorafx
from tests.sharded.fsdp2_files import shard, shared_folder
from tests.support.sharded import (
    Decoder, Layer, adapted, batches, decoder, largest_difference, loss_of, one_process,
    reduces_the_adapter_only, train)
from tests.support.torchrun import setup


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
                values = distribute_tensor(
                    values, parameter.device_mesh, parameter.placements)
            parameter.copy_(values)
    return model


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
    return {"reduced": reduces_the_adapter_only(second(shard(adapted()))).reduced}


@setup
def sharded_within_replicas() -> float:
    """A mesh of two dimensions: trained, saved, with an adapter added later, merged."""
    shape = dist.get_world_size() // 2, 2
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards"))
    model, alone = shard(adapted(), mesh=mesh), adapted()
    for names in (["default"], ["default", "second"]):
        if "second" in names:
            second(model), second(alone)
        for which in (model, alone):
            lorafx.activate(which, names)
        ours = train(model, lorafx.parameters(model))
        found = largest_difference(ours, one_process(alone))
        assert found < 1e-5
    with shared_folder() as folder:
        lorafx.save(model, folder / "adapter.safetensors", "second")
        assert (folder / "adapter.safetensors").exists()
    for ours, theirs in zip(lorafx.merge(model).parameters(), lorafx.merge(alone).parameters()):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    return found


@setup
def new_sites_after_sharding() -> float:
    """An adapter of sites, and modules trained whole, that had none when it was sharded."""
    models = [adapted(targets=["*.q"]), adapted(targets=["*.q"])]
    shard(models[0])
    for model in models:
        torch.manual_seed(8)
        lorafx.add(model, "wide", targets="linear", trainable=["norm", "embedding", "*.0.norm"])
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
            lorafx.compose(model, {"default": 0.5, "second": 2.0}, "near", rank=1)
            lorafx.rename(model, "sum", "both")
        found = []
        for which in ("default", "second", {"default": 0.5, "second": 2.0}, "both", "near", []):
            for model in models:
                lorafx.activate(model, which)
            found.append(_outputs_differ(models, tokens))
        for model in models:
            lorafx.activate(model, "default")
            lorafx.remove(model, "second")
            assert lorafx.adapters(model) == ["default", "both", "near"]
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
def what_trains_has_another_dtype() -> float:
    """FSDP2 notes the dtypes of what trains once, in the first forward pass."""
    models = [adapted(), adapted()]
    for model in models:
        torch.manual_seed(5)
        lorafx.add(model, "wide", dtype=torch.float64)
    shard(models[0])
    for name in ([], "default", "wide"):
        for model in models:
            lorafx.activate(model, name)
        if name:
            ours = train(models[0], lorafx.parameters(models[0]))
            found = largest_difference(ours, one_process(models[1]))
            assert found < 1e-5, name
        else:
            with torch.no_grad():
                models[0](batches()[0])
    flags = [parameter.requires_grad for parameter in models[0].parameters()]
    with pytest.raises(lorafx.AdapterError, match="adapters of several dtypes cannot train"):
        lorafx.activate(models[0], ["default", "wide"])
    assert [parameter.requires_grad for parameter in models[0].parameters()] == flags
    _outputs_differ(models, batches()[0])
    return found


@setup
def nothing_active_at_first_in_mixed_precision() -> None:
    model = shard(adapted(), mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    lorafx.activate(model, [])
    with torch.no_grad():
        model(batches()[0])
    lorafx.activate(model, "default")
    losses = train(lambda tokens: model(tokens).float(), lorafx.parameters(model))
    assert largest_difference(losses, one_process(adapted())) < 1e-2


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
    errors = lorafx.merge_error(alone, dtype=torch.bfloat16)
    assert 1e-4 < max(errors.values()) <= 1
    assert lorafx.merge_error(model, dtype=torch.bfloat16) == pytest.approx(errors, rel=1e-3)
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
    assert str(lorafx.summary(model, norms=False)) == str(lorafx.summary(adapted(), norms=False))
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
    ignoring = adapted(targets="*.q")
    fully_shard(ignoring, ignored_params={ignoring.head.weight, ignoring.norm.weight})
    before = list(ignoring.state_dict())
    for refused in ({"targets": "head"}, {"trainable": "norm"}):
        with pytest.raises(lorafx.UnsupportedModelError, match="FSDP ignores") as caught:
            lorafx.add(ignoring, "other", **refused)
        found.append(str(caught.value))
        assert list(ignoring.state_dict()) == before and lorafx.adapters(ignoring) == ["default"]
    shape = dist.get_world_size() // 2, 2
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "model"))
    plan = {"layers.*.up": ColwiseParallel(), "layers.*.down": RowwiseParallel()}
    twice = adapted()
    parallelize_module(twice, mesh["model"], plan)
    shard(twice, mesh=mesh["data"])
    for refused in (lambda: lorafx.add(twice, "other"), lambda: lorafx.merge(twice)):
        with pytest.raises(lorafx.UnsupportedModelError, match="tensor parallelism") as caught:
            refused()
        found.append(str(caught.value))
    twice = adapted()  # and the order that they name
    lorafx.add(twice, "other", trainable="norm")
    lorafx.activate(twice, "other")
    parallelize_module(twice, mesh["model"], plan)
    shard(twice, mesh=mesh["data"])
    train(twice, lorafx.parameters(twice), split=False)
    return found
