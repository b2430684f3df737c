"""Models that accelerate dispatches, before or after injection: the same numbers, or a sentence."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
import transformers
from accelerate.hooks import remove_hook_from_submodules
from torch import fx, nn

import lorafx
from tests.support.internals import replace_internal
from tests.support.oracle import frozen
from tests.support.sharded import batches, decoder, loss_of
from tests.support.transformers_models import IDS, llama

CPU, TOKENS = torch.device("cpu"), batches()[0]
Dispatch = Callable[[Any], Any]


@pytest.fixture(autouse=True)
def _quiet(caplog):
    """accelerate warns of every model that it offloads."""
    caplog.set_level(logging.ERROR, "accelerate")


@pytest.fixture(autouse=True)
def _in_factors(monkeypatch):
    """W + s B A, which is never formed where a hook brings W, would round in another way."""
    replace_internal(monkeypatch, "merge_from", float("inf"))


def map_of(offloaded):
    """A device for each part of a decoder, that of the last layer and the head elsewhere."""
    parts = dict.fromkeys(["embedding", "layers.0", "norm"], "cpu")
    return parts | {"layers.1": offloaded, "head": offloaded}


def llama_map(offloaded):
    parts = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb"]
    return dict.fromkeys(parts, "cpu") | {"model.layers.1": offloaded, "lm_head": offloaded}


def tied():
    """A decoder whose head shares its embedding's weight."""
    model = decoder()
    model.head.weight = model.embedding.weight
    return model


@pytest.fixture(params=["one", "by_layer", "disk", "cpu_offload", "disk_offload", "with_hook"])
def dispatch(request, tmp_path) -> Dispatch:
    """A function that dispatches a model."""
    count = iter(range(9))
    return {
        "one": lambda m: accelerate.dispatch_model(m, {"": "cpu"}, force_hooks=True),
        "by_layer": lambda m: accelerate.dispatch_model(m, map_of("cpu"), force_hooks=True),
        "disk": lambda m: accelerate.dispatch_model(
            m, map_of("disk"), offload_dir=tmp_path / f"{next(count)}"),
        "cpu_offload": lambda m: accelerate.cpu_offload(m, CPU),
        "disk_offload": lambda m: accelerate.disk_offload(m, tmp_path / f"{next(count)}", CPU),
        "with_hook": lambda m: accelerate.cpu_offload_with_hook(m, CPU)[0],
    }[request.param]


def adapted(base, **config):
    """A model with an adapter that is not zero, drawn the same way wherever its tensors are."""
    torch.manual_seed(1)
    model = lorafx.inject(base, **{"rank": 4, "targets": "linear", "exclude": "*head", **config})
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in lorafx.parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def logits(model):
    tokens = IDS if isinstance(model, transformers.PreTrainedModel) else TOKENS
    found = model(tokens)
    return getattr(found, "logits", found).detach()


def loss(model):
    if isinstance(model, transformers.PreTrainedModel):
        return model(IDS, labels=IDS).loss
    return loss_of(model(TOKENS), TOKENS)


def losses(model):
    """Of five steps of AdamW."""
    optimizer, found = torch.optim.AdamW(lorafx.parameters(model), lr=1e-2), []
    for _ in range(5):
        value = loss(model)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        found.append(float(value.detach()))
    return found


def is_offloaded(model):
    return any(parameter.is_meta for parameter in model.parameters())


