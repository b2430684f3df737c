"""What adapters of PEFT's people publish: options and how often, of 268 configs.

The numbers follow what was counted of a collection (targets, alpha / r, dropout, task, what is
saved beside); which of them go together is made up here.
"""

from typing import Any, NamedTuple


class Published(NamedTuple):
    """A config, for which architecture, and how many of the collection are like it."""

    count: int
    architecture: str
    task: str | None
    targets: list[str] | str
    r: int
    alpha: int
    dropout: float = 0.0
    more: dict[str, Any] = {}


LM, LABELS, TRANSLATE, TOKENS, ANSWERS = (
    "CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS")
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FOUR = ["q_proj", "k_proj", "v_proj", "o_proj"]
TWO = ["q_proj", "v_proj"]
UNET = ["to_q", "to_k", "to_v", "to_out.0"]
FUSED = ["query_key_value"]
BNB = {"base": "unsloth/some-model-bnb-4bit"}
HEADS = {"modules_to_save": ["classifier", "score"]}
WHOLE = {"modules_to_save": ["embed_tokens", "lm_head"]}

COLLECTION = [
    # attention and MLP of a decoder: 84
    Published(18, "llama", LM, ALL, 16, 16, 0.0, BNB),
    Published(12, "llama", LM, ALL, 16, 32, 0.05),
    Published(8, "llama", None, ALL, 64, 128, 0.05),
    Published(8, "mistral", LM, ALL, 16, 32, 0.05),
    Published(6, "mistral", LM, ALL, 16, 16, 0.0, BNB),
    Published(14, "qwen2", LM, ALL, 8, 16),
    Published(6, "qwen2", LM, ALL, 16, 16, 0.0, BNB),
    Published(3, "gemma", LM, ALL, 8, 16, 0.05),
    Published(3, "gemma2", LM, ALL, 16, 32, 0.1),
    Published(4, "qwen2_vl", LM, ALL, 8, 16, 0.05),
    Published(2, "qwen2", LM, ALL, 32, 64, 0.0, {"use_rslora": True}),
    # the two of the first paper: 39
    Published(14, "llama", LM, TWO, 8, 16, 0.05),
    Published(5, "llama", LM, TWO, 8, 32, 0.1),
    Published(6, "mistral", None, TWO, 16, 16, 0.05),
    Published(5, "opt", LM, TWO, 8, 16, 0.05),
    Published(5, "whisper", None, TWO, 32, 64, 0.05),
    Published(2, "llama", LABELS, TWO, 8, 16, 0.1),
    Published(2, "bart", TRANSLATE, TWO, 8, 32, 0.1),
    # attention: 37
    Published(13, "llama", LM, FOUR, 16, 16, 0.1),
    Published(9, "mistral", LM, FOUR, 8, 16, 0.05),
    Published(7, "qwen2", LM, FOUR, 8, 16, 0.05),
    Published(4, "gemma", LM, FOUR, 8, 32, 0.1),
    Published(2, "qwen2_vl", LM, FOUR, 8, 16, 0.05),
    Published(2, "llama", LM, FOUR, 64, 16, 0.1),
    # a diffusion model's U-Net: 17
    Published(9, "unet", None, UNET, 4, 4),
    Published(5, "unet", None, UNET, 16, 16),
    Published(3, "unet", None, ["to_k", "to_q", "to_v"], 8, 32, 0.1),
    # one weight for query, key and value: 16
    Published(7, "falcon", LM, FUSED, 16, 32, 0.05),
    Published(5, "gpt_neox", LM, FUSED, 8, 16, 0.05),
    Published(4, "bloom", LM, FUSED, 8, 32, 0.05),
    # others: 75
    Published(7, "gpt2", LM, ["c_attn"], 8, 16, 0.05, {"fan_in_fan_out": True}),
    Published(3, "gpt2", LM, ["c_attn", "c_proj", "c_fc"], 8, 16, 0.1, {"fan_in_fan_out": True}),
    Published(3, "phi", LM, ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"], 16, 32, 0.05),
    Published(3, "phi3", LM, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], 8, 8, 0.05),
    Published(2, "llama", LM, "all-linear", 16, 32, 0.05),
    Published(1, "gptj", LM, TWO + ["k_proj", "out_proj"], 16, 16, 0.1),
    Published(4, "qwen2", LM, r"model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj", 8, 16),
    Published(5, "llama", LM, ALL[4:], 8, 32, 0.05),
    Published(8, "bert", LABELS, ["query", "value"], 8, 16, 0.1, HEADS),
    Published(5, "roberta", LABELS, ["query", "value"], 16, 32, 0.1, HEADS),
    Published(2, "distilbert", LABELS, ["q_lin", "v_lin"], 4, 32, 0.01, HEADS),
    Published(3, "deberta-v2", LABELS, ["query_proj", "value_proj"], 8, 16, 0.1),
    Published(4, "bert", TOKENS, ["query", "key", "value"], 16, 16, 0.1),
    Published(2, "bert", ANSWERS, ["query", "value"], 8, 32, 0.1),
    Published(8, "t5", TRANSLATE, ["q", "v"], 16, 32, 0.05),
    Published(4, "t5", TRANSLATE, ["q", "k", "v", "o", "wi", "wo"], 8, 32, 0.1),
    Published(2, "clip", "FEATURE_EXTRACTION", [*TWO, "k_proj"], 16, 16, 0.1),
    Published(2, "vit", None, ["k_proj", "v_proj"], 16, 16, 0.1,
              {"modules_to_save": ["classifier"]}),
    # LM, with an embedding and its head trained whole beside it
    Published(2, "llama", LM, ALL[:5], 16, 32, 0.05, WHOLE),
    Published(2, "mistral", LM, ["q_proj"], 16, 32, 0.05, WHOLE),
    # what lorafx says that it does not adapt: embeddings and convolutions
    Published(2, "qwen2", LM, TWO + ["embed_tokens"], 8, 16, 0.05),
    Published(1, "unet", None, UNET + ["conv_in"], 8, 8),
]
