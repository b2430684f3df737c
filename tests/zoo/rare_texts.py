"""Architectures that read text, each for something that no row of `architectures` does.

Counts are as there. The rows are added to the same table.
"""

from typing import Any

import torch

from tests.zoo.architectures import (
    BOTH, EXPERTS, FUSED, GATED, GROUPED, HEAD, IDS, IMAGES, LM, MODEL, NARROW, PLAIN, POOLED,
    POOLER, SIZES, SOUND, SPECTRUM, TOKENS, Inputs, add, decoder, encoder, given, text, translator,
)
from tests.zoo.rows import drawn

MASKED, TRANSLATOR = "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM"
SPEECH = "AutoModelForSpeechSeq2Seq"


def masked(name: str, sites: int, inputs: Inputs = text, **more: Any) -> None:
    add(MASKED, inputs, name, sites, "logits", **more)


# Decoders whose layers are the usual ones, for their attention (positions, windows, norms) and
# activations. In gpt_bigcode one key and value for all heads.
for name in ("mpt", "gpt_bigcode", "openai-gpt", "persimmon"):
    decoder(name, 2 * FUSED + HEAD)
for name in ("ctrl", "biogpt", "xglm"):
    decoder(name, 2 * PLAIN + HEAD, dff=40, ffn_dim=40)
for name in ("nanochat", "apertus", "arcee"):
    decoder(name, 2 * PLAIN + HEAD, **GROUPED)
for name in ("olmo", "exaone4", "helium", "diffllama", "bitnet"):
    decoder(name, 2 * GATED + HEAD, **GROUPED, clip_qkv=0.1, sliding_window=4, head_dim=8)
WINDOWS = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=4)
decoder("cohere2", 2 * GATED + HEAD, **GROUPED, **WINDOWS)
decoder(
    "cpmant", 2 * GATED + HEAD, dim_head=6, dim_ff=48, prompt_length=4, position_bias_num_buckets=8
)
decoder("glm4", 2 * (4 + 2) + HEAD, **GROUPED, head_dim=8)  # gate and up in one
# the same; a head of two
decoder("modernbert-decoder", 2 * (4 + 2) + 2, cls_token_id=1, sep_token_id=2)
add(MODEL, given(input_ids=IDS), "imagegpt", 2 * FUSED, "last_hidden_state", n_inner=48)
# two stacks, in turns; attention's gate
decoder("hrm_text", 2 * (GATED + 1) + HEAD, num_hidden_layers=1, head_dim=8)

# Queries, keys and values through narrow widths: down and up for the query, down and up for both
# others, output.
LATENT = 5
RANKS = dict(
    num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4,
    v_head_dim=5
)
for name in ("minicpm3", "youtu"):
    decoder(name, 2 * (LATENT + 3) + HEAD, **RANKS, dim_model_base=16)

