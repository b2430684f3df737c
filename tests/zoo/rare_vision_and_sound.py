"""Architectures that see, hear or forecast, each for something that no row of `architectures` does.

Counts are as there. The rows are added to the same table.
"""

import dataclasses

import torch

from tests.zoo.architectures import (
    BOTH, EARS, FUSED, GATED, HEAD, IDS, IMAGES, LM, MODEL, NARROW, PLAIN, POOLED, POOLER, ROWS,
    SIDES, SIZE, SIZES, SPECTRUM, TOKENS, add, given, images, speech, text, text_and_images,
    vision,
)
from tests.zoo.rows import drawn

WORDS, OBJECTS = "AutoModelForImageTextToText", "AutoModelForObjectDetection"

# Images and films.
LARGE = drawn(2, 3, 64, 64).float()
FILM = drawn(2, 4, 3, 32, 32).float()
STAGES = dict(
    image_size=32, num_encoder_blocks=2, depths=[1, 1], hidden_sizes=[8, 16], patch_sizes=[4, 2],
    strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 3]
)
# both: two for the positions; swinv2: between the stages one
SWIN = dict(sizes={}, depths=[1, 1], num_heads=[2, 2])
vision(
    "swinv2", 2 * (PLAIN + 2) + 1, **SWIN, image_size=32, patch_size=4, embed_dim=8, window_size=4
)
vision("swin2sr", 2 * (PLAIN + 2), **SWIN, image_size=16, embed_dim=16, window_size=8)
vision("dinov3_vit", 2 * GATED, sizes=SIZE, use_gated_mlp=True, num_register_tokens=2)
vision(  # between the stages one
    "hiera", 2 * FUSED + 1, sizes={}, embed_dim=8, image_size=[32, 32], patch_size=[3, 3],
    patch_stride=[2, 2], patch_padding=[1, 1], depths=[1, 1], num_heads=[1, 2], num_query_pool=1,
    masked_unit_size=[4, 4], masked_unit_attention=[True, False]
)
vision("pvt", 2 * PLAIN, sizes={}, **STAGES, sequence_reduction_ratios=[2, 1])
vision("pvt_v2", 2 * PLAIN, sizes={}, **STAGES, sr_ratios=[2, 1], linear_attention=True)
# attention in three stages, feed-forward in these and between, attention to fewer positions there
add(
    MODEL, given(pixel_values=LARGE), "levit", 3 * 2 + 5 * 2 + 2 * 3, *POOLED, sizes={},
    image_size=64, hidden_sizes=[16, 24, 32], num_attention_heads=[2, 2, 3], depths=[1, 1, 1],
    key_dim=[4, 4, 4], initializer_range=0.2
)
vision(
    "cvt", (1 + 2 + 3) * PLAIN, sizes={}, embed_dim=[8, 16, 24], num_heads=[1, 2, 3],
    depth=[1, 2, 3]
)
vision(
    "focalnet", 2 * (2 + 2), sizes={}, image_size=32, embed_dim=8, hidden_sizes=[8, 16],
    depths=[1, 1], focal_levels=[2, 2], focal_windows=[3, 3], mlp_ratio=2.0
)
vision(
    "vitdet", 2 * FUSED, sizes=SIZE, mlp_ratio=2, window_block_indices=[0], window_size=2,
    pretrain_image_size=32, use_relative_position_embeddings=True
)
vision("convnextv2", 2 * 2, sizes={}, hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
add(  # a decoder: in, a layer, out
    "AutoModelForPreTraining", given(pixel_values=IMAGES, noise=drawn(2, 4).float()), "vit_mae",
    2 * PLAIN + 1 + PLAIN + 1, "logits", sizes=SIZE, mask_ratio=0.5, decoder_num_attention_heads=2,
    decoder_hidden_size=24, decoder_num_hidden_layers=1, decoder_intermediate_size=40
)
add(  # in space, in time, and one after the latter
    MODEL, given(pixel_values=FILM), "timesformer", 2 * (2 + 2 + 1 + 2), "last_hidden_state",
    sizes=SIZE, num_frames=4
)
add(
    MODEL, given(pixel_values=FILM), "vivit", 2 * PLAIN + POOLER, *POOLED, sizes=SIZE, num_frames=4,
    tubelet_size=[2, 16, 16]
)
add(  # classes and boxes by three each
    OBJECTS, images, "yolos", 2 * PLAIN + 3 + 3, "logits", "pred_boxes",
    sizes=dict(SIZE, image_size=[32, 32]), num_detection_tokens=3
)
SAMPLED = 4 + 2  # offsets, weights, values, output; up, down
add(  # points of reference, classes, boxes by three
    OBJECTS, images, "deformable_detr", SAMPLED + 2 * (4 + SAMPLED) + 1 + 1 + 3, "logits",
    "pred_boxes", sizes={}, d_model=32, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=48,
    decoder_ffn_dim=40, encoder_attention_heads=4, decoder_attention_heads=4, num_queries=5,
    num_feature_levels=2,
    backbone_config=dict(
        model_type="resnet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1],
        layer_type="basic", out_features=["stage2"]
    )
)
# a swin; a decoder of one layer, whose attention to pixels is torch's own; masks by three,
# thresholded
add(
    MODEL, given(pixel_values=LARGE), "mask2former", (4 * PLAIN + 3) + SAMPLED + (4 + 4 + 2) + 3,
    "transformer_decoder_last_hidden_state", sizes={}, feature_size=32, mask_feature_size=32,
    hidden_dim=32, encoder_feedforward_dim=40, encoder_layers=1, decoder_layers=2,
    num_attention_heads=4, dim_feedforward=48, num_queries=20,
    backbone_config=dict(
        model_type="swin", image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1],
        num_heads=[2, 2, 2, 2], window_size=2, out_features=["stage1", "stage2", "stage3", "stage4"]
    ),
    no_gradient=tuple(
        f"transformer_module.decoder.mask_predictor.mask_embedder.{i}.0" for i in range(3)
    )
)

