"""More of transformers' architectures, each for something that no row of `architectures` does.

Counts are as there. The rows are added to the same table.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers import logging

from tests.zoo.architectures import (
    BOTH, EARS, EXPERTS, FUSED, GATED, GROUPED, HEAD, IDS, IMAGES, NARROW, PLAIN, ROWS, SIZE, SIZES,
    SOUND, SPECTRUM, TOKENS, Inputs, add, decoder, encoder, images, speech, text, text_and_images,
    translator, vision,
)
from tests.zoo.rows import drawn

__all__ = ["ROWS"]
logging.set_verbosity_error()  # which kernels are not installed

MASKED, MODEL, TRANSLATOR = "AutoModelForMaskedLM", "AutoModel", "AutoModelForSeq2SeqLM"
SPEECH, WORDS, OBJECTS = "AutoModelForSpeechSeq2Seq", "AutoModelForImageTextToText", "AutoModelForObjectDetection"
POOLED = ("last_hidden_state", "pooler_output")


def given(**inputs: Tensor) -> Inputs:
    return lambda: inputs


def masked(name: str, sites: int, inputs: Inputs = text, **more: Any) -> None:
    add(MASKED, inputs, name, sites, "logits", **more)


# Decoders whose layers are the usual ones, for their attention (positions, windows, norms) and activations.
for name in ("mpt", "gpt_bigcode", "openai-gpt", "persimmon"):  # gpt_bigcode: one key and value for all heads
    decoder(name, 2 * FUSED + HEAD)
for name in ("ctrl", "biogpt", "xglm"):
    decoder(name, 2 * PLAIN + HEAD, dff=40, ffn_dim=40)
for name in ("nanochat", "apertus", "arcee"):
    decoder(name, 2 * PLAIN + HEAD, **GROUPED)
for name in ("olmo", "exaone4", "helium", "diffllama", "bitnet"):
    decoder(name, 2 * GATED + HEAD, **GROUPED, clip_qkv=0.1, sliding_window=4, head_dim=8)
WINDOWS = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=4)
decoder("cohere2", 2 * GATED + HEAD, **GROUPED, **WINDOWS)
decoder("cpmant", 2 * GATED + HEAD, dim_head=6, dim_ff=48, prompt_length=4, position_bias_num_buckets=8)
decoder("glm4", 2 * (4 + 2) + HEAD, **GROUPED, head_dim=8)  # gate and up in one
decoder("modernbert-decoder", 2 * (4 + 2) + 2, cls_token_id=1, sep_token_id=2)  # the same; a head of two
add(MODEL, given(input_ids=IDS), "imagegpt", 2 * FUSED, "last_hidden_state", n_inner=48)
decoder("hrm_text", 2 * (GATED + 1) + HEAD, num_hidden_layers=1, head_dim=8)  # two stacks, in turns; attention's gate

# Queries, keys and values through narrow widths: down and up for the query, down and up for both others, output.
LATENT = 5
RANKS = dict(num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4,
             v_head_dim=5)
for name in ("minicpm3", "youtu"):
    decoder(name, 2 * (LATENT + 3) + HEAD, **RANKS, dim_model_base=16)

# Experts, all of which see every token. SHARED: one more that all tokens see.
MOE = dict(num_experts_per_tok=4, num_local_experts=4, num_experts=4, n_routed_experts=4, moe_intermediate_size=12)
SHARED = 3
decoder("gemma4_text", 2 * (GATED + EXPERTS + 2) + 1 + HEAD, **GROUPED, head_dim=6, vocab_size_per_layer_input=100,
        hidden_size_per_layer_input=12, enable_moe_block=True, num_experts=4, top_k_experts=4,
        moe_intermediate_size=12, **WINDOWS)  # experts beside the layers, and the layers' embeddings
decoder("dbrx", 2 * (2 + 1 + 3) + HEAD, sizes={}, vocab_size=100, d_model=32, n_heads=4, n_layers=2, max_seq_len=32,
        attn_config=dict(kv_n_heads=2, clip_qkv=8, rope_theta=100.0),
        ffn_config=dict(ffn_hidden_size=24, moe_num_experts=4, moe_top_k=4),
        missed=2 * 3)  # stacks in matrices, cut into experts, which a forward is given
decoder("jetmoe", 2 * (1 + EXPERTS + EXPERTS) + HEAD, num_key_value_heads=4, kv_channels=6, num_local_experts=4,
        num_experts_per_tok=4)  # one for keys and values, experts for query and output
decoder("llama4_text", GATED + (4 + EXPERTS + SHARED) + HEAD, **GROUPED, head_dim=8, intermediate_size_mlp=40,
        num_local_experts=4, num_experts_per_tok=4, interleave_moe_layer_step=2)
decoder("granitemoe", 2 * (4 + EXPERTS) + HEAD, **GROUPED, **MOE)
decoder("granitemoeshared", 2 * (4 + EXPERTS + 2) + HEAD, **GROUPED, **MOE, shared_intermediate_size=20)
decoder("ernie4_5_moe", GATED + (4 + EXPERTS + SHARED) + HEAD, **GROUPED, moe_intermediate_size=12, moe_k=4,
        moe_num_experts=4, moe_num_shared_experts=1)
decoder("glm4_moe", GATED + (4 + EXPERTS + SHARED) + HEAD, **GROUPED, **MOE, head_dim=8)
decoder("afmoe", (GATED + 1) + (4 + 1 + EXPERTS + SHARED) + HEAD, **GROUPED, **MOE, **WINDOWS, num_shared_experts=1,
        head_dim=8)  # attention has a gate
decoder("deepseek_v2", (LATENT + 3) + (LATENT + EXPERTS + SHARED) + HEAD, **RANKS, **MOE, first_k_dense_replace=1,
        n_shared_experts=1)
decoder("longcat_flash", 2 * LATENT + 2 * 3 + EXPERTS + HEAD, **RANKS, num_layers=1, ffn_hidden_size=48, head_dim=4,
        moe_topk=4, n_routed_experts=4, zero_expert_num=2, expert_ffn_hidden_size=12,
        sizes=dict(vocab_size=100, hidden_size=32, num_attention_heads=4))  # a layer has two; some experts are none
INDEXER = 3  # query, key, and the heads' weights; it chooses tokens, and so gets no gradient
decoder("glm_moe_dsa", 2 * (LATENT + INDEXER) + 3 + (EXPERTS + SHARED) + HEAD, **RANKS, **MOE, head_dim=4, index_topk=4,
        index_head_dim=8, index_n_heads=2, first_k_dense_replace=1, no_gradient=tuple(
            f"model.layers.{i}.self_attn.indexer.{layer}" for i in (0, 1) for layer in ("wq_b", "wk", "weights_proj")))
# Query down and up, key and value in one, output in groups and then as a whole; the experts; what mixes four streams
# before attention and before the experts. Two layers compress (value and gate), one of them chooses, by four more.
decoder("deepseek_v4", 3 * (LATENT + EXPERTS + SHARED + 2) + 2 * 2 + 4 + 1 + HEAD, num_hidden_layers=3,
        num_key_value_heads=1, head_dim=8, q_lora_rank=8, num_experts_per_tok=4, n_routed_experts=4, o_groups=2,
        o_lora_rank=6, index_n_heads=2, index_head_dim=8, index_topk=1, moe_intermediate_size=12, sliding_window=4,
        layer_types=["sliding_attention", "heavily_compressed_attention", "compressed_sparse_attention"],
        mlp_layer_types=["moe"] * 3,
        compress_rates=dict(compressed_sparse_attention=2, heavily_compressed_attention=4),
        no_gradient=tuple("model.layers.2.self_attn.compressor.indexer." + layer
                          for layer in ("kv_proj", "gate_proj", "q_b_proj", "scorer.weights_proj")))

# State spaces, recurrences, convolutions and linear attention in the place of attention, or in turns with it.
MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=4, mamba_chunk_size=4)
decoder("recurrent_gemma", (3 + 2 + 3) + GATED + HEAD, **GROUPED, lru_width=24, attention_window_size=4,
        block_types=["recurrent", "attention"])  # x, y, out; two gates that are stacks of blocks
decoder("bamba", (2 + 3) + GATED + HEAD, **GROUPED, **MAMBA, attn_layer_indices=[1])  # mamba: in, out
decoder("falcon_h1", 2 * (2 + GATED) + HEAD, **GROUPED, **{**MAMBA, "mamba_d_head": 6}, mamba_d_ssm=24)  # both at once
decoder("granitemoehybrid", (2 + EXPERTS + 2) + (4 + EXPERTS + 2) + HEAD, **GROUPED, **MAMBA, num_local_experts=4,
        num_experts_per_tok=4, shared_intermediate_size=20, layer_types=["mamba", "attention"])
decoder("nemotron_h", 2 + 4 + 2 + (EXPERTS + 2 + 2) + HEAD, **GROUPED, **MOE, moe_shared_expert_intermediate_size=20,
        layers_block_type=["mamba", "attention", "mlp", "moe"], head_dim=6, ssm_state_size=4, mamba_num_heads=4,
        mamba_head_dim=6, n_groups=1, chunk_size=4, moe_latent_size=8,
        sizes={k: v for k, v in SIZES.items() if k != "num_hidden_layers"})  # a shared expert; into and out of a width
# One transformer layer used twice, each time with a layer of its own, and three mamba layers.
HYBRID = dict(num_hidden_layers=3, layers_block_type=["mamba", "hybrid", "hybrid"], num_key_value_heads=4,
              mamba_d_state=4)
decoder("zamba", 3 * (2 + 2) + GATED + 2 + HEAD, **HYBRID, mamba_dt_rank=3, initializer_range=0.1)  # mamba: two stacks
decoder("zamba2", 3 * 2 + (4 + 2) + 2 + 2 * (4 * 2) + HEAD, **HYBRID, n_mamba_heads=4, chunk_size=4, num_mem_blocks=1,
        use_shared_attention_adapter=True, adapter_rank=3)  # for each use low ranks of query, key, value, gate and up
decoder("lfm2", (2 + 3) + GATED + HEAD, **GROUPED, layer_types=["conv", "full_attention"],
        block_auto_adjust_ff_dim=False)
decoder("lfm2_moe", (2 + 3) + (4 + EXPERTS) + HEAD, **GROUPED, **MOE, layer_types=["conv", "full_attention"],
        num_dense_layers=1)
LINEAR = dict(layer_types=["linear_attention", "full_attention"])
DELTA = dict(LINEAR, head_dim=8, linear_key_head_dim=4, linear_value_head_dim=6, linear_num_key_heads=2,
             linear_num_value_heads=4)
decoder("minimax", (3 + EXPERTS) + (4 + EXPERTS) + HEAD, **GROUPED, **LINEAR, num_local_experts=4,
        num_experts_per_tok=4, block_size=4)  # linear attention: query, key and value in one, output, gate
decoder("qwen3_next", (3 + EXPERTS + SHARED + 1) + (4 + EXPERTS + SHARED + 1) + HEAD, **GROUPED, **DELTA, num_experts=4,
        num_experts_per_tok=4, moe_intermediate_size=12, shared_expert_intermediate_size=20)  # qkvz, ba, out
decoder("qwen3_5_text", (5 + 3) + GATED + HEAD, **GROUPED, **DELTA)  # qkv, z, b, a, out
decoder("olmo_hybrid", (7 + 3) + GATED + HEAD, **GROUPED, **{**DELTA, "linear_num_key_heads": 4})  # qkv, a, b, g, o
decoder("kimi_linear", (4 + 5 + 3) + (LATENT - 1 + EXPERTS + SHARED) + HEAD, **{**RANKS, "q_lora_rank": None}, **MOE,
        **LINEAR, mlp_layer_types=["dense", "sparse"], linear_head_dim=6, linear_num_heads=2)
# the linear one: the gates f and g, of two each, and b; the other one has one query

# Encoders. LM: a layer, and the head.
LM = 2
FIRST = 1  # from the embedding's width
POOLER = 1
masked("deberta", 2 * (1 + 2 + 1 + 2) + 1 + 1, relative_attention=True, pos_att_type=["c2p", "p2c"], legacy=False,
       max_relative_positions=8, missed=1)  # in, two for positions, out; the head is an embedding given to it
masked("convbert", FIRST + 2 * (4 + 2 + 2) + LM, embedding_size=16, num_groups=2, conv_kernel_size=3)
# convbert: two for the convolution; up and down are in groups, stacks
masked("longformer", 2 * (PLAIN + 3) + LM, given(input_ids=IDS[:, :8], global_attention_mask=torch.eye(2, 8).long()),
       attention_window=4)  # query, key and value for tokens that see all
masked("nystromformer", 2 * PLAIN + LM, num_landmarks=3, segment_means_seq_len=9, conv_kernel_size=3)
masked("yoso", 2 * PLAIN + LM)
masked("ibert", 2 * PLAIN + LM)  # layers of its own, which quantise on demand
masked("mobilebert", FIRST + 2 * (PLAIN + 3 + 2) + LM + 1, embedding_size=16, intra_bottleneck_size=20,
       num_feedforward_networks=2)  # into and out of a width; one feed-forward more; a head of two weights joined
masked("roformer", FIRST + 2 * PLAIN + LM, embedding_size=16)
masked("rembert", FIRST + 2 * PLAIN + LM, input_embedding_size=16, output_embedding_size=24)
masked("nomic_bert", 2 * GATED + LM)
masked("roc_bert", FIRST + 2 * PLAIN + LM, pronunciation_embed_dim=12, pronunciation_vocab_size=100, shape_embed_dim=10,
       shape_vocab_size=100)
masked("xmod", 2 * (PLAIN + 2 * 2) + LM, given(input_ids=IDS, lang_ids=torch.tensor([0, 1])),
       languages=["en_XX", "de_DE"])  # an adapter of two for each of two languages
masked("perceiver", (1 + 2 + 1) * PLAIN + 1, sizes={}, vocab_size=100, max_position_embeddings=9, num_latents=5,
       d_latents=24, d_model=32, num_self_attends_per_block=2, num_self_attention_heads=4, num_cross_attention_heads=4,
       qk_channels=16, v_channels=24, missed=1)  # in, two within, out; the head is an embedding given to it
encoder("canine", (1 + 2 + 1) * PLAIN + POOLER, *POOLED, downsampling_rate=2, upsampling_kernel_size=2,
        num_hash_functions=4, num_hash_buckets=20, local_transformer_stride=4)  # characters, shorter, characters
add(MODEL, given(input_ids=IDS, entity_ids=IDS[:, :3] % 10, entity_position_ids=IDS[:, :3, None] % 9),
    "luke", FIRST + 2 * (PLAIN + 3) + POOLER, *POOLED, "entity_last_hidden_state", entity_vocab_size=10,
    entity_emb_size=12)  # a query each for words on entities, entities on words, and entities on entities
BOXES = IDS[..., None] + torch.tensor([0, 0, 4, 5])
add(MODEL, given(input_ids=IDS, bbox=BOXES / 100), "bros", 1 + 2 * PLAIN + POOLER, *POOLED, hidden_size=64)
add(MODEL, given(input_ids=IDS, bbox=BOXES, pixel_values=IMAGES), "layoutlmv3", 2 * PLAIN + 3, "last_hidden_state",
    coordinate_size=5, shape_size=6, input_size=32, patch_size=16,
    no_gradient=("encoder.rel_pos_bias", "encoder.rel_pos_x_bias", "encoder.rel_pos_y_bias"))  # looked up without grad
add(MODEL, given(input_ids=IDS, visual_embeds=drawn(2, 5, 12).float()), "visual_bert", 1 + 2 * PLAIN + POOLER, *POOLED,
    visual_embedding_dim=12)
add(MODEL, given(input_ids=IDS, visual_feats=drawn(2, 5, 12).float(), visual_pos=drawn(2, 5, 4).float()), "lxmert",
    2 + PLAIN + PLAIN + 2 * (4 + 2 * PLAIN) + POOLER, "language_output", "vision_output", "pooled_output", l_layers=1,
    r_layers=1, x_layers=2, visual_feat_dim=12)  # a layer for text, one for images; in two, one attention both ways

# Encoders and decoders.
for name, more in dict(blenderbot={}, plbart={}, fsmt=dict(src_vocab_size=100, tgt_vocab_size=100),
                       pegasus_x=dict(num_global_tokens=3, block_size=4)).items():
    translator(name, BOTH + HEAD, sizes=NARROW, **more)
add(TRANSLATOR, given(input_ids=IDS[:, :8], decoder_input_ids=IDS, global_attention_mask=torch.eye(2, 8).long()),
    "led", BOTH + 2 * 3 + HEAD, "logits", sizes=NARROW, attention_window=4)  # as longformer
translator("prophetnet", 2 * PLAIN + 2 * (PLAIN + 4 + 1) + HEAD, num_encoder_layers=2, num_decoder_layers=2,
           encoder_ffn_dim=48, decoder_ffn_dim=40, num_encoder_attention_heads=4, num_decoder_attention_heads=4,
           sizes=dict(vocab_size=100, hidden_size=32), decoder_start_token_id=2, disable_ngram_loss=True)  # positions
T5 = dict(d_model=32, d_kv=6, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
translator("umt5", 2 * GATED + 2 * (GATED + 4) + HEAD, **T5)
translator("t5gemma", 2 * GATED + 2 * (GATED + 4) + HEAD, sizes=dict(vocab_size=100), encoder=dict(
    SIZES, **GROUPED, head_dim=6), decoder=dict(SIZES, **GROUPED, head_dim=6, cross_attention_hidden_size=32))
ROUTED = 1 + 2 * 2  # two experts that are modules
translator("switch_transformers", (4 + 2 + 4 + ROUTED) + (8 + 2 + 8 + ROUTED) + HEAD, **{**T5, "d_kv": 8},
           num_experts=2, num_sparse_encoder_layers=1, num_decoder_layers=2, num_sparse_decoder_layers=1)
translator("nllb-moe", (4 + 2 + 4 + ROUTED) + (8 + 2 + 8 + ROUTED) + HEAD, sizes=NARROW, num_experts=2,
           encoder_sparse_step=2, decoder_sparse_step=2, encoder_layerdrop=0.0, decoder_layerdrop=0.0)
GENERATOR = dict(SIZES, **TOKENS, model_type="bert-generation")
translator("encoder-decoder", BOTH + HEAD, sizes={}, encoder=GENERATOR, decoder=dict(
    GENERATOR, is_decoder=True, add_cross_attention=True))
add(MODEL, lambda: dict(text(), decoder_input_ids=IDS, bbox=BOXES / 100, pixel_values=IMAGES), "udop", BOTH,
    "last_hidden_state", **T5, image_size=32, patch_size=16)
add(SPEECH, given(input_features=SPECTRUM.mT, decoder_input_ids=IDS), "speech_to_text", BOTH + HEAD, "logits",
    sizes=NARROW, input_feat_per_channel=16, conv_channels=20, max_source_positions=20)
add(SPEECH, given(input_values=SOUND.repeat(1, 2), decoder_input_ids=IDS), "moonshine", BOTH + HEAD, "logits",
    sizes=dict(SIZES, encoder_num_hidden_layers=2, decoder_num_hidden_layers=2, encoder_num_attention_heads=4))

# Images and films.
LARGE = drawn(2, 3, 64, 64).float()
FILM = drawn(2, 4, 3, 32, 32).float()
STAGES = dict(image_size=32, num_encoder_blocks=2, depths=[1, 1], hidden_sizes=[8, 16], patch_sizes=[4, 2],
              strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 3])
SWIN = dict(sizes={}, depths=[1, 1], num_heads=[2, 2])
vision("swinv2", 2 * (PLAIN + 2) + 1, **SWIN, image_size=32, patch_size=4, embed_dim=8, window_size=4)
vision("swin2sr", 2 * (PLAIN + 2), **SWIN, image_size=16, embed_dim=16, window_size=8)
# both: two for the positions; swinv2: between the stages one
vision("dinov3_vit", 2 * GATED, sizes=SIZE, use_gated_mlp=True, num_register_tokens=2)
vision("hiera", 2 * FUSED + 1, sizes={}, embed_dim=8, image_size=[32, 32], patch_size=[3, 3], patch_stride=[2, 2],
       patch_padding=[1, 1], depths=[1, 1], num_heads=[1, 2], num_query_pool=1, masked_unit_size=[4, 4],
       masked_unit_attention=[True, False])  # between the stages one
vision("pvt", 2 * PLAIN, sizes={}, **STAGES, sequence_reduction_ratios=[2, 1])
vision("pvt_v2", 2 * PLAIN, sizes={}, **STAGES, sr_ratios=[2, 1], linear_attention=True)
add(MODEL, given(pixel_values=LARGE), "levit", 3 * 2 + 5 * 2 + 2 * 3, *POOLED, sizes={}, image_size=64,
    hidden_sizes=[16, 24, 32], num_attention_heads=[2, 2, 3], depths=[1, 1, 1], key_dim=[4, 4, 4],
    initializer_range=0.2)
# levit: attention in three stages, feed-forward in these and between, attention to fewer positions between
vision("cvt", (1 + 2 + 3) * PLAIN, sizes={}, embed_dim=[8, 16, 24], num_heads=[1, 2, 3], depth=[1, 2, 3])
vision("focalnet", 2 * (2 + 2), sizes={}, image_size=32, embed_dim=8, hidden_sizes=[8, 16], depths=[1, 1],
       focal_levels=[2, 2], focal_windows=[3, 3], mlp_ratio=2.0)
vision("vitdet", 2 * FUSED, sizes=SIZE, mlp_ratio=2, window_block_indices=[0], window_size=2, pretrain_image_size=32,
       use_relative_position_embeddings=True)
vision("convnextv2", 2 * 2, sizes={}, hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
add("AutoModelForPreTraining", given(pixel_values=IMAGES, noise=drawn(2, 4).float()), "vit_mae",
    2 * PLAIN + 1 + PLAIN + 1, "logits", sizes=SIZE, mask_ratio=0.5, decoder_num_attention_heads=2,
    decoder_hidden_size=24, decoder_num_hidden_layers=1, decoder_intermediate_size=40)  # a decoder: in, a layer, out
add(MODEL, given(pixel_values=FILM), "timesformer", 2 * (2 + 2 + 1 + 2), "last_hidden_state", sizes=SIZE, num_frames=4)
# timesformer: in space, in time, and one after the latter
add(MODEL, given(pixel_values=FILM), "vivit", 2 * PLAIN + POOLER, *POOLED, sizes=SIZE, num_frames=4,
    tubelet_size=[2, 16, 16])
add(OBJECTS, images, "yolos", 2 * PLAIN + 3 + 3, "logits", "pred_boxes", sizes=dict(
    SIZE, image_size=[32, 32]), num_detection_tokens=3)  # classes and boxes by three each
SAMPLED = 4 + 2  # offsets, weights, values, output; up, down
add(OBJECTS, images, "deformable_detr", SAMPLED + 2 * (4 + SAMPLED) + 1 + 1 + 3, "logits",
    "pred_boxes", sizes={}, d_model=32, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=40,
    encoder_attention_heads=4, decoder_attention_heads=4, num_queries=5, num_feature_levels=2, backbone_config=dict(
        model_type="resnet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic",
        out_features=["stage2"]))  # points of reference, classes, boxes by three
add(MODEL, given(pixel_values=LARGE), "mask2former", (4 * PLAIN + 3) + SAMPLED + (4 + 4 + 2) + 3,
    "transformer_decoder_last_hidden_state", sizes={}, feature_size=32, mask_feature_size=32, hidden_dim=32,
    encoder_feedforward_dim=40, encoder_layers=1, decoder_layers=2, num_attention_heads=4, dim_feedforward=48,
    num_queries=20, backbone_config=dict(
        model_type="swin", image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[2, 2, 2, 2],
        window_size=2, out_features=["stage1", "stage2", "stage3", "stage4"]),
    no_gradient=tuple(f"transformer_module.decoder.mask_predictor.mask_embedder.{i}.0" for i in range(3)))
# mask2former: a swin; a decoder of one layer, whose attention to pixels is torch's own; masks by three, thresholded

# Images, sound and text.
SIDES = dict(text_config=dict(SIZES, **TOKENS), vision_config=SIZE)
BOTH_SIDES = 2 * PLAIN + 2 * PLAIN
add(MODEL, text_and_images, "aimv2", 2 * 2 * GATED + 3 + 2, "logits_per_text", sizes=SIDES, projection_dim=16)
# aimv2: attention without query as the head of images
add(MODEL, text_and_images, "groupvit", 2 * PLAIN + 3 * PLAIN + 2 * (2 + PLAIN + 4 + 2) + 2 + 2 * 2, "logits_per_text",
    sizes=dict(SIDES, vision_config=dict(
        SIZE, num_hidden_layers=3, depths=[1, 1, 1], num_group_tokens=[4, 2, 0], num_output_groups=[4, 2, 0],
        patch_size=8)), projection_dim=16, projection_intermediate_dim=20)
# groupvit: between three stages two of groups; the groups of one stage made those of the next; both sides projected
add(MODEL, lambda: dict(text(), pixel_values=drawn(2, 4, 48).float(), pixel_attention_mask=torch.ones(2, 4).long(),
                        spatial_shapes=torch.full((2, 2), 2)),
    "siglip2", BOTH_SIDES + 1 + 1 + (4 + 2), "logits_per_text", sizes=dict(
        SIDES, vision_config=dict(SIZE, patch_size=4, num_patches=4)))  # patches; heads as siglip's
add(WORDS, text_and_images, "blip", 2 * FUSED + 2 * (PLAIN + 4) + LM, "logits", sizes=dict(
    text_config=dict(SIZES, **TOKENS, sep_token_id=3, encoder_hidden_size=32, initializer_range=0.2),
    vision_config=dict(SIZE, initializer_range=0.2)))
add("AutoModelForCausalLM", text_and_images, "git", BOTH_SIDES + 1 + HEAD, "logits", vision_config=SIZE)
add(WORDS, given(pixel_values=IMAGES, decoder_input_ids=IDS), "vision-encoder-decoder", BOTH + HEAD, "logits", sizes={},
    encoder=dict(SIZE, model_type="dinov2", mlp_ratio=2), decoder=dict(
        NARROW, model_type="trocr", d_model=24, cross_attention_hidden_size=32, is_decoder=True,
        add_cross_attention=True))
add(MODEL, given(input_ids=IDS, input_features=drawn(2, 1, 64, 64).float()), "clap",
    (2 * PLAIN + POOLER) + (2 * PLAIN + 1) + 2 * 2, "logits_per_text", projection_dim=16, sizes=dict(
        text_config=dict(SIZES, **TOKENS), audio_config=dict(
            spec_size=64, num_mel_bins=64, patch_embeds_hidden_size=8, depths=[1, 1], num_attention_heads=[2, 2],
            hidden_size=16, window_size=4)))  # a bert, a swin, and two for either

# Sound. CONFORMER: two feed-forward layers, and attention.
CONFORMER = 2 * 2 + 4
speech("sew", 2 * PLAIN + 1 + 1, sizes=EARS)  # from the features' width; back to the length
speech("sew-d", 2 * PLAIN + 1 + 1, sizes=EARS, position_buckets=8, max_position_embeddings=40)
speech("wav2vec2-conformer", 2 * (CONFORMER + 1) + 1, sizes=EARS, conv_depthwise_kernel_size=3)  # positions
add(MODEL, given(input_features=SPECTRUM.mT), "wav2vec2-bert", 2 * CONFORMER + 1 + PLAIN, "last_hidden_state",
    feature_projection_input_dim=16, conv_depthwise_kernel_size=3, mask_time_prob=0.0, layerdrop=0.0,
    add_adapter=True, position_embeddings_type="rotary")
add(MODEL, given(input_features=SPECTRUM.mT), "parakeet_encoder", 2 * (CONFORMER + 1) + 1, "last_hidden_state",
    num_mel_bins=16, subsampling_conv_channels=8, conv_kernel_size=3, layerdrop=0.0)
add(MODEL, given(input_features=SPECTRUM.mT), "lasr_encoder", 2 * CONFORMER + 2, "last_hidden_state", num_mel_bins=16,
    subsampling_conv_channels=8, conv_kernel_size=5, layerdrop=0.0)
add(MODEL, given(input_values=SPECTRUM.mT), "audio-spectrogram-transformer", 2 * PLAIN, *POOLED, max_length=40,
    num_mel_bins=16, patch_size=8)

# Series.
FORECAST = dict(past_values=drawn(2, 15), past_time_features=drawn(2, 15, 2), past_observed_mask=torch.ones(2, 15),
                future_values=drawn(2, 4), future_time_features=drawn(2, 4, 2))
for name in ("time_series_transformer", "informer", "autoformer"):
    add(MODEL, given(**{k: v.float() for k, v in FORECAST.items()}), name, BOTH + 2 + (name == "autoformer"),
        "last_hidden_state", sizes=dict(NARROW, encoder_layerdrop=0.0, decoder_layerdrop=0.0), prediction_length=4,
        context_length=8, num_time_features=2, lags_sequence=[1, 2, 3, 4, 5, 6, 7], label_length=4, moving_average=3)
# values into encoder and decoder; autoformer: the seasons out of it
PATCHES = dict(sizes={}, context_length=24, patch_length=6, patch_stride=3, d_model=16, num_input_channels=2)
add(MODEL, given(past_values=drawn(2, 24, 2).float()), "patchtst", 2 * PLAIN + 1, "last_hidden_state", **PATCHES,
    num_attention_heads=4, num_hidden_layers=2, ffn_dim=40, channel_attention=True)
add(MODEL, given(past_values=drawn(2, 24, 2).float()), "patchtsmixer", 2 * (3 * 3 + 4) + 1, "last_hidden_state",
    **PATCHES, mode="mix_channel", num_layers=2, self_attn=True, self_attn_heads=2)  # three ways: two, and a gate
add(MODEL, given(states=drawn(2, 5, 6).float(), actions=drawn(2, 5, 3).float(), rewards=drawn(2, 5, 1).float(),
                 returns_to_go=drawn(2, 5, 1).float(), timesteps=torch.arange(5).expand(2, 5)), "decision_transformer",
    2 * FUSED + 3 + 3, "state_preds", "action_preds", "return_preds", sizes={}, vocab_size=3, state_dim=6, act_dim=3,
    hidden_size=32, max_ep_len=20, n_layer=2, n_head=4)  # states, actions and returns, in and out

# Products of activations whose kernels depend on which of these require a gradient.
for place, row in enumerate(ROWS):
    if row.name in ("wav2vec2-conformer", "parakeet_encoder"):
        ROWS[place] = dataclasses.replace(row, exact=False)