# Experts, all of which see every token. SHARED: one more that all tokens see.
MOE = dict(
    num_experts_per_tok=4, num_local_experts=4, num_experts=4, n_routed_experts=4,
    moe_intermediate_size=12
)
SHARED = 3
decoder(  # experts beside the layers, and the layers' embeddings
    "gemma4_text", 2 * (GATED + EXPERTS + 2) + 1 + HEAD, **GROUPED, head_dim=6,
    vocab_size_per_layer_input=100, hidden_size_per_layer_input=12, enable_moe_block=True,
    num_experts=4, top_k_experts=4, moe_intermediate_size=12, **WINDOWS
)
decoder(  # stacks in matrices, cut into experts, which a forward is given
    "dbrx", 2 * (2 + 1 + 3) + HEAD, sizes={}, vocab_size=100, d_model=32, n_heads=4, n_layers=2,
    max_seq_len=32, attn_config=dict(kv_n_heads=2, clip_qkv=8, rope_theta=100.0),
    ffn_config=dict(ffn_hidden_size=24, moe_num_experts=4, moe_top_k=4), missed=2 * 3
)
decoder(  # one for keys and values, experts for query and output
    "jetmoe", 2 * (1 + EXPERTS + EXPERTS) + HEAD, num_key_value_heads=4, kv_channels=6,
    num_local_experts=4, num_experts_per_tok=4
)
decoder(
    "llama4_text", GATED + (4 + EXPERTS + SHARED) + HEAD, **GROUPED, head_dim=8,
    intermediate_size_mlp=40, num_local_experts=4, num_experts_per_tok=4,
    interleave_moe_layer_step=2
)
decoder("granitemoe", 2 * (4 + EXPERTS) + HEAD, **GROUPED, **MOE)
decoder(
    "granitemoeshared", 2 * (4 + EXPERTS + 2) + HEAD, **GROUPED, **MOE, shared_intermediate_size=20
)
decoder(
    "ernie4_5_moe", GATED + (4 + EXPERTS + SHARED) + HEAD, **GROUPED, moe_intermediate_size=12,
    moe_k=4, moe_num_experts=4, moe_num_shared_experts=1
)
decoder("glm4_moe", GATED + (4 + EXPERTS + SHARED) + HEAD, **GROUPED, **MOE, head_dim=8)
decoder(  # attention has a gate
    "afmoe", (GATED + 1) + (4 + 1 + EXPERTS + SHARED) + HEAD, **GROUPED, **MOE, **WINDOWS,
    num_shared_experts=1, head_dim=8
)
decoder(
    "deepseek_v2", (LATENT + 3) + (LATENT + EXPERTS + SHARED) + HEAD, **RANKS, **MOE,
    first_k_dense_replace=1, n_shared_experts=1
)
decoder(  # a layer has two; some experts are none
    "longcat_flash", 2 * LATENT + 2 * 3 + EXPERTS + HEAD, **RANKS, num_layers=1, ffn_hidden_size=48,
    head_dim=4, moe_topk=4, n_routed_experts=4, zero_expert_num=2, expert_ffn_hidden_size=12,
    sizes=dict(vocab_size=100, hidden_size=32, num_attention_heads=4)
)
INDEXER = 3  # query, key, and the heads' weights; it chooses tokens, and so gets no gradient
decoder(
    "glm_moe_dsa", 2 * (LATENT + INDEXER) + 3 + (EXPERTS + SHARED) + HEAD, **RANKS, **MOE,
    head_dim=4, index_topk=4, index_head_dim=8, index_n_heads=2, first_k_dense_replace=1,
    no_gradient=tuple(
        f"model.layers.{i}.self_attn.indexer.{layer}"
        for i in (0, 1) for layer in ("wq_b", "wk", "weights_proj")
    )
)
# Query down and up, key and value in one, output in groups and then as a whole; the experts; what
# mixes four streams before attention and before the experts. Two layers compress (value and gate),
# one of them chooses, by four more.
decoder(
    "deepseek_v4", 3 * (LATENT + EXPERTS + SHARED + 2) + 2 * 2 + 4 + 1 + HEAD, num_hidden_layers=3,
    num_key_value_heads=1, head_dim=8, q_lora_rank=8, num_experts_per_tok=4, n_routed_experts=4,
    o_groups=2, o_lora_rank=6, index_n_heads=2, index_head_dim=8, index_topk=1,
    moe_intermediate_size=12, sliding_window=4,
    layer_types=[
        "sliding_attention", "heavily_compressed_attention", "compressed_sparse_attention"
    ],
    mlp_layer_types=["moe"] * 3,
    compress_rates=dict(compressed_sparse_attention=2, heavily_compressed_attention=4),
    no_gradient=tuple(
        "model.layers.2.self_attn.compressor.indexer." + layer
        for layer in ("kv_proj", "gate_proj", "q_b_proj", "scorer.weights_proj")
    )
)

