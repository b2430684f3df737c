"""A tied pair that is trained whole is one tensor: in memory, in checkpoints, in all files."""

import copy

import pytest
import safetensors.torch
import torch
import transformers

import lorafx
from tests.support.oracle import randomise
from tests.support.transformers_models import bert, gpt2, logits, maker, t5, SIZES

peft = pytest.importorskip("peft")

qwen = maker(transformers.Qwen2ForCausalLM, **SIZES, num_key_value_heads=2,
             tie_word_embeddings=True)
PAIRS = [
    (qwen, "q_proj", "embed_tokens"), (qwen, "q_proj", "lm_head"), (gpt2, "c_attn", "wte"),
    (gpt2, "c_attn", "lm_head"), (bert, "query", "word_embeddings"), (bert, "query", "decoder"),
    (t5, "q", "shared"), (t5, "q", "lm_head")]


@pytest.fixture(params=PAIRS, ids=lambda pair: f"{pair[0].__name__}-{pair[2]}")
def pair(request):
    """A base, what is injected into it, and how."""
    build, targets, trained = request.param
    torch.manual_seed(0)
    base = build().eval().requires_grad_(False)
    with torch.no_grad():  # of which some are zero, as BERT's decoder's
        for parameter in base.parameters():
            parameter.add_(torch.randn_like(parameter) / 50)
    config = dict(rank=2, targets=targets, trainable=trained)
    model = randomise(lorafx.inject(base, **config))
    assert not torch.allclose(logits(model), logits(base), atol=1e-2)
    return base, model, config


def tied(model) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def plain_of(folder, base):
    return type(base).from_pretrained(folder).eval().requires_grad_(False)


def test_both_names_train_the_same_and_a_checkpoint_has_it_once(pair, tmp_path):
    base, model, config = pair
    assert tied(model)
    whole = [name for name, _ in lorafx.named_parameters(model) if ".trained." in name]
    assert len({name for name in whole if name.endswith("weight")}) == 1
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(plain_of(tmp_path, base)), logits(base))
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    again = lorafx.inject(base, **config)
    result = again.load_state_dict(state, strict=False)  # as Trainer does
    assert not result.unexpected_keys and not any("trained" in k for k in result.missing_keys)
    assert torch.equal(logits(again), logits(model)) and tied(again)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True:UserWarning")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("form", ["a.safetensors", "folder"])
def test_files_come_back_tied(pair, form, tmp_path):
    base, model, _ = pair
    lorafx.save(model, tmp_path / form)
    loaded = lorafx.load(base, tmp_path / form)
    assert torch.equal(logits(loaded), logits(model)) and tied(loaded)
    if form == "folder":
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / form).eval()
        torch.testing.assert_close(
            logits(theirs.get_base_model()), logits(model), rtol=0, atol=1e-5)


def test_tie_weights_and_merging_keep_both(pair, tmp_path):
    base, model, _ = pair
    before = logits(model)
    model.tie_weights()
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(lorafx.eject(model)), logits(base))
    merged = lorafx.merge(model)
    assert tied(merged)
    merged.save_pretrained(tmp_path)
    again = plain_of(tmp_path, base)
    torch.testing.assert_close(logits(again), before, rtol=0, atol=1e-4)
    assert tied(again)


@pytest.mark.parametrize("trained", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ties", [True, False])
def test_resizing_after_injection_is_an_error_on_save(trained, dtype, ties, tmp_path):
    base = maker(transformers.Qwen2ForCausalLM, **SIZES, num_key_value_heads=2,
                 tie_word_embeddings=ties)().to(dtype)
    model = randomise(lorafx.inject(base, 2, targets="q_proj", trainable=trained))
    held = {name: tensor.detach().clone() for name, tensor in lorafx.named_parameters(model)}
    model.resize_token_embeddings(110, mean_resizing=False)
    with pytest.raises(lorafx.AdapterError, match="resize_token_embeddings.*before lorafx.inject"):
        lorafx.save(model, tmp_path / "a.safetensors")
    for name, tensor in lorafx.named_parameters(model):
        assert torch.equal(tensor, held[name])
    base.resize_token_embeddings(110, mean_resizing=False)
    model = randomise(lorafx.inject(base, 2, targets="q_proj", trainable=trained))
    lorafx.save(model, tmp_path / "a.safetensors")
    assert torch.equal(logits(lorafx.load(base, tmp_path / "a.safetensors")), logits(model))
