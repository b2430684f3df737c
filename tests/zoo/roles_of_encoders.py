"""The role of each linear call of encoders and translators of texts: see `test_roles_by_hand`."""

from tests.zoo.roles_of_decoders import GATED, QKVO

SELF = "self(query=q key=k value=v)"
DENSE = "intermediate.dense=m output.dense=m"
BERT = f"attention({SELF} output.dense=o) {DENSE}"
TRANSFORM = "cls.predictions(transform.dense=- decoder=h)"
OUT = "q_proj=q k_proj=k v_proj=v out_proj=o"
FC = "fc1=m fc2=m"
T5 = "q=q k=k v=v o=o"
CROSS = f"encoder.layers.*(self_attn({OUT}) {FC}) " \
        f"decoder.layers.*(self_attn({OUT}) encoder_attn({OUT}) {FC})"

ENCODERS = {
    "bert": f"encoder.layer.*({BERT}) pooler.dense=-",
    "albert": "encoder(embedding_hidden_mapping_in=- albert_layer_groups.*.albert_layers.*("
              "attention(query=q key=k value=v dense=o) ffn=m ffn_output=m)) pooler=-",
    "deberta-v2": "encoder.layer.*(attention(self(query_proj=q key_proj=k value_proj=v) "
                  f"output.dense=o) {DENSE})",
    "deberta": "deberta.encoder.layer.*(attention(self(in_proj=qkv pos_proj=- pos_q_proj=-) "
               f"output.dense=o) {DENSE}) lm_predictions.lm_head.dense=-",
    "modernbert": "layers.*(attn(Wqkv=qkv Wo=o) mlp(Wi=m Wo=m))",
    "nomic_bert": f"nomic_bert.layers.*(self_attn({QKVO}) mlp({GATED})) {TRANSFORM}",
    "fnet": f"embeddings.projection=- encoder.layer.*({DENSE}) pooler.dense=-",
    "xlm": "attentions.*(q_lin=q k_lin=k v_lin=v out_lin=o) ffns.*(lin1=m lin2=m)",
    # the output reads attention beside a convolution of which the kernel is computed
    "convbert": "convbert(embeddings_project=- encoder.layer.*(attention(self(query=q key=k "
                f"value=v conv_kernel_layer=- conv_out_layer=-) output.dense=o) {DENSE})) "
                "generator_predictions.dense=- generator_lm_head=h",
    "longformer": "longformer.encoder.layer.*(attention(self(query=q key=k value=v query_global=q "
                  f"key_global=k value_global=v) output.dense=o) {DENSE}) "
                  "lm_head(dense=- decoder=h)",
    # three softmaxes, over landmarks
    "nystromformer": f"nystromformer.encoder.layer.*({BERT}) {TRANSFORM}",
    # a power of an angle in the place of the softmax
    "yoso": "yoso.encoder.layer.*(attention(self(query=- key=- value=-) output.dense=-) "
            f"{DENSE}) {TRANSFORM}",
    # queries and keys read a narrow projection, values do not; the layer is a narrow one too
    "mobilebert": f"mobilebert(embeddings.embedding_transformation=- encoder.layer.*({BERT} "
                  f"bottleneck(input.dense=- attention.dense=qk) ffn.*({DENSE}) "
                  "output.bottleneck.dense=-)) "
                  "cls.predictions(transform.dense=- dense=h decoder=h)",
    "rembert": f"rembert.encoder(embedding_hidden_mapping_in=- layer.*({BERT})) "
               "cls.predictions(dense=- decoder=h)",
    "roc_bert": f"roc_bert(embeddings.map_inputs_layer=- encoder.layer.*({BERT})) {TRANSFORM}",
    # adapters of languages, each with a residual connection
    "xmod": f"roberta.encoder.layer.*({BERT} output.adapter_modules.*(dense1=m dense2=m)) "
            "lm_head(dense=- decoder=h)",
    "perceiver": f"perceiver(encoder(cross_attention(attention({SELF} output.dense=o) "
                 f"mlp(dense1=m dense2=m)) self_attends.*(attention({SELF} output.dense=o) "
                 "mlp(dense1=m dense2=m))) decoder.decoding_cross_attention("
                 f"attention({SELF} output.dense=o) mlp(dense1=m dense2=m)))",
    "canine": f"initial_char_encoder.layer.*({BERT}) encoder.layer.*({BERT}) "
              f"final_char_encoder.layer.*({BERT}) pooler.dense=-",
    "luke": f"entity_embeddings.entity_embedding_dense=- encoder.layer.*({BERT} attention.self("
            "w2e_query=q e2w_query=q e2e_query=q)) pooler.dense=-",
    # queries multiply with what is made of places
    "bros": f"bbox_embeddings.bbox_projection=- encoder.layer.*({BERT}) pooler.dense=-",
    "layoutlmv3": f"encoder(layer.*({BERT}) rel_pos_bias=- rel_pos_x_bias=- rel_pos_y_bias=-)",
    "visual_bert": f"embeddings.visual_projection=- encoder.layer.*({BERT}) pooler.dense=-",
    "lxmert": f"encoder(visn_fc(visn_fc=- box_fc=-) layer.*({BERT}) r_layers.*({BERT}) x_layers.*("
              "visual_attention(att(query=q key=k value=v) output.dense=o) "
              f"lang_self_att({SELF} output.dense=o) visn_self_att({SELF} output.dense=o) "
              "lang_inter.dense=m lang_output.dense=m visn_inter.dense=m visn_output.dense=m)) "
              "pooler.dense=-",
}

