"""Hugging Face models, tiny: what they can do they still do, and all their linear layers are sites."""

import pytest
import torch
import transformers
from oracle import frozen, randomise

import lorafx

IDS = torch.randint(99, (2, 7), generator=torch.Generator().manual_seed(0))
SIZES = dict(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)


def llama():
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return transformers.LlamaForCausalLM(config)


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=100, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0))


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))


def t5():
    return transformers.T5ForConditionalGeneration(transformers.T5Config(
        d_model=32, num_layers=2, d_ff=64, num_heads=4, d_kv=8, vocab_size=100, decoder_start_token_id=0))


def logits(model):
    inputs = {"decoder_input_ids": IDS} if isinstance(model, transformers.T5ForConditionalGeneration) else {}
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS), **inputs).logits


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
    torch.testing.assert_close(logits(lorafx.merge(model, untie=True)), logits(model), rtol=1e-3, atol=1e-4)
    assert torch.equal(logits(lorafx.eject(model)), logits(base))


def test_generation_and_pretrained_files(tmp_path):
    base = llama().eval()
    model = randomise(lorafx.inject(base, targets=["q_proj", "v_proj"]))
    arguments = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 5, "do_sample": False}
    generated = model.generate(IDS, **arguments)
    merged = lorafx.merge(model)
    assert torch.equal(merged.generate(IDS, **arguments), generated) and model.config is not base.config
    merged.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), logits(merged))
    assert isinstance(model, transformers.LlamaForCausalLM) and model.get_input_embeddings() is model.model.embed_tokens


def test_a_lookup_that_shares_its_weight_is_named():
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True)
    with pytest.raises(lorafx.NoSiteError, match="'model.embed_tokens' cannot be adapted: it makes no linear call and "
                                                 "shares its weight with 'lm_head'"):
        lorafx.inject(transformers.LlamaForCausalLM(config), targets="embed_tokens")