# Images, sound and text.
BOTH_SIDES = 2 * PLAIN + 2 * PLAIN
add(  # attention without query as the head of images
    MODEL, text_and_images, "aimv2", 2 * 2 * GATED + 3 + 2, "logits_per_text", sizes=SIDES,
    projection_dim=16
)
# between three stages two of groups; the groups of one stage made those of the next; both sides
# projected
add(
    MODEL, text_and_images, "groupvit", 2 * PLAIN + 3 * PLAIN + 2 * (2 + PLAIN + 4 + 2) + 2 + 2 * 2,
    "logits_per_text",
    sizes=dict(
        SIDES,
        vision_config=dict(
            SIZE, num_hidden_layers=3, depths=[1, 1, 1], num_group_tokens=[4, 2, 0],
            num_output_groups=[4, 2, 0], patch_size=8
        )
    ),
    projection_dim=16, projection_intermediate_dim=20
)
add(  # patches; heads as siglip's
    MODEL,
    lambda: dict(
        text(), pixel_values=drawn(2, 4, 48).float(), pixel_attention_mask=torch.ones(2, 4).long(),
        spatial_shapes=torch.full((2, 2), 2)
    ),
    "siglip2", BOTH_SIDES + 1 + 1 + (4 + 2), "logits_per_text",
    sizes=dict(SIDES, vision_config=dict(SIZE, patch_size=4, num_patches=4))
)
add(
    WORDS, text_and_images, "blip", 2 * FUSED + 2 * (PLAIN + 4) + LM, "logits",
    sizes=dict(
        text_config=dict(
            SIZES, **TOKENS, sep_token_id=3, encoder_hidden_size=32, initializer_range=0.2
        ),
        vision_config=dict(SIZE, initializer_range=0.2)
    )
)
add(
    "AutoModelForCausalLM", text_and_images, "git", BOTH_SIDES + 1 + HEAD, "logits",
    vision_config=SIZE
)
add(
    WORDS, given(pixel_values=IMAGES, decoder_input_ids=IDS), "vision-encoder-decoder", BOTH + HEAD,
    "logits", sizes={}, encoder=dict(SIZE, model_type="dinov2", mlp_ratio=2),
    decoder=dict(
        NARROW, model_type="trocr", d_model=24, cross_attention_hidden_size=32, is_decoder=True,
        add_cross_attention=True
    )
)
add(  # a bert, a swin, and two for either
    MODEL, given(input_ids=IDS, input_features=drawn(2, 1, 64, 64).float()), "clap",
    (2 * PLAIN + POOLER) + (2 * PLAIN + 1) + 2 * 2, "logits_per_text", projection_dim=16,
    sizes=dict(
        text_config=dict(SIZES, **TOKENS),
        audio_config=dict(
            spec_size=64, num_mel_bins=64, patch_embeds_hidden_size=8, depths=[1, 1],
            num_attention_heads=[2, 2], hidden_size=16, window_size=4
        )
    )
)

