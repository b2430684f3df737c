"""The role of each linear call of models that see, hear or forecast: see `test_roles_by_hand`."""

from tests.zoo.roles_of_decoders import GATED, QKVO
from tests.zoo.roles_of_encoders import BERT, DENSE, FC, OUT, SELF, TRANSFORM

VIT = f"layers.*(attention({QKVO}) mlp({FC}))"
CLIP = f"self_attn({OUT}) mlp({FC})"
TORCH = "in_proj_weight[q]=q in_proj_weight[k]=k in_proj_weight[v]=v out_proj=o"
# Attention to sampled points has a softmax, but no queries and keys.
SAMPLED = "sampling_offsets=- attention_weights=- value_proj=- output_proj=-"

VISION = {
    "vit": f"{VIT} pooler.dense=-",
    "dinov3_vit": f"model.layer.*(attention({QKVO}) mlp({GATED}))",
    "vitdet": f"encoder.layer.*(attention(qkv=qkv proj=o) mlp({FC}))",
    "vit_mae": f"vit.{VIT} decoder(decoder_embed=- decoder_pred=h "
               f"decoder_layers.*(attention({QKVO}) mlp({FC})))",
    "swin": f"encoder.layers.*(blocks.*(attention({QKVO}) mlp({FC})) downsample.reduction=-)",
    "swinv2": f"encoder.layers.*(blocks.*({BERT} "
              "attention.self.continuous_position_bias_mlp.*=-) downsample.reduction=-)",
    "hiera": f"encoder.stages.*.layers.*(attn(qkv=qkv proj=o) mlp({FC}) proj=-)",
    # a convolution within the feed-forward layers: no block of single rows
    "segformer": f"stages.*.blocks.*(attention({QKVO}) mlp(fc1=- fc2=-))",
    "pvt_v2": "encoder.layers.*.blocks.*(attention(query=q key=k value=v proj=o) "
              "mlp(dense1=- dense2=-))",
    "levit": "encoder.stages.*.layers.*(module(queries_keys_values.linear=qkv "
             "projection.linear=o linear_up.linear=m linear_down.linear=m) "
             "keys_values.linear=kv queries.linear=q projection.linear=o)",
    "cvt": "encoder.stages.*.layers.*(attention(attention(projection_query=q projection_key=k "
           f"projection_value=v) output.dense=o) {DENSE})",
    "focalnet": "encoder.stages.*.layers.*(modulation(projection_in=- projection_out=-) "
                f"mlp({FC}))",
    "convnext": "encoder.stages.*.layers.*(pwconv1=m pwconv2=m)",
    # the output of the attention in time is of two calls
    "timesformer": "encoder.layer.*(attention(attention.qkv=qkv output.dense=o) temporal_attention("
                   f"attention.qkv=qkv output.dense=o) temporal_dense=o {DENSE})",
    # boxes go through a sigmoid
    "yolos": "vit.encoder.layer.*(attention(attention(query=q key=k value=v) output.dense=o) "
             f"{DENSE}) class_labels_classifier.layers(0=- 1=- 2=h) bbox_predictor.layers.*=-",
    "deformable_detr": f"model(encoder.layers.*(self_attn({SAMPLED}) mlp({FC})) decoder.layers.*("
                       f"self_attn({QKVO}) encoder_attn({SAMPLED}) mlp({FC})) "
                       "reference_points=-) class_embed.*=h bbox_embed.*.layers.*=-",
    "mask2former": f"pixel_level_module(encoder.swin.encoder.layers.*(blocks.*(attention({QKVO}) "
                   f"mlp({FC})) downsample.reduction=-) decoder.encoder.layers.*("
                   f"self_attn({SAMPLED}) {FC})) transformer_module.decoder(layers.*("
                   f"self_attn({OUT}) cross_attn({TORCH}) {FC}) "
                   "mask_predictor.mask_embedder.*.*=-)",
}

