"""A tied pair that an adapter trains, and accelerate that keeps one or both of them elsewhere."""

import copy
import logging

import accelerate
import pytest
import torch

import lorafx
from tests.huggingface.test_tied import qwen
from tests.support.oracle import randomise
from tests.support.transformers_models import bert, logits

peft = pytest.importorskip("peft")

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _quiet(caplog):
    """accelerate warns of every model that it offloads."""
    caplog.set_level(logging.ERROR, "accelerate")


def away(where, folder):
    """A tied model, and the same, with a part of it elsewhere."""
    torch.manual_seed(0)
    base = qwen().eval().requires_grad_(False)
    with torch.no_grad():
        base.lm_head.weight.add_(torch.randn_like(base.lm_head.weight) / 50)
    twin = copy.deepcopy(base)
    if where == "cpu_offload":
        return base, accelerate.cpu_offload(twin, CPU)
    if where == "disk_offload":
        return base, accelerate.disk_offload(twin, folder, CPU)
    parts = dict.fromkeys(["model.embed_tokens", "model.layers", "model.norm", "lm_head",
                           "model.rotary_emb"], "cpu")
    twin = accelerate.dispatch_model(twin, parts | {where: "disk"}, offload_dir=folder)
    return base, twin


@pytest.mark.parametrize("trained", ["embed_tokens", "lm_head", "embed_tokens[3:5]"])
@pytest.mark.parametrize("where", ["cpu_offload", "disk_offload", "called"])
def test_ties_that_are_not_seen_are_an_error(trained, where, tmp_path):
    base, dispatched = away("lm_head" if where == "called" else where, tmp_path / "away")
    if where == "called":  # which puts new tensors into modules, each its own
        logits(dispatched)
    before = logits(dispatched)
    config = dict(rank=2, targets="q_proj", trainable=trained)
    lorafx.save(randomise(lorafx.inject(base, **config)), tmp_path / "a.safetensors")
    for verb in (lambda: lorafx.inject(dispatched, **config),
                 lambda: lorafx.load(dispatched, tmp_path / "a.safetensors")):
        with pytest.raises(lorafx.UnsupportedModelError, match="not seen if they are tied: inject"):
            verb()
    model = lorafx.inject(dispatched, targets="q_proj")
    with pytest.raises(lorafx.UnsupportedModelError, match="not seen if they are tied"):
        lorafx.load(model, tmp_path / "a.safetensors", adapter="again")
    assert lorafx.adapters(model) == ["default"]
    assert torch.equal(logits(model), before) and torch.equal(logits(dispatched), before)


def test_what_is_apart_or_by_itself_is_trained_there(tmp_path):
    base, dispatched = away("cpu_offload", tmp_path)
    alone = randomise(lorafx.inject(base, targets="q_proj", trainable=["norm", "*.bias"]))
    lorafx.save(alone, tmp_path / "a.safetensors")
    assert torch.equal(logits(lorafx.load(dispatched, tmp_path / "a.safetensors")), logits(alone))
    zeros = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    with torch.no_grad():
        zeros[0].weight.zero_(), zeros[1].weight.zero_()
    lorafx.inject(accelerate.cpu_offload(zeros, CPU), targets="1", trainable="0")


@pytest.mark.parametrize("where", ["lm_head", "model.embed_tokens"])
@pytest.mark.parametrize("config", [{"trainable": "embed_tokens"}, {"targets": "lm_head"}])
def test_a_tied_pair_of_which_one_is_away_is_merged(where, config, tmp_path):
    base, dispatched = away(where, tmp_path / "away")
    model = randomise(lorafx.inject(base, 2, **{"targets": "q_proj", **config}))
    lorafx.save(model, tmp_path / "a.safetensors")
    loaded = lorafx.load(dispatched, tmp_path / "a.safetensors")
    merged = lorafx.merge(loaded, untie="targets" in config)
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=1e-5)
    assert torch.equal(logits(lorafx.eject(loaded)), logits(base))


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True:UserWarning")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("build, targets, trained", [
    (qwen, "q_proj", "embed_tokens"), (bert, "query", "*.decoder.weight")])
def test_a_peft_folder_has_every_name_of_a_pair_that_is_away(build, targets, trained, tmp_path):
    base = build().eval().requires_grad_(False)
    model = randomise(lorafx.inject(base, 2, targets=targets, trainable=trained))
    want = logits(model)
    accelerate.cpu_offload(model, CPU)
    lorafx.save(model, tmp_path / "folder")
    assert torch.equal(logits(lorafx.load(base, tmp_path / "folder")), want)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "folder").eval()
    torch.testing.assert_close(logits(theirs.get_base_model()), want, rtol=0, atol=1e-5)
