"""Hugging Face models, tiny: what they can do they still do; all their linear layers are sites."""

import pytest
import torch
import transformers

import lorafx
from tests.support.oracle import frozen, randomise
from tests.support.transformers_models import IDS, SIZES, bert, gpt2, llama, logits, t5


# The number of sites is counted by hand: linear layers (Conv1D in GPT-2) and the head.
@pytest.mark.parametrize("build, sites", [(llama, 2 * 7 + 1), (gpt2, 2 * 4 + 1), (bert, 2 * 6 + 2),
                                          (t5, 2 * 6 + 2 * 10 + 1)])
def test_identity_no_silent_site_merge_and_eject(build, sites):
    base = build().eval()
    model = lorafx.inject(base, rank=2, targets="linear")
    expected = logits(frozen(base))
    assert torch.equal(logits(model), expected) and len(lorafx.summary(model).sites) == sites
    logits(model).square().sum().backward()
    for name, parameter in lorafx.named_parameters(model):
        if name.endswith(".B"):
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
            with torch.no_grad():
                parameter.normal_()
            assert not torch.equal(logits(model), expected), name
            with torch.no_grad():
                parameter.zero_()
    randomise(model)
    torch.testing.assert_close(
        logits(lorafx.merge(model, untie=True)), logits(model), rtol=1e-3, atol=1e-4
    )
    assert torch.equal(logits(lorafx.eject(model)), logits(base))


def test_generation_and_pretrained_files(tmp_path):
    base = llama().eval()
    model = randomise(lorafx.inject(base, targets=["q_proj", "v_proj"]))
    arguments = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 5, "do_sample": False}
    generated = model.generate(IDS, **arguments)
    merged = lorafx.merge(model)
    assert torch.equal(merged.generate(IDS, **arguments), generated)
    assert model.config is not base.config
    merged.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), logits(merged))
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert model.get_input_embeddings() is model.model.embed_tokens


def test_a_lookup_that_shares_its_weight_is_named():
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True)
    with pytest.raises(
        lorafx.NoSiteError,
        match="'model.embed_tokens' cannot be adapted: it makes no linear call and "
        "shares its weight with 'lm_head'",
    ):
        lorafx.inject(transformers.LlamaForCausalLM(config), targets="embed_tokens")


def test_a_parameter_of_the_model_itself_is_trained(tmp_path):
    """As the logit_scale of a CLIP."""
    vision = {key: value for key, value in SIZES.items() if key != "vocab_size"}
    base = transformers.CLIPModel(transformers.CLIPConfig(
        text_config=SIZES | {"eos_token_id": 2}, projection_dim=8,
        vision_config=vision | {"image_size": 8, "patch_size": 4})).eval()
    pixels = torch.randn(2, 3, 8, 8)

    def outputs(model):
        return model(input_ids=torch.tensor([[5, 7, 2]]), pixel_values=pixels).logits_per_image

    model = lorafx.inject(base, 2, targets="q_proj", trainable="logit_scale")
    assert torch.equal(outputs(model), outputs(base))
    with torch.no_grad():
        model.trained.default.logit_scale.add_(0.5)
    model.save_pretrained(tmp_path)
    again = lorafx.load(base, tmp_path)
    assert torch.equal(outputs(again), outputs(model))
    torch.testing.assert_close(outputs(model), outputs(base) * torch.tensor(0.5).exp())