# State spaces, recurrences, convolutions and linear attention in the place of attention, or in
# turns with it.
MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=4, mamba_chunk_size=4)
decoder(  # x, y, out; two gates that are stacks of blocks
    "recurrent_gemma", (3 + 2 + 3) + GATED + HEAD, **GROUPED, lru_width=24, attention_window_size=4,
    block_types=["recurrent", "attention"]
)
# mamba: in, out
decoder("bamba", (2 + 3) + GATED + HEAD, **GROUPED, **MAMBA, attn_layer_indices=[1])
decoder(  # both at once
    "falcon_h1", 2 * (2 + GATED) + HEAD, **GROUPED, **{**MAMBA, "mamba_d_head": 6}, mamba_d_ssm=24
)
decoder(
    "granitemoehybrid", (2 + EXPERTS + 2) + (4 + EXPERTS + 2) + HEAD, **GROUPED, **MAMBA,
    num_local_experts=4, num_experts_per_tok=4, shared_intermediate_size=20,
    layer_types=["mamba", "attention"]
)
decoder(  # a shared expert; into and out of a width
    "nemotron_h", 2 + 4 + 2 + (EXPERTS + 2 + 2) + HEAD, **GROUPED, **MOE,
    moe_shared_expert_intermediate_size=20, layers_block_type=["mamba", "attention", "mlp", "moe"],
    head_dim=6, ssm_state_size=4, mamba_num_heads=4, mamba_head_dim=6, n_groups=1, chunk_size=4,
    moe_latent_size=8, sizes={k: v for k, v in SIZES.items() if k != "num_hidden_layers"}
)
# One transformer layer used twice, each time with a layer of its own, and three mamba layers.
HYBRID = dict(
    num_hidden_layers=3, layers_block_type=["mamba", "hybrid", "hybrid"], num_key_value_heads=4,
    mamba_d_state=4
)
# mamba: two stacks
decoder("zamba", 3 * (2 + 2) + GATED + 2 + HEAD, **HYBRID, mamba_dt_rank=3, initializer_range=0.1)
decoder(  # for each use low ranks of query, key, value, gate and up
    "zamba2", 3 * 2 + (4 + 2) + 2 + 2 * (4 * 2) + HEAD, **HYBRID, n_mamba_heads=4, chunk_size=4,
    num_mem_blocks=1, use_shared_attention_adapter=True, adapter_rank=3
)
decoder(
    "lfm2", (2 + 3) + GATED + HEAD, **GROUPED, layer_types=["conv", "full_attention"],
    block_auto_adjust_ff_dim=False
)
decoder(
    "lfm2_moe", (2 + 3) + (4 + EXPERTS) + HEAD, **GROUPED, **MOE,
    layer_types=["conv", "full_attention"], num_dense_layers=1
)
LINEAR = dict(layer_types=["linear_attention", "full_attention"])
DELTA = dict(
    LINEAR, head_dim=8, linear_key_head_dim=4, linear_value_head_dim=6, linear_num_key_heads=2,
    linear_num_value_heads=4
)
decoder(  # linear attention: query, key and value in one, output, gate
    "minimax", (3 + EXPERTS) + (4 + EXPERTS) + HEAD, **GROUPED, **LINEAR, num_local_experts=4,
    num_experts_per_tok=4, block_size=4
)
decoder(  # qkvz, ba, out
    "qwen3_next", (3 + EXPERTS + SHARED + 1) + (4 + EXPERTS + SHARED + 1) + HEAD, **GROUPED,
    **DELTA, num_experts=4, num_experts_per_tok=4, moe_intermediate_size=12,
    shared_expert_intermediate_size=20
)
decoder("qwen3_5_text", (5 + 3) + GATED + HEAD, **GROUPED, **DELTA)  # qkv, z, b, a, out
# qkv, a, b, g, o
decoder("olmo_hybrid", (7 + 3) + GATED + HEAD, **GROUPED, **{**DELTA, "linear_num_key_heads": 4})
# the linear one: the gates f and g, of two each, and b; the other one has one query
decoder(
    "kimi_linear", (4 + 5 + 3) + (LATENT - 1 + EXPERTS + SHARED) + HEAD,
    **{**RANKS, "q_lora_rank": None}, **MOE, **LINEAR, mlp_layer_types=["dense", "sparse"],
    linear_head_dim=6, linear_num_heads=2
)

