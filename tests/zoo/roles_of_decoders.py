"""The role of each linear call of decoders, read in transformers' source: see `test_roles_by_hand`.

Mixture of experts, state spaces and linear attention are here too.
"""

QKVO = "q_proj=q k_proj=k v_proj=v o_proj=o"
GATED = "gate_proj=m up_proj=m down_proj=m"
EXPERTS = "experts(gate_up_proj=m down_proj=m)"
LLAMA = f"self_attn({QKVO}) mlp({GATED})"
HEAD = "lm_head=h"
FUSED = "query_key_value=qkv dense=o"
FOURFOLD = "mlp(dense_h_to_4h=m dense_4h_to_h=m)"
LATENT = "q_a_proj=q q_b_proj=q kv_a_proj_with_mqa=kv kv_b_proj=kv o_proj=o"
SHARED = f"shared_experts({GATED})"
SHARED_AND_GATE = f"shared_expert({GATED}) shared_expert_gate=-"
IN_OUT = "in_proj=- out_proj=-"
MAMBA = "in_proj=- x_proj=- dt_proj=- out_proj=-"

# No two lines here are the same kind of layer: fused, parallel, multi-query, sliding, gated.
DECODERS = {
    "llama": f"model.layers.*({LLAMA}) {HEAD}",
    "gemma2": f"model.layers.*({LLAMA}) {HEAD}",  # logits capped
    "olmo2": f"model.layers.*({LLAMA}) {HEAD}",  # norms after
    "diffllama": f"model.layers.*({LLAMA}) {HEAD}",  # two attentions of one layer, subtracted
    "phi": "model.layers.*(self_attn(q_proj=q k_proj=k v_proj=v dense=o) mlp(fc1=m fc2=m)) "
           + HEAD,  # attention and feed-forward in parallel
    "phi3": "model.layers.*(self_attn(qkv_proj=qkv o_proj=o) mlp(gate_up_proj=m down_proj=m)) "
            + HEAD,
    "gpt2": "transformer.h.*(attn(c_attn=qkv c_proj=o) mlp(c_fc=m c_proj=m)) " + HEAD,
    "gpt_bigcode": "transformer.h.*(attn(c_attn=qkv c_proj=o) mlp(c_fc=m c_proj=m)) " + HEAD,
    "imagegpt": "h.*(attn(c_attn=qkv c_proj=o) mlp(c_fc=m c_proj=m))",
    "gpt_neox": f"gpt_neox.layers.*(attention({FUSED}) {FOURFOLD}) {HEAD}",
    "bloom": f"transformer.h.*(self_attention({FUSED}) {FOURFOLD}) {HEAD}",
    "falcon": f"transformer.h.*(self_attention({FUSED}) {FOURFOLD}) {HEAD}",
    "gptj": "transformer.h.*(attn(q_proj=q k_proj=k v_proj=v out_proj=o) mlp(fc_in=m fc_out=m)) "
            + HEAD,
    "codegen": "transformer.h.*(attn(qkv_proj=qkv out_proj=o) mlp(fc_in=m fc_out=m)) " + HEAD,
    "opt": "model.decoder(project_in=- project_out=- layers.*(fc1=m fc2=m "
           "self_attn(q_proj=q k_proj=k v_proj=v out_proj=o))) " + HEAD,
    "mpt": "transformer.blocks.*(attn(Wqkv=qkv out_proj=o) ffn(up_proj=m down_proj=m)) " + HEAD,
    "ctrl": "transformer.h.*(multi_head_attention(Wq=q Wk=k Wv=v dense=o) ffn(0=m 2=m)) " + HEAD,
    "cpmant": "cpmant.encoder.layers.*(ffn.ffn(w_in(w_0=m w_1=m) w_out=m) self_att.self_attention("
              "project_q=q project_k=k project_v=v attention_out=o)) " + HEAD,
    "modernbert-decoder": "model.layers.*(attn(q_proj=q k_proj=k v_proj=v Wo=o) mlp(Wi=m Wo=m)) "
                          "lm_head.dense=- decoder=h",
    "hrm_text": f"model(L_module.layers.*({LLAMA} self_attn.gate_proj=-) "
                f"H_module.layers.*({LLAMA} self_attn.gate_proj=-)) {HEAD}",
    "minicpm3": f"model.layers.*(self_attn({LATENT}) mlp({GATED})) {HEAD}",
    # what a layer's own embedding multiplies reads two values, and is no feed-forward block
    "gemma4_text": f"model(layers.*({LLAMA} {EXPERTS} router.proj=- per_layer_input_gate=- "
                   f"per_layer_projection=-) per_layer_model_projection=-) {HEAD}",
}

