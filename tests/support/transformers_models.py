"""Hugging Face models, tiny, and what is done with them."""

import copy

import safetensors.torch
import torch
import transformers

import lorafx

IDS = torch.randint(99, (2, 7), generator=torch.Generator().manual_seed(0))
SIZES = dict(
    vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
)


def llama():
    config = transformers.LlamaConfig(
        **SIZES, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    return transformers.LlamaForCausalLM(config)


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=100, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2,
            pad_token_id=0
        )
    )


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))


def t5():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            d_model=32, num_layers=2, d_ff=64, num_heads=4, d_kv=8, vocab_size=100,
            decoder_start_token_id=0
        )
    )


def logits(model):
    inputs = (
        {"decoder_input_ids": IDS}
        if isinstance(model, transformers.T5ForConditionalGeneration)
        else {}
    )
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS), **inputs).logits


VISION = {key: size for key, size in SIZES.items() if key != "vocab_size"} | dict(
    image_size=16, patch_size=8
)
PIXELS, SOUND = (
    torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    for size in ((3, 16, 16), (8, 40))
)
# An image has 2 x 2 patches, each a token 99.
WITH_IMAGE = torch.cat([IDS, torch.full((2, 4), 99)], dim=1)


def maker(model, **config):
    """A function that makes this model, named for pytest's sake."""
    def build():
        return model(model.config_class(**copy.deepcopy(config)))

    build.__name__ = model.__name__
    return build


LLAMA = dict(**SIZES, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
tied_llama = maker(transformers.LlamaForCausalLM, **LLAMA, tie_word_embeddings=True)
classifier = maker(transformers.BertForSequenceClassification, **SIZES, num_labels=3)
vit = maker(transformers.ViTForImageClassification, **VISION, num_labels=3)
whisper = maker(
    transformers.WhisperForConditionalGeneration, vocab_size=100, d_model=32, encoder_layers=2,
    decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
    decoder_ffn_dim=64, num_mel_bins=8, max_source_positions=20, max_target_positions=20,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3
)
clip = maker(
    transformers.CLIPModel, text_config=dict(**SIZES, eos_token_id=2), vision_config=VISION
)
llava = maker(
    transformers.LlavaForConditionalGeneration, text_config=dict(**LLAMA, model_type="llama"),
    vision_config=dict(**VISION, model_type="clip_vision_model"), image_token_index=99)


def injected(build, **options):
    """A model in eval, and the same injected."""
    base = build().eval()
    return base, lorafx.inject(base, rank=2, **options)


def keys(model):
    """The adapter's keys."""
    return [name for name, _ in lorafx.named_parameters(model)]


def written(model, folder):
    """What `save_pretrained` writes: names of tensors, and the texts of its configs."""
    model.save_pretrained(folder)
    names = set(safetensors.torch.load_file(folder / "model.safetensors"))
    return names, [path.read_text() for path in sorted(folder.glob("*.json"))]


def generate(model, inputs=IDS, **options):
    """(tokens, scores of every step)."""
    torch.manual_seed(3)
    mask = torch.ones(len(inputs), inputs.shape[-1], dtype=torch.long)
    found = model.generate(
        inputs, attention_mask=mask, max_new_tokens=6, return_dict_in_generate=True,
        output_scores=True, **options
    )
    return found.sequences, torch.stack(found.scores)


def train(model, folder, labels=None, resume=None, callbacks=(), **options):
    """The losses of six steps of a Trainer on one batch; it saves after the third and the last."""
    ids = torch.randint(3, 99, (4, 8), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": label}
            for row, label in zip(ids, ids if labels is None else labels)]
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(folder), max_steps=6, save_steps=3, per_device_train_batch_size=4,
            learning_rate=0.05, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
            **options
        ),
        train_dataset=rows, callbacks=[*callbacks]
    )
    trainer.train(resume_from_checkpoint=resume)
    assert len(trainer.optimizer.state) == len(keys(model))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