# Encoders.
FIRST = 1  # from the embedding's width
masked(  # in, two for positions, out; the head is an embedding given to it
    "deberta", 2 * (1 + 2 + 1 + 2) + 1 + 1, relative_attention=True, pos_att_type=["c2p", "p2c"],
    legacy=False, max_relative_positions=8, missed=1
)
masked(  # two for the convolution; up and down are in groups, stacks
    "convbert", FIRST + 2 * (4 + 2 + 2) + LM, embedding_size=16, num_groups=2, conv_kernel_size=3
)
masked(  # query, key and value for tokens that see all
    "longformer", 2 * (PLAIN + 3) + LM,
    given(input_ids=IDS[:, :8], global_attention_mask=torch.eye(2, 8).long()), attention_window=4
)
masked(
    "nystromformer", 2 * PLAIN + LM, num_landmarks=3, segment_means_seq_len=9, conv_kernel_size=3
)
masked("yoso", 2 * PLAIN + LM)
masked("ibert", 2 * PLAIN + LM)  # layers of its own, which quantise on demand
masked(  # into and out of a width; one feed-forward more; a head of two weights joined
    "mobilebert", FIRST + 2 * (PLAIN + 3 + 2) + LM + 1, embedding_size=16, intra_bottleneck_size=20,
    num_feedforward_networks=2
)
masked("roformer", FIRST + 2 * PLAIN + LM, embedding_size=16)
masked("rembert", FIRST + 2 * PLAIN + LM, input_embedding_size=16, output_embedding_size=24)
masked("nomic_bert", 2 * GATED + LM)
masked(
    "roc_bert", FIRST + 2 * PLAIN + LM, pronunciation_embed_dim=12, pronunciation_vocab_size=100,
    shape_embed_dim=10, shape_vocab_size=100
)
masked(  # an adapter of two for each of two languages
    "xmod", 2 * (PLAIN + 2 * 2) + LM, given(input_ids=IDS, lang_ids=torch.tensor([0, 1])),
    languages=["en_XX", "de_DE"]
)
masked(  # in, two within, out; the head is an embedding given to it
    "perceiver", (1 + 2 + 1) * PLAIN + 1, sizes={}, vocab_size=100, max_position_embeddings=9,
    num_latents=5, d_latents=24, d_model=32, num_self_attends_per_block=2,
    num_self_attention_heads=4, num_cross_attention_heads=4, qk_channels=16, v_channels=24, missed=1
)
encoder(  # characters, shorter, characters
    "canine", (1 + 2 + 1) * PLAIN + POOLER, *POOLED, downsampling_rate=2, upsampling_kernel_size=2,
    num_hash_functions=4, num_hash_buckets=20, local_transformer_stride=4
)
add(  # a query each for words on entities, entities on words, and entities on entities
    MODEL,
    given(input_ids=IDS, entity_ids=IDS[:, :3] % 10, entity_position_ids=IDS[:, :3, None] % 9),
    "luke", FIRST + 2 * (PLAIN + 3) + POOLER, *POOLED, "entity_last_hidden_state",
    entity_vocab_size=10, entity_emb_size=12
)
BOXES = IDS[..., None] + torch.tensor([0, 0, 4, 5])
add(
    MODEL, given(input_ids=IDS, bbox=BOXES / 100), "bros", 1 + 2 * PLAIN + POOLER, *POOLED,
    hidden_size=64
)
add(  # looked up without grad
    MODEL, given(input_ids=IDS, bbox=BOXES, pixel_values=IMAGES), "layoutlmv3", 2 * PLAIN + 3,
    "last_hidden_state", coordinate_size=5, shape_size=6, input_size=32, patch_size=16,
    no_gradient=("encoder.rel_pos_bias", "encoder.rel_pos_x_bias", "encoder.rel_pos_y_bias")
)
add(
    MODEL, given(input_ids=IDS, visual_embeds=drawn(2, 5, 12).float()), "visual_bert",
    1 + 2 * PLAIN + POOLER, *POOLED, visual_embedding_dim=12
)
add(  # a layer for text, one for images; in two, one attention both ways
    MODEL,
    given(input_ids=IDS, visual_feats=drawn(2, 5, 12).float(), visual_pos=drawn(2, 5, 4).float()),
    "lxmert", 2 + PLAIN + PLAIN + 2 * (4 + 2 * PLAIN) + POOLER, "language_output", "vision_output",
    "pooled_output", l_layers=1, r_layers=1, x_layers=2, visual_feat_dim=12
)