# Sound. CONFORMER: two feed-forward layers, and attention.
CONFORMER = 2 * 2 + 4
speech("sew", 2 * PLAIN + 1 + 1, sizes=EARS)  # from the features' width; back to the length
speech("sew-d", 2 * PLAIN + 1 + 1, sizes=EARS, position_buckets=8, max_position_embeddings=40)
# positions
speech("wav2vec2-conformer", 2 * (CONFORMER + 1) + 1, sizes=EARS, conv_depthwise_kernel_size=3)
add(
    MODEL, given(input_features=SPECTRUM.mT), "wav2vec2-bert", 2 * CONFORMER + 1 + PLAIN,
    "last_hidden_state", feature_projection_input_dim=16, conv_depthwise_kernel_size=3,
    mask_time_prob=0.0, layerdrop=0.0, add_adapter=True, position_embeddings_type="rotary"
)
add(
    MODEL, given(input_features=SPECTRUM.mT), "parakeet_encoder", 2 * (CONFORMER + 1) + 1,
    "last_hidden_state", num_mel_bins=16, subsampling_conv_channels=8, conv_kernel_size=3,
    layerdrop=0.0
)
add(
    MODEL, given(input_features=SPECTRUM.mT), "lasr_encoder", 2 * CONFORMER + 2,
    "last_hidden_state", num_mel_bins=16, subsampling_conv_channels=8, conv_kernel_size=5,
    layerdrop=0.0
)
add(
    MODEL, given(input_values=SPECTRUM.mT), "audio-spectrogram-transformer", 2 * PLAIN, *POOLED,
    max_length=40, num_mel_bins=16, patch_size=8
)

# Series.
FORECAST = dict(
    past_values=drawn(2, 15), past_time_features=drawn(2, 15, 2),
    past_observed_mask=torch.ones(2, 15), future_values=drawn(2, 4),
    future_time_features=drawn(2, 4, 2)
)
# values into encoder and decoder; autoformer: the seasons out of it
for name in ("time_series_transformer", "informer", "autoformer"):
    add(
        MODEL, given(**{k: v.float() for k, v in FORECAST.items()}), name,
        BOTH + 2 + (name == "autoformer"), "last_hidden_state",
        sizes=dict(NARROW, encoder_layerdrop=0.0, decoder_layerdrop=0.0), prediction_length=4,
        context_length=8, num_time_features=2, lags_sequence=[1, 2, 3, 4, 5, 6, 7], label_length=4,
        moving_average=3
    )
PATCHES = dict(
    sizes={}, context_length=24, patch_length=6, patch_stride=3, d_model=16, num_input_channels=2
)
add(
    MODEL, given(past_values=drawn(2, 24, 2).float()), "patchtst", 2 * PLAIN + 1,
    "last_hidden_state", **PATCHES, num_attention_heads=4, num_hidden_layers=2, ffn_dim=40,
    channel_attention=True
)
add(  # three ways: two, and a gate
    MODEL, given(past_values=drawn(2, 24, 2).float()), "patchtsmixer", 2 * (3 * 3 + 4) + 1,
    "last_hidden_state", **PATCHES, mode="mix_channel", num_layers=2, self_attn=True,
    self_attn_heads=2
)
add(  # states, actions and returns, in and out
    MODEL,
    given(
        states=drawn(2, 5, 6).float(), actions=drawn(2, 5, 3).float(),
        rewards=drawn(2, 5, 1).float(), returns_to_go=drawn(2, 5, 1).float(),
        timesteps=torch.arange(5).expand(2, 5)
    ),
    "decision_transformer", 2 * FUSED + 3 + 3, "state_preds", "action_preds", "return_preds",
    sizes={}, vocab_size=3, state_dim=6, act_dim=3, hidden_size=32, max_ep_len=20, n_layer=2,
    n_head=4
)

# Products of activations whose kernels depend on which of these require a gradient.
for place, row in enumerate(ROWS):
    if row.name in ("wav2vec2-conformer", "parakeet_encoder"):
        ROWS[place] = dataclasses.replace(row, exact=False)