def same(found, wanted):
    """W may lie elsewhere in a line of a cache, for which some processors add up otherwise."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def check_everything(model, base, alone, tmp_path):
    """A dispatched model does what the undispatched one does, but for training."""
    want = logits(alone)
    same(logits(model), want)
    with lorafx.disabled(model):
        same(logits(model), logits(frozen(base)))
    lorafx.save(model, tmp_path / "saved.safetensors", adapter="default")
    same(logits(lorafx.load(base, tmp_path / "saved.safetensors")), want)
    merged, ejected = lorafx.merge(model), lorafx.eject(model)
    assert type(merged) is type(ejected) is type(base)
    same(logits(merged), logits(lorafx.merge(alone)))
    same(logits(ejected), logits(base))
    same(logits(copy.deepcopy(model)), want)
    assert lorafx.summary(model).sites and lorafx.sites(model)
    lorafx.add(model, "other")
    lorafx.activate(model, ["default", "other"])
    same(logits(model), want)
    lorafx.activate(model, "other")
    lorafx.load(model, tmp_path / "saved.safetensors", adapter="again")
    lorafx.activate(model, "again")
    same(logits(model), want)
    lorafx.rename(model, "again", "renamed")
    same(logits(model), want)
    lorafx.remove(model, "renamed")
    lorafx.activate(model, "default")


@pytest.mark.parametrize("build", [decoder, tied])
def test_dispatched_then_injected(build, dispatch, tmp_path):
    base = build()
    alone, dispatched = adapted(copy.deepcopy(base)), dispatch(copy.deepcopy(base))
    model = adapted(dispatched)
    assert is_offloaded(model) == is_offloaded(dispatched)
    check_everything(model, base, alone, tmp_path)
    assert torch.equal(logits(dispatched), logits(base))
    assert losses(model) == pytest.approx(losses(alone), abs=1e-6)
    assert torch.equal(logits(dispatched), logits(base))


@pytest.mark.parametrize("build", [decoder, tied])
def test_injected_then_dispatched(build, dispatch, tmp_path):
    base = build()
    alone = adapted(copy.deepcopy(base))
    model = dispatch(adapted(copy.deepcopy(base)))
    check_everything(model, base, alone, tmp_path)
    if is_offloaded(model):
        with pytest.raises(lorafx.AdapterError, match="training would not reach them"):
            loss(model).backward()
        with pytest.raises(lorafx.AdapterError, match="dispatch the base model first"):
            list(lorafx.parameters(model))
        remove_hook_from_submodules(model)
    assert losses(model) == pytest.approx(losses(alone), abs=1e-6)


def test_modules_trained_whole(dispatch, tmp_path):
    base, config = decoder(), {"targets": "*q", "trainable": "head", "exclude": ()}
    alone = adapted(copy.deepcopy(base), **config)
    for model in (adapted(dispatch(copy.deepcopy(base)), **config),
                  dispatch(adapted(copy.deepcopy(base), **config))):
        check_everything(model, base, alone, tmp_path)
    if is_offloaded(model):
        with pytest.raises(lorafx.AdapterError, match="training would not reach them"):
            loss(model).backward()


@pytest.mark.parametrize("removed", ["before", "after"])
def test_hooks_are_removed(removed, dispatch):
    base = decoder()
    alone, dispatched = adapted(copy.deepcopy(base)), dispatch(copy.deepcopy(base))
    if removed == "before":
        remove_hook_from_submodules(dispatched)
    model = adapted(dispatched)
    remove_hook_from_submodules(model)
    assert not is_offloaded(model) and torch.equal(logits(model), logits(alone))
    for each in (model, alone):
        lorafx.add(each, "head", targets="head", rank=2)
        with torch.no_grad():
            each.head.lora.head.A.fill_(0.1)
            each.head.lora.head.B.fill_(0.1)
        lorafx.activate(each, ["default", "head"])
    assert torch.equal(logits(model), logits(alone))
    assert losses(model) == pytest.approx(losses(alone), abs=1e-6)


def test_a_copy_of_a_dispatched_model_moves_itself():
    dispatched = accelerate.dispatch_model(decoder(), {"": "cpu"}, force_hooks=True)
    model = lorafx.inject(dispatched)
    assert model.to(torch.float64) is model
    assert model.layers[0].q.frozen_weight.dtype is torch.float64
    assert dispatched.layers[0].q.weight.dtype is torch.float32


@pytest.mark.parametrize("where", ["cpu", llama_map("cpu"), llama_map("disk")])
def test_from_pretrained(where, tmp_path):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    alone = adapted(copy.deepcopy(base))
    lorafx.save(alone, tmp_path / "saved.safetensors")
    model = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "base", device_map=where, offload_folder=tmp_path / "offloaded")
    assert is_offloaded(model) == ("disk" in where.values() if isinstance(where, dict) else False)
    same(logits(lorafx.load(model, tmp_path / "saved.safetensors")), logits(alone))
    injected = adapted(model)
    check_everything(injected, base, alone, tmp_path)
    assert losses(injected) == pytest.approx(losses(alone), abs=1e-6)


@pytest.mark.parametrize("offloaded", ["cpu", "disk"])
def test_an_empty_model_is_loaded_and_dispatched_then_injected(offloaded, tmp_path):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    with accelerate.init_empty_weights():
        empty = transformers.LlamaForCausalLM(base.config)
    model = accelerate.load_checkpoint_and_dispatch(
        empty, tmp_path / "base", device_map=llama_map(offloaded), force_hooks=True,
        offload_folder=tmp_path / "offloaded")
    assert torch.equal(logits(adapted(model)), logits(adapted(base)))


def test_prepared_by_an_accelerator():
    base, accelerator = decoder(), accelerate.Accelerator(cpu=True)
    alone = losses(adapted(copy.deepcopy(base)))
    model = adapted(base)
    optimizer = torch.optim.AdamW(lorafx.parameters(model), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    found = []
    for _ in range(5):
        value = loss(model)
        optimizer.zero_grad()
        accelerator.backward(value)
        optimizer.step()
        found.append(float(value.detach()))
    assert found == pytest.approx(alone, abs=1e-6)


def test_blocks_that_are_offloaded_whole(tmp_path):
    """preload_module_classes: a hook brings what all modules below its own hold."""
    def offload(model):
        return accelerate.cpu_offload(model, CPU, preload_module_classes=["Layer"])

    base = decoder()
    with pytest.raises(lorafx.UnsupportedModelError, match="inject first and dispatch the result"):
        lorafx.inject(offload(copy.deepcopy(base)))
    alone, injected = adapted(copy.deepcopy(base)), adapted(copy.deepcopy(base))
    parameters = list(lorafx.parameters(injected))
    model = offload(injected)
    assert torch.equal(logits(model), logits(alone)) and parameters
    with pytest.raises(lorafx.AdapterError, match="training would not reach them"):
        loss(model).backward()
    for verb in (lorafx.merge, lambda m: lorafx.add(m, "other"),
                 lambda m: lorafx.rename(m, "default", "other"),
                 lambda m: lorafx.save(m, tmp_path / "saved.safetensors")):
        with pytest.raises(lorafx.UnsupportedModelError, match="remove_hook_from_submodules"):
            verb(model)
    remove_hook_from_submodules(model)
    assert torch.equal(logits(lorafx.merge(model)), logits(lorafx.merge(alone)))
    assert losses(model) == pytest.approx(losses(alone), abs=1e-6)


def test_graph_modules():
    """accelerate replaces the forward of their class, which a new graph replaces again."""
    base = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    x = torch.randn(2, 4)
    with pytest.raises(lorafx.UnsupportedModelError, match="inject first and dispatch the result"):
        lorafx.inject(accelerate.dispatch_model(copy.deepcopy(base), {"": "cpu"}, force_hooks=True))
    model = lorafx.inject(base)
    want = model(x)
    model = accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert torch.equal(model(x), want)
    for verb in (lorafx.merge, lorafx.eject, lambda m: lorafx.add(m, "other")):
        with pytest.raises(lorafx.UnsupportedModelError, match="remove_hook_from_submodules"):
            verb(model)
    remove_hook_from_submodules(model)
    assert torch.equal(lorafx.merge(model)(x), want)


def test_another_tools_forward_below_accelerates_is_refused():
    model = nn.Linear(4, 4)
    model.forward = lambda x: x
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    with pytest.raises(lorafx.UnsupportedModelError, match="inject before patching"):
        lorafx.inject(model)