# Encoders and decoders.
for name, more in dict(
    blenderbot={}, plbart={}, fsmt=dict(src_vocab_size=100, tgt_vocab_size=100),
    pegasus_x=dict(num_global_tokens=3, block_size=4)
).items():
    translator(name, BOTH + HEAD, sizes=NARROW, **more)
add(  # as longformer
    TRANSLATOR,
    given(
        input_ids=IDS[:, :8], decoder_input_ids=IDS, global_attention_mask=torch.eye(2, 8).long()
    ),
    "led", BOTH + 2 * 3 + HEAD, "logits", sizes=NARROW, attention_window=4
)
translator(  # positions
    "prophetnet", 2 * PLAIN + 2 * (PLAIN + 4 + 1) + HEAD, num_encoder_layers=2,
    num_decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=40, num_encoder_attention_heads=4,
    num_decoder_attention_heads=4, sizes=dict(vocab_size=100, hidden_size=32),
    decoder_start_token_id=2, disable_ngram_loss=True
)
T5 = dict(d_model=32, d_kv=6, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
translator("umt5", 2 * GATED + 2 * (GATED + 4) + HEAD, **T5)
translator(
    "t5gemma", 2 * GATED + 2 * (GATED + 4) + HEAD, sizes=dict(vocab_size=100),
    encoder=dict(SIZES, **GROUPED, head_dim=6),
    decoder=dict(SIZES, **GROUPED, head_dim=6, cross_attention_hidden_size=32)
)
ROUTED = 1 + 2 * 2  # two experts that are modules
translator(
    "switch_transformers", (4 + 2 + 4 + ROUTED) + (8 + 2 + 8 + ROUTED) + HEAD, **{**T5, "d_kv": 8},
    num_experts=2, num_sparse_encoder_layers=1, num_decoder_layers=2, num_sparse_decoder_layers=1
)
translator(
    "nllb-moe", (4 + 2 + 4 + ROUTED) + (8 + 2 + 8 + ROUTED) + HEAD, sizes=NARROW, num_experts=2,
    encoder_sparse_step=2, decoder_sparse_step=2, encoder_layerdrop=0.0, decoder_layerdrop=0.0
)
GENERATOR = dict(SIZES, **TOKENS, model_type="bert-generation")
translator(
    "encoder-decoder", BOTH + HEAD, sizes={}, encoder=GENERATOR,
    decoder=dict(GENERATOR, is_decoder=True, add_cross_attention=True)
)
add(
    MODEL, lambda: dict(text(), decoder_input_ids=IDS, bbox=BOXES / 100, pixel_values=IMAGES),
    "udop", BOTH, "last_hidden_state", **T5, image_size=32, patch_size=16
)
add(
    SPEECH, given(input_features=SPECTRUM.mT, decoder_input_ids=IDS), "speech_to_text", BOTH + HEAD,
    "logits", sizes=NARROW, input_feat_per_channel=16, conv_channels=20, max_source_positions=20
)
add(
    SPEECH, given(input_values=SOUND.repeat(1, 2), decoder_input_ids=IDS), "moonshine", BOTH + HEAD,
    "logits",
    sizes=dict(
        SIZES, encoder_num_hidden_layers=2, decoder_num_hidden_layers=2,
        encoder_num_attention_heads=4
    )
)