EXPERT = {
    "mixtral": f"model.layers.*(self_attn({QKVO}) mlp(gate=- {EXPERTS})) {HEAD}",
    "gpt_oss": f"model.layers.*(self_attn({QKVO}) mlp(router=- {EXPERTS})) {HEAD}",
    "qwen2_moe": f"model.layers.*(self_attn({QKVO}) mlp(gate=- {EXPERTS} {SHARED_AND_GATE})) "
                 + HEAD,
    "afmoe": f"model(layers.*(self_attn({QKVO} gate_proj=-)) layers.0.mlp({GATED}) "
             f"layers.1.mlp(router.gate=- {EXPERTS} {SHARED})) {HEAD}",
    "dbrx": "transformer.blocks.*(norm_attn_norm.attn(Wqkv=qkv out_proj=o) ffn.router.layer=-) "
            + HEAD,
    # experts for query and output
    "jetmoe": "model.layers.*(mlp(input_linear=m output_linear=m router.layer=-) self_attention("
              "kv_proj=kv experts(input_linear=q output_linear=o router.layer=-))) " + HEAD,
    "llama4_text": f"model(layers.*.self_attn({QKVO}) layers.0.feed_forward({GATED}) "
                   f"layers.1.feed_forward(router=- {EXPERTS} shared_expert({GATED}))) {HEAD}",
    "granitemoeshared": f"model.layers.*(self_attn({QKVO}) block_sparse_moe(router=- {EXPERTS}) "
                        f"shared_mlp(input_linear=m output_linear=m)) {HEAD}",
    "deepseek_v2": f"model(layers.*.self_attn({LATENT}) layers.0.mlp({GATED}) "
                   f"layers.1.mlp(gate=- {EXPERTS} {SHARED})) {HEAD}",
    "deepseek_v3": f"model(layers.*.self_attn({LATENT}) layers.0.mlp({GATED}) "
                   f"layers.1.mlp(gate=- {EXPERTS} {SHARED})) {HEAD}",
    # the experts' result is added a layer later
    "longcat_flash": f"model.layers.*(self_attn.*({LATENT}) mlps.*({GATED}) "
                     f"mlp(router.classifier=- {EXPERTS})) {HEAD}",
    "glm_moe_dsa": f"model(layers.*.self_attn({LATENT} indexer(wq_b=- wk=- weights_proj=-)) "
                   f"layers.0.mlp({GATED}) layers.1.mlp(gate=- {EXPERTS} {SHARED})) {HEAD}",
    # one projection for keys and values, averaged over windows too; an output of two calls; fn
    # mixes the four streams
    "deepseek_v4": "model(layers.*(self_attn(q_a_proj=q q_b_proj=q kv_proj=kv o_a_proj=o "
                   f"o_b_proj=o) mlp(gate=- {EXPERTS} {SHARED}) attn_hc.fn=- ffn_hc.fn=-) "
                   "layers.*.self_attn.compressor(kv_proj=kv gate_proj=-) "
                   "layers.2.self_attn.compressor.indexer(kv_proj=- gate_proj=- q_b_proj=- "
                   f"scorer.weights_proj=-) hc_head.hc_fn=-) {HEAD}",
}

