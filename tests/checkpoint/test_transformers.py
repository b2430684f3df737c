"""Merging on a disk as transformers reads it: ties of more than heads, bases of other models."""

import json
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

import lorafx
from tests.support.checkpoints import read_folder, same
from tests.support.command_line import MERGE, error, main
from tests.support.oracle import randomise
from tests.support.peft_adapters import stir

pytestmark = [
    pytest.mark.usefixtures("here"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")]
PAIR = {
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 12,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 12,
    "vocab_size": 11,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
BERT = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "vocab_size": 11,
}
GPT2 = {
    "n_embd": 8,
    "n_layer": 1,
    "n_head": 2,
    "vocab_size": 11,
    "n_positions": 8,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def save(name: str, config: str, options: dict[str, object]) -> nn.Module:
    model = getattr(transformers, name)(getattr(transformers, config)(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained("base")
    return model


def square_llama() -> nn.Module:
    """A tied model with as many tokens as features."""
    return save(
        "LlamaForCausalLM", "LlamaConfig",
        {
            "hidden_size": 8,
            "intermediate_size": 12,
            "num_hidden_layers": 1,
            "vocab_size": 8,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        }
    )


@pytest.mark.parametrize(
    "name, config, options, head, more",
    [
        (
            "BartForConditionalGeneration", "BartConfig", PAIR, "lm_head",
            "tie_word_embeddings may tie more in such a model"
        ),
        (
            "T5ForConditionalGeneration", "T5Config",
            {
                "d_model": 8,
                "d_kv": 4,
                "d_ff": 12,
                "num_layers": 1,
                "num_heads": 2,
                "vocab_size": 11,
            },
            "lm_head", "may tie more in such a model"
        ),
        (
            "BertForMaskedLM", "BertConfig", BERT, "cls.predictions.decoder",
            "may tie 'cls.predictions.bias' too"
        ),
        (
            "RobertaForMaskedLM", "RobertaConfig", BERT, "lm_head.decoder",
            "may tie 'lm_head.bias' too"
        ),
    ]
)
def test_what_else_one_word_ties_is_not_untied(name, config, options, head, more, capsys):
    model = randomise(lorafx.inject(save(name, config, options), 2, targets=head))
    lorafx.save(model, "a.safetensors")
    for untie in ([], ["--untie"]):
        capsys.readouterr()
        assert main([*MERGE, *untie]) == 2
        assert more in error(capsys) and not Path("out").exists()
    # transformers 5 then ties what is equal
    lorafx.merge(model, untie=True).save_pretrained("memory")
    merged, words = (
        getattr(transformers, name).from_pretrained("memory").eval(), torch.arange(6)[None]
    )
    more = {"decoder_input_ids": words} if model.config.is_encoder_decoder else {}
    torch.testing.assert_close(
        merged(words, **more).logits, model(words, **more).logits, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "name, config, options, head",
    [
        (
            "DistilBertForMaskedLM", "DistilBertConfig",
            {"dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 12, "vocab_size": 11},
            "vocab_projector"
        ),
        ("GPT2LMHeadModel", "GPT2Config", GPT2, "lm_head"),
    ]
)
def test_a_head_and_an_embedding_are_untied(name, config, options, head):
    model = randomise(lorafx.inject(save(name, config, options), 2, targets=head))
    lorafx.save(model, "a.safetensors")
    assert main(MERGE) == 2 and main([*MERGE, "--untie"]) == 0
    merged, words = getattr(transformers, name).from_pretrained("out").eval(), torch.arange(6)[None]
    assert same(merged.state_dict(), lorafx.merge(model, untie=True).state_dict())
    torch.testing.assert_close(merged(words).logits, model(words).logits, rtol=1e-4, atol=1e-4)


def test_a_matrix_of_the_shape_of_a_tied_embedding(capsys):
    lorafx.save(randomise(lorafx.inject(square_llama(), 2, targets="q_proj")), "a.safetensors")
    for untie in ([], ["--untie"]):
        capsys.readouterr()
        assert main([*MERGE, *untie]) == 2
        assert (
            "is tied to another that 'base' does not hold, or has the shape of such a one by chance"
            in error(capsys)
        )


@pytest.mark.parametrize("stored_twice", [False, True])
def test_matrices_of_the_shape_of_a_trained_embedding_stay_as_they_are(stored_twice):
    model = randomise(
        lorafx.inject(square_llama(), 2, targets="gate_proj", trainable="embed_tokens")
    )
    lorafx.save(model, "a.safetensors")
    if stored_twice:
        tensors = read_folder("base")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        safetensors.torch.save_file(tensors, "base/model.safetensors", {"format": "pt"})
    assert main(MERGE) == 0
    out, wanted = read_folder(), lorafx.merge(model).state_dict()
    assert same(out, {name: wanted[name] for name in read_folder("base")})
    assert ("lm_head.weight" in out) == stored_twice


def test_a_head_that_the_config_wrongly_says_is_tied(capsys):
    model = save(
        "LlamaForCausalLM", "LlamaConfig",
        {**BERT, "num_key_value_heads": 2, "tie_word_embeddings": False}
    )
    path, model = Path("base/config.json"), randomise(lorafx.inject(model, 2, targets="lm_head"))
    lorafx.save(model, "a.safetensors")
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "tie_word_embeddings": True}))
    capsys.readouterr()
    assert main([*MERGE, "--untie"]) == 2
    assert (
        "if 'base' holds both its head and its embedding, set tie_word_embeddings to false"
        in error(capsys)
    )
    path.write_text(json.dumps(config))
    assert main(MERGE) == 0 and same(read_folder(), lorafx.merge(model).state_dict())


def test_an_embedding_that_torch_save_has_twice():
    base = square_llama()
    model = randomise(lorafx.inject(base, 2, targets="gate_proj", trainable="embed_tokens"))
    lorafx.save(model, "a.safetensors")
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    torch.save(state, "base/all.pth")
    assert main(["merge", "base/all.pth", "a.safetensors", "-o", "out.pth"]) == 0
    assert same(torch.load("out.pth"), dict(lorafx.merge(model).state_dict()))


@pytest.mark.parametrize(
    "of, merged_into", [("GPT2LMHeadModel", "GPT2Model"), ("GPT2Model", "GPT2LMHeadModel")]
)
def test_the_prefix_of_a_base_model(of, merged_into, capsys):
    """The hub's own gpt2 has h.0, which GPT2LMHeadModel loads as transformer.h.0."""
    save(merged_into, "GPT2Config", GPT2)
    model = getattr(transformers, of).from_pretrained("base").eval()
    adapted = randomise(lorafx.inject(model, 2, targets="c_attn"))
    lorafx.save(adapted, "a.safetensors")
    assert main(MERGE) == 0
    out = getattr(transformers, of).from_pretrained("out")
    assert same(out.state_dict(), lorafx.merge(adapted).state_dict())
    assert read_folder().keys() == read_folder("base").keys()
    Path("base/config.json").unlink()
    capsys.readouterr()
    assert main([*MERGE[:-1], "other"]) == 2  # without it nothing says that it is of transformers
    assert "no such tensor" in error(capsys)


def test_two_base_models_in_one(capsys):
    lorafx.save(
        randomise(lorafx.inject(nn.Sequential(nn.Linear(4, 4)), 2, targets="0")), "a.safetensors"
    )
    Path("base").mkdir()
    weight = torch.randn(4, 4)
    safetensors.torch.save_file(
        {"left.0.weight": weight, "right.0.weight": weight + 1}, "base/model.safetensors"
    )
    Path("base/config.json").write_text("{}")
    assert main(MERGE) == 2
    assert "fits 'base' in several ways, '0' at 'left.0.weight' or at 'right.0.weight'" in error(
        capsys
    )


def test_an_index_that_counts_parameters():
    model = save(
        "LlamaForCausalLM", "LlamaConfig",
        {**BERT, "num_key_value_heads": 2, "tie_word_embeddings": True}
    )
    model.save_pretrained("sharded", max_shard_size="1KB")
    lorafx.save(randomise(lorafx.inject(model, 2, targets="lm_head")), "a.safetensors")
    index = Path("sharded/model.safetensors.index.json")
    before = json.loads(index.read_text())["metadata"]
    assert main(["merge", "sharded", *MERGE[2:], "--untie"]) == 0
    after = json.loads(Path("out", index.name).read_text())["metadata"]
    assert after == {"total_parameters": before["total_parameters"] + 11 * 8,
                     "total_size": before["total_size"] + 11 * 8 * 4}


@pytest.mark.parametrize("options", [
    {"target_modules": ["lm_head"]}, {"target_modules": ["lm_head", "q_proj"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}])
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning")
def test_a_head_of_peft_in_a_tied_checkpoint(options, capsys):
    """PEFT writes the weight of the head beside its pair, unasked."""
    model = save(
        "LlamaForCausalLM", "LlamaConfig",
        {**BERT, "num_key_value_heads": 2, "tie_word_embeddings": True}
    )
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, **options))
    stir(wrapped, ("lora_", "modules_to_save"))
    wrapped.save_pretrained("peft")
    words = torch.arange(6)[None]
    wanted, arguments = wrapped.eval()(words).logits, ["merge", "base", "peft", "-o", "out"]
    capsys.readouterr()
    assert main(arguments) == 2
    assert "The weight of 'lm_head' is tied to 'model.embed_tokens.weight' in 'base'" in error(
        capsys
    )
    assert main([*arguments, "--untie"]) == 0
    merged = transformers.LlamaForCausalLM.from_pretrained("out")
    torch.testing.assert_close(merged(words).logits, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(
        read_folder()["model.embed_tokens.weight"], read_folder("base")["model.embed_tokens.weight"]
    )


def test_a_shard_that_may_not_be_read(monkeypatch, capsys):
    square_llama()
    lorafx.save(lorafx.inject(nn.Linear(4, 4)), "a.safetensors")
    real = open

    def denied(path, *arguments, **options):
        if Path(path).name == denied.name:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr("builtins.open", denied)
    for denied.name, said in (
        ("model.safetensors", "[Errno 13] Permission denied: 'base/model.safetensors'"),
        ("a.safetensors", "'a.safetensors' cannot be read: Permission denied"),
    ):
        capsys.readouterr()
        assert main(MERGE) == 2 and said in error(capsys)
