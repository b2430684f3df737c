"""Transformers' architectures, made from tiny configs, with their sites counted by hand.

Counts are sums of what one layer has, times the layers, and what there is once. A stack of
experts' weights counts one, an `nn.MultiheadAttention` four; a head that shares the embedding's
weight counts one, the embedding none.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from tests.zoo.rows import Row, drawn

IDS = torch.randint(5, 95, (2, 9), generator=torch.Generator().manual_seed(0))
IMAGES = drawn(2, 3, 32, 32).float()
SOUND = drawn(2, 800).float()
SPECTRUM = drawn(2, 16, 40).float()
SIZES = dict(
    vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
)
TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
MODEL = "AutoModel"
POOLED = ("last_hidden_state", "pooler_output")
ROWS: list[Row] = []

Inputs = Callable[[], dict[str, Tensor]]


def text() -> dict[str, Tensor]:
    return {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def two_texts() -> dict[str, Tensor]:
    return {**text(), "decoder_input_ids": IDS[:, :6]}


def images() -> dict[str, Tensor]:
    return {"pixel_values": IMAGES}


def text_and_images() -> dict[str, Tensor]:
    return {**text(), **images()}


def sound() -> dict[str, Tensor]:
    return {"input_values": SOUND}


def spectrum() -> dict[str, Tensor]:
    return {"input_features": SPECTRUM, "decoder_input_ids": IDS[:, :6]}


def given(**inputs: Tensor) -> Inputs:
    return lambda: inputs


def add(
    auto: str, inputs: Inputs, name: str, sites: int, *outputs: str,
    no_gradient: tuple[str, ...] = (), missed: int = 0, sizes: dict[str, Any] = SIZES, **fields: Any
) -> None:
    """Register the class that `auto` makes of this model type; run returns these of its outputs."""
    def build() -> nn.Module:
        torch.manual_seed(0)
        config = CONFIG_MAPPING[name](**{**sizes, **TOKENS, **fields})
        model = getattr(transformers, auto).from_config(config)
        for tensor in model.parameters():
            # a weight that is zero makes what comes before it silent
            if tensor.ndim > 1 and not tensor.any():
                nn.init.normal_(tensor, std=1 / math.sqrt(tensor.shape[-1]))
        return model

    def run(model: nn.Module) -> tuple[Tensor, ...]:
        found = model(**inputs())
        return tuple(getattr(found, output) for output in outputs)

    ROWS.append(Row(name, build, run, sites, frozenset(no_gradient), missed))


def decoder(name: str, sites: int, **more: Any) -> None:
    add("AutoModelForCausalLM", text, name, sites, "logits", **more)


def encoder(name: str, sites: int, *outputs: str, **more: Any) -> None:
    add(MODEL, text, name, sites, *(outputs or ("last_hidden_state",)), **more)


def translator(name: str, sites: int, **more: Any) -> None:
    add("AutoModelForSeq2SeqLM", two_texts, name, sites, "logits", **more)


def vision(name: str, sites: int, *outputs: str, **more: Any) -> None:
    add(MODEL, images, name, sites, *(outputs or ("last_hidden_state",)), **more)


def speech(name: str, sites: int, **more: Any) -> None:
    add(MODEL, sound, name, sites, "last_hidden_state", **more)


HEAD = 1
POOLER = 1
LM = 2  # a layer, and the head
GATED = 4 + 3  # query, key, value, output; gate, up, down
PLAIN = 4 + 2  # query, key, value, output; up, down
FUSED = 2 + 2  # one weight for query, key and value, output; up, down
GROUPED = dict(num_key_value_heads=2)

for name in ("llama", "mistral", "qwen2", "olmo2", "granite", "cohere", "stablelm", "smollm3"):
    decoder(name, 2 * GATED + HEAD, **GROUPED)
for name in ("gemma", "gemma2", "gemma3_text", "qwen3", "seed_oss"):
    decoder(name, 2 * GATED + HEAD, **GROUPED, head_dim=6)
decoder("phi", 2 * PLAIN + HEAD)
# query, key and value in one, output; gate and up in one, down
decoder("phi3", 2 * (2 + 2) + HEAD, **GROUPED)
decoder("starcoder2", 2 * PLAIN + HEAD, **GROUPED)
decoder("nemotron", 2 * PLAIN + HEAD, **GROUPED)
decoder("glm", 2 * (4 + 2) + HEAD, **GROUPED, head_dim=8)  # gate and up in one
decoder("gpt2", 2 * FUSED + HEAD, n_inner=48)
decoder(
    "gpt_neo", 2 * PLAIN + HEAD, num_layers=2, attention_types=[[["global", "local"], 1]],
    num_heads=4
)
decoder("gpt_neox", 2 * FUSED + HEAD)
decoder("gptj", 2 * PLAIN + HEAD, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)
decoder("codegen", 2 * FUSED + HEAD, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)
# into and out of the embedding's width
decoder("opt", 2 * PLAIN + 2 + HEAD, ffn_dim=48, word_embed_proj_dim=16)
decoder("bloom", 2 * FUSED + HEAD, n_layer=2, n_head=4)
decoder("falcon", 2 * FUSED + HEAD)

# Experts: a router, and two stacks of weights.
EXPERTS = 1 + 2
decoder("mixtral", 2 * (4 + EXPERTS) + HEAD, **GROUPED, num_local_experts=4, num_experts_per_tok=4)
decoder(
    "qwen3_moe", 2 * (4 + EXPERTS) + HEAD, **GROUPED, head_dim=8, num_experts=4,
    num_experts_per_tok=4, moe_intermediate_size=24
)
decoder(  # an expert for all, and its gate
    "qwen2_moe", 2 * (4 + EXPERTS + 3 + 1) + HEAD, **GROUPED, num_experts=4, num_experts_per_tok=4,
    moe_intermediate_size=24, shared_expert_intermediate_size=24
)
decoder(
    "gpt_oss", 2 * (4 + EXPERTS) + HEAD, **GROUPED, head_dim=8, num_local_experts=4,
    num_experts_per_tok=4
)
decoder("olmoe", 2 * (4 + EXPERTS) + HEAD, **GROUPED, num_experts=4, num_experts_per_tok=4)
decoder(  # routes by the largest score alone
    "phimoe", 2 * (4 + EXPERTS) + HEAD, **GROUPED, num_local_experts=4,
    no_gradient=("model.layers.0.mlp.router", "model.layers.1.mlp.router")
)
decoder(
    "deepseek_v3", 2 * 5 + 3 + (EXPERTS + 3) + HEAD, num_key_value_heads=4, q_lora_rank=8,
    kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4,
    num_experts_per_tok=4, n_group=1, topk_group=1, first_k_dense_replace=1,
    moe_intermediate_size=24, n_shared_experts=1
)

# State spaces.
decoder("mamba", 2 * 4 + HEAD, state_size=4, num_hidden_layers=2)  # in, x, dt, out
# in, out
decoder("mamba2", 2 * 2 + HEAD, num_heads=8, head_dim=8, state_size=4, n_groups=1, chunk_size=4)
decoder("falcon_mamba", 2 * 4 + HEAD, state_size=4)
decoder("rwkv", 2 * (4 + 3) + HEAD, attention_hidden_size=32, rescale_every=0, use_cache=False)
decoder(
    "jamba", (4 + 3) + (4 + EXPERTS) + HEAD, **GROUPED, attn_layer_period=2, attn_layer_offset=1,
    num_experts=4, num_experts_per_tok=4, expert_layer_period=2, expert_layer_offset=1,
    use_mamba_kernels=False, mamba_d_state=4, mamba_dt_rank=4
)

encoder("bert", 2 * PLAIN + 1, *POOLED)
encoder("roberta", 2 * PLAIN + 1, *POOLED)
encoder("mpnet", 2 * PLAIN + 1, *POOLED)
encoder("distilbert", 2 * PLAIN, dim=32, n_layers=2, n_heads=4, hidden_dim=48)
encoder("electra", 2 * PLAIN + 1, embedding_size=16)  # from the embedding's width
# one layer, used twice
encoder("albert", 1 + PLAIN + 1, *POOLED, embedding_size=16)
encoder("deberta-v2", 2 * PLAIN)
encoder("modernbert", 2 * FUSED)
encoder("fnet", 2 * 2 + 1 + 1, *POOLED)
encoder("xlm", 2 * PLAIN, sizes={}, vocab_size=100, emb_dim=32, n_layers=2, n_heads=4)
encoder("big_bird", 2 * PLAIN + 1, *POOLED, attention_type="original_full")

BOTH = 2 * PLAIN + 2 * (PLAIN + 4)  # encoder, and decoder with attention to it
NARROW = dict(
    d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, decoder_start_token_id=2,
    vocab_size=100
)
for name in ("bart", "mbart", "pegasus", "marian", "m2m_100"):
    translator(name, BOTH + HEAD, sizes=NARROW)
for name in ("t5", "longt5"):
    translator(
        name, BOTH + HEAD, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        decoder_start_token_id=0
    )
add(
    "AutoModelForSpeechSeq2Seq", spectrum, "whisper", BOTH + HEAD, "logits", sizes=NARROW,
    num_mel_bins=16, max_source_positions=20, max_target_positions=20
)

SIZE = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32,
    patch_size=16
)
vision("vit", 2 * PLAIN + 1, *POOLED, sizes=SIZE)
vision("deit", 2 * PLAIN + 1, *POOLED, sizes=SIZE)
vision("beit", 2 * PLAIN, sizes=SIZE)
vision("dinov2", 2 * PLAIN, sizes=SIZE, mlp_ratio=2)
vision(  # between the stages one
    "swin", 2 * PLAIN + 1, sizes={}, image_size=32, patch_size=4, embed_dim=8, depths=[1, 1],
    num_heads=[2, 2], window_size=4
)
vision("convnext", 2 * 2, sizes={}, hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
vision(
    "segformer", 2 * PLAIN, sizes={}, num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1],
    hidden_sizes=[8, 16], num_attention_heads=[1, 2], patch_sizes=[7, 3], strides=[4, 2],
    mlp_ratios=[2, 2]
)
SIDES = dict(text_config=dict(SIZES, **TOKENS), vision_config=SIZE)
add(
    MODEL, text_and_images, "clip", 2 * 2 * PLAIN + 2, "logits_per_text", sizes=SIDES,
    projection_dim=16
)
# a head for texts, and one for images that attends
add(MODEL, text_and_images, "siglip", 2 * 2 * PLAIN + 1 + (4 + 2), "logits_per_text", sizes=SIDES)

EARS = dict(
    SIZES, conv_dim=[8, 8], conv_stride=[5, 4], conv_kernel=[10, 8], num_feat_extract_layers=2,
    num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, mask_time_prob=0.0, layerdrop=0.0
)
speech("wav2vec2", 2 * PLAIN + 1, sizes=EARS)  # from the features' width
speech("hubert", 2 * PLAIN + 1, sizes=EARS)
speech("wavlm", 2 * (PLAIN + 1) + 1, sizes=EARS)  # a gate for the positions