# Mixers that have no softmax over products of queries and keys have no role.
MIXERS = {
    "mamba": f"backbone.layers.*.mixer({MAMBA}) {HEAD}",
    "mamba2": f"backbone.layers.*.mixer({IN_OUT}) {HEAD}",
    "rwkv": "rwkv.blocks.*(attention(key=- value=- receptance=- output=-) "
            "feed_forward(key=m value=m receptance=-)) head=h",
    "jamba": f"model(layers.0(mamba({MAMBA}) feed_forward({GATED})) "
             f"layers.1(self_attn({QKVO}) feed_forward(router=- {EXPERTS}))) {HEAD}",
    "recurrent_gemma": "model(layers.0.temporal_block(linear_y=- linear_x=- linear_out=- "
                       "rg_lru(input_gate_weight=- recurrent_gate_weight=-)) "
                       f"layers.1.temporal_block({QKVO}) layers.*.mlp_block({GATED})) {HEAD}",
    "falcon_h1": f"model.layers.*(mamba({IN_OUT}) self_attn({QKVO}) feed_forward({GATED})) {HEAD}",
    "granitemoehybrid": f"model(layers.*(block_sparse_moe(router=- {EXPERTS}) "
                        "shared_mlp(input_linear=m output_linear=m)) "
                        f"layers.0.mamba({IN_OUT}) layers.1.self_attn({QKVO})) {HEAD}",
    "nemotron_h": f"model(layers.0.mixer({IN_OUT}) layers.1.mixer({QKVO}) "
                  "layers.2.mixer(up_proj=m down_proj=m) layers.3.mixer(gate=- fc1_latent_proj=m "
                  "fc2_latent_proj=m experts(up_proj=m down_proj=m) "
                  f"shared_experts(up_proj=m down_proj=m))) {HEAD}",
    # attention, a feed-forward block and what makes its result narrower, in one residual
    # connection
    "zamba": "model(layers.0.mamba(in_proj=- x_proj_weight=- dt_proj_weight=- out_proj=-) "
             f"layers.1.shared_transf(self_attn({QKVO}) feed_forward({GATED})) "
             "layers.*(linear=m mamba_decoder.mamba(in_proj=- x_proj_weight=- dt_proj_weight=- "
             f"out_proj=-))) {HEAD}",
    "zamba2": f"model(layers.0.mamba({IN_OUT}) layers.1.shared_transformer(self_attn({QKVO} "
              "linear_q_adapter_list.*.*=q linear_k_adapter_list.*.*=k "
              "linear_v_adapter_list.*.*=v) feed_forward(gate_up_proj=m down_proj=m "
              "gate_up_proj_adapter_list.*.*=m)) "
              f"layers.*(linear=m mamba_decoder.mamba({IN_OUT}))) {HEAD}",
    "lfm2": f"model(layers.0.conv({IN_OUT}) "
            "layers.1.self_attn(q_proj=q k_proj=k v_proj=v out_proj=o) "
            f"layers.*.feed_forward(w1=m w2=m w3=m)) {HEAD}",
    "minimax": "model(layers.0.self_attn(qkv_proj=- out_proj=- output_gate=-) "
               f"layers.1.self_attn({QKVO}) layers.*.mlp(gate=- {EXPERTS})) {HEAD}",
    # the projection of queries is that of attention's gate too
    "qwen3_next": "model(layers.0.linear_attn(in_proj_qkvz=- in_proj_ba=- out_proj=-) "
                  f"layers.1.self_attn({QKVO}) layers.*.mlp(gate=- {EXPERTS} {SHARED_AND_GATE})) "
                  + HEAD,
    "qwen3_5_text": "model(layers.0.linear_attn(in_proj_qkv=- in_proj_z=- in_proj_b=- in_proj_a=- "
                    f"out_proj=-) layers.1.self_attn({QKVO}) layers.*.mlp({GATED})) {HEAD}",
    "olmo_hybrid": "model(layers.0.linear_attn(q_proj=- k_proj=- v_proj=- a_proj=- b_proj=- "
                   f"g_proj=- o_proj=-) layers.1.self_attn({QKVO}) layers.*.mlp({GATED})) {HEAD}",
    "kimi_linear": "model(layers.0.self_attn(q_proj=- k_proj=- v_proj=- b_proj=- g_a_proj=- "
                   "g_b_proj=- o_proj=- forget_gate(f_a_proj=- f_b_proj=-)) layers.1.self_attn("
                   "q_proj=q kv_a_proj_with_mqa=kv kv_b_proj=kv o_proj=o) "
                   f"layers.0.mlp({GATED}) layers.1.mlp(gate=- {EXPERTS} {SHARED})) {HEAD}",
}
