"""Checkpoints of unmerged models: the base's keys, the adapter's, and nothing lost in silence."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

import lorafx
from tests.support.oracle import randomise
from tests.support.transformers_models import IDS, classifier, injected, keys, llama, train


def test_checkpoint_of_a_head_trained_whole(tmp_path):
    """Base keys, adapter keys, no tensor twice: a Trainer saves, resumes, reads the best."""
    base, model = injected(classifier, trainable="classifier")
    again, labels = lorafx.inject(base, rank=2, trainable="classifier"), [0, 1, 2, 0]
    again.load_state_dict(model.state_dict())
    losses = train(model, tmp_path, labels)
    assert train(again, tmp_path, labels, resume=str(tmp_path / "checkpoint-3")) == losses
    assert all(map(torch.equal, lorafx.parameters(again), lorafx.parameters(model)))
    read, report = type(base).from_pretrained(tmp_path / "checkpoint-6", output_loading_info=True)
    assert torch.equal(read(IDS).logits, base(IDS).logits)
    assert report["unexpected_keys"] == set(keys(model))
    assert set(model.state_dict()) == set(base.state_dict()) | set(keys(model))


@pytest.mark.parametrize("assign", [False, True])
def test_a_base_read_into_a_head_trained_whole(assign):
    """What an adapter trains whole: reading a base's state_dict leaves it, ejecting shows it."""
    (_, model), other = injected(classifier, trainable="classifier"), classifier().eval()
    before = [parameter.clone() for parameter in lorafx.parameters(randomise(model))]
    assert model.load_state_dict(
        other.state_dict(), strict=False, assign=assign
    ).missing_keys == keys(model)
    assert all(map(torch.equal, lorafx.parameters(model), before))
    assert model.classifier.weight is next(
        p for n, p in lorafx.named_parameters(model) if n.endswith("default.weight")
    )
    assert torch.equal(lorafx.eject(model)(IDS).logits, other(IDS).logits)
    with lorafx.disabled(model):
        assert torch.equal(model(IDS).logits, other(IDS).logits)
    safetensors.torch.save(model.state_dict())


def test_a_lost_site_is_not_saved_as_if_whole(tmp_path):
    """resize_token_embeddings makes a new untied head: its adapter is gone, and save says so."""
    _, model = injected(llama, targets="linear")
    model.resize_token_embeddings(110, mean_resizing=False)
    with pytest.raises(lorafx.AdapterError, match="no longer at 'lm_head'"):
        lorafx.save(model, tmp_path / "adapter.safetensors")
    model = lorafx.inject(torch.nn.Sequential(torch.nn.Linear(4, 4)))
    model[0].register_parameter("weight", None)
    with pytest.raises(lorafx.AdapterError, match="no longer at '0'"):
        lorafx.save(model, tmp_path / "adapter.safetensors")


class SaveAdapter(transformers.TrainerCallback):
    """As the README of the formats has it."""

    def on_save(self, args, state, control, model, **more):
        folder = f"{args.output_dir}/checkpoint-{state.global_step}"
        lorafx.save(model, f"{folder}/adapter.safetensors")


def test_a_trainer_s_checkpoint_and_what_a_callback_saves_in_it(tmp_path):
    """Both load as the adapter that it has then, with its scale; the former's run goes on."""
    base, model = injected(llama, targets="linear", alpha=6)
    losses = train(model, tmp_path, callbacks=[SaveAdapter()])
    checkpoint = Path(tmp_path, "checkpoint-6")
    again = lorafx.load(base, checkpoint)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert torch.equal(lorafx.load(base, checkpoint / "adapter.safetensors")(IDS).logits,
                       model(IDS).logits)
    half = lorafx.load(base, tmp_path / "checkpoint-3")
    assert not torch.equal(half(IDS).logits, model(IDS).logits)
    fresh = lorafx.inject(base, rank=2, targets="linear", alpha=6)
    assert train(fresh, tmp_path, resume=str(tmp_path / "checkpoint-3")) == losses
