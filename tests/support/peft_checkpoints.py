"""Models of transformers saved in `base`, and what PEFT merges into them."""

import peft
import torch
import transformers
from torch import nn


def gpt2(tied: bool = False) -> nn.Module:
    """A model whose matrices are stored as (in, out), but for its head; saved in base."""
    config = transformers.GPT2Config(
        n_embd=8, n_layer=2, n_head=2, vocab_size=11, n_positions=8, bos_token_id=0, eos_token_id=0,
        tie_word_embeddings=tied
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained("base")
    return model


def llama(tied: bool) -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=1, vocab_size=11,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tied
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained("base")
    return model


def last_error(capsys) -> str:
    """The last line on stderr, after what others say there."""
    return capsys.readouterr().err.splitlines()[-1]


def of_peft(model: nn.Module, **config) -> nn.Module:
    """The model that PEFT merges, from a folder `peft`."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=3, **config))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_()
    wrapped.save_pretrained("peft")
    return wrapped.merge_and_unload()


def close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() <= second.keys() and all(
        torch.allclose(first[n], second[n], atol=1e-5) for n in first
    )