# Both sides' projections are multiplied with each other, and so are no heads.
SEVERAL = {
    "clip": f"text_model.encoder.layers.*({CLIP}) vision_model.encoder.layers.*({CLIP}) "
            "visual_projection=- text_projection=-",
    "siglip": f"text_model(encoder.layers.*({CLIP}) head=-) "
              f"vision_model(encoder.layers.*({CLIP}) head(attention({TORCH}) mlp({FC})))",
    "siglip2": f"text_model(encoder.layers.*({CLIP}) head=-) vision_model("
               f"embeddings.patch_embedding=- encoder.layers.*({CLIP}) "
               f"head(attention({TORCH}) mlp({FC})))",
    "aimv2": f"vision_model(encoder.layers.*(attention({OUT}) ffn({GATED})) head(k_proj=k v_proj=v "
             f"output_proj=o)) text_model.encoder.layers.*(attention({OUT}) ffn({GATED})) "
             "visual_projection=- text_projection=-",
    # a softmax over queries; mlp_inter mixes groups, and its result is added to nothing
    "groupvit": f"text_model.encoder.layers.*({CLIP}) vision_model.encoder.stages.*("
                f"layers.*({CLIP}) downsample(mlp_inter(fc1=- fc2=-) pre_assign_attn("
                f"attn({OUT}) mlp({FC})) assign(q_proj=q k_proj=k v_proj=v proj=o) "
                f"mlp_channels({FC})) group_projector.*(fc1=- fc2=-)) visual_projection.*=- "
                "text_projection.*=-",
    "blip": f"vision_model.encoder.layers.*(self_attn(qkv=qkv projection=o) mlp({FC})) "
            f"text_decoder(bert.encoder.layer.*({BERT} crossattention({SELF} output.dense=o)) "
            f"{TRANSFORM})",
    "git": f"git(image_encoder.vision_model.encoder.layers.*({CLIP}) encoder.layer.*({BERT}) "
           "visual_projection.visual_projection.0=-) output=h",
    "vision-encoder-decoder": f"encoder.encoder.layer.*(attention({QKVO}) mlp({FC})) decoder("
                              f"model.decoder.layers.*(self_attn({OUT}) encoder_attn({OUT}) {FC}) "
                              "output_projection=h)",
    "clap": f"text_model(encoder.layer.*({BERT}) pooler.dense=-) text_projection(linear1=- "
            f"linear2=-) audio_model.audio_encoder.layers.*(blocks.*({BERT}) "
            "downsample.reduction=-) audio_projection(linear1=- linear2=-)",
}

FEED = "feed_forward(intermediate_dense=m output_dense=m)"
LINEAR = "linear_q=q linear_k=k linear_v=v linear_out=o"
WAV_FFN = "intermediate_dense=m output_dense=m"
FFN = "linear1=m linear2=m"
SOUND = {
    "wav2vec2": f"feature_projection.projection=- encoder.layers.*(attention({OUT}) {FEED})",
    "wavlm": "feature_projection.projection=- "
             f"encoder.layers.*(attention({OUT} gru_rel_pos_linear=-) {FEED})",
    # queries and keys of positions have the weights of the others
    "sew-d": "feature_projection=- encoder(upsample.projection=- encoder.layer.*(attention("
             f"self(query_proj=q key_proj=k value_proj=v) output.dense=o) {DENSE}))",
    "wav2vec2-conformer": f"feature_projection.projection=- encoder.layers.*(ffn1({WAV_FFN}) "
                          f"self_attn({LINEAR} linear_pos=-) ffn2({WAV_FFN}))",
    "wav2vec2-bert": f"feature_projection.projection=- encoder.layers.*(ffn1({WAV_FFN}) "
                     f"self_attn({LINEAR}) ffn2({WAV_FFN})) "
                     f"adapter.layers.*(self_attn({LINEAR}) ffn({WAV_FFN}))",
    "parakeet_encoder": f"subsampling.linear=- layers.*(feed_forward1({FFN}) "
                        f"self_attn({QKVO} relative_k_proj=-) feed_forward2({FFN}))",
    "lasr_encoder": f"subsampler(dense_0=- dense_1=-) layers.*(feed_forward1({FFN}) "
                    f"self_attn({QKVO}) feed_forward2({FFN}))",
    "audio-spectrogram-transformer": VIT,
}

GATE = "gating_block.attn_layer=-"
SERIES = {
    # only some queries attend
    "informer": f"encoder(value_embedding.value_projection=- layers.*(self_attn({OUT}) {FC})) "
                "decoder(value_embedding.value_projection=- "
                f"layers.*(self_attn({OUT}) encoder_attn({OUT}) {FC}))",
    # correlations by Fourier transforms: no products of queries and keys
    "autoformer": "encoder(value_embedding.value_projection=- layers.*("
                  f"self_attn(q_proj=- k_proj=- v_proj=- out_proj=-) {FC})) "
                  "decoder(value_embedding.value_projection=- layers.*("
                  "self_attn(q_proj=- k_proj=- v_proj=- out_proj=-) "
                  f"encoder_attn(q_proj=- k_proj=- v_proj=- out_proj=-) {FC}) "
                  "seasonality_projection=h)",
    "patchtst": f"encoder(embedder.input_embedding=- layers.*(self_attn({OUT}) ff(0=m 3=m)))",
    # feed-forward blocks over patches, features and channels, with gates that are softmaxes
    "patchtsmixer": f"encoder(patcher=- mlp_mixer_encoder.mixers.*(patch_mixer(mlp({FC}) {GATE} "
                    f"self_attn_layer({OUT})) feature_mixer(mlp({FC}) {GATE}) "
                    f"channel_feature_mixer(mlp({FC}) {GATE})))",
    # actions go through a tanh
    "decision_transformer": "embed_return=- embed_state=- embed_action=- "
                            "encoder.h.*(attn(c_attn=qkv c_proj=o) mlp(c_fc=m c_proj=m)) "
                            "predict_state=h predict_return=h predict_action.0=-",
}