TRANSLATORS = {
    "bart": f"model({CROSS}) lm_head=h",
    "pegasus_x": f"model({CROSS}) lm_head=h",
    "speech_to_text": f"model({CROSS}) lm_head=h",
    "whisper": f"model({CROSS}) proj_out=h",
    "moonshine": f"model(encoder.layers.*(self_attn({QKVO}) mlp({FC})) "
                 f"decoder.layers.*(self_attn({QKVO}) encoder_attn({QKVO}) mlp({FC}))) proj_out=h",
    "t5": f"encoder.block.*.layer(*.SelfAttention({T5}) *.DenseReluDense(wi=m wo=m)) "
          f"decoder.block.*.layer(*.SelfAttention({T5}) *.EncDecAttention({T5}) "
          "*.DenseReluDense(wi=m wo=m)) lm_head=h",
    "umt5": f"encoder.block.*.layer(*.SelfAttention({T5}) *.DenseReluDense(wi_0=m wi_1=m wo=m)) "
            f"decoder.block.*.layer(*.SelfAttention({T5}) *.EncDecAttention({T5}) "
            "*.DenseReluDense(wi_0=m wi_1=m wo=m)) lm_head=h",
    "udop": f"encoder.block.*.layer(*.SelfAttention({T5}) *.DenseReluDense(wi=m wo=m)) "
            f"decoder.block.*.layer(*.SelfAttention({T5}) *.EncDecAttention({T5}) "
            "*.DenseReluDense(wi=m wo=m))",
    "t5gemma": f"model(encoder.layers.*(self_attn({QKVO}) mlp({GATED})) decoder.layers.*("
               f"self_attn({QKVO}) cross_attn({QKVO}) mlp({GATED}))) lm_head.out_proj=h",
    # experts that are modules
    "switch_transformers": f"encoder.block(*.layer.0.SelfAttention({T5}) 0.layer.1.mlp(wi=m wo=m) "
                           "1.layer.1.mlp(router.classifier=- experts.*(wi=m wo=m))) "
                           f"decoder.block(*.layer.0.SelfAttention({T5}) "
                           f"*.layer.1.EncDecAttention({T5}) 0.layer.2.mlp(wi=m wo=m) "
                           "1.layer.2.mlp(router.classifier=- experts.*(wi=m wo=m))) lm_head=h",
    "nllb-moe": f"model(encoder.layers(*.self_attn({OUT}) 0.ffn({FC}) "
                f"1.ffn(router.classifier=- experts.*({FC}))) decoder.layers(*(self_attn({OUT}) "
                f"cross_attention({OUT})) 0.ffn({FC}) "
                f"1.ffn(router.classifier=- experts.*({FC})))) lm_head=h",
    "prophetnet": "prophetnet(encoder.layers.*(self_attn(query_proj=q key_proj=k value_proj=v "
                  "out_proj=o) feed_forward(intermediate=m output=m)) decoder.layers.*("
                  "self_attn(query_proj=q key_proj=k value_proj=v out_proj=o "
                  "relative_pos_embeddings=-) cross_attn(query_proj=q key_proj=k value_proj=v "
                  "out_proj=o) feed_forward(intermediate=m output=m))) lm_head=h",
    "encoder-decoder": f"encoder.encoder.layer.*({BERT}) decoder(bert.encoder.layer.*({BERT} "
                       f"crossattention({SELF} output.dense=o)) lm_head.decoder=h)",
}
