"""Every architecture of the installed transformers, tiny: built from its config with random
weights.

No architecture is treated by hand: SIZES says what a field of a config is set to by its name, in
whatever config it stands, and tiny_inputs.py makes an input by the name of forward's argument.
OVERRIDES is data: the values that some configs need beyond, and those that their defaults leave
out.
"""

import contextlib
import dataclasses
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from coverage_parts.inputs import FIRST_SPECIAL, IMAGE, VOCABULARY, attempts

LARGEST = 30_000_000  # parameters of a model that is built less small

# (names of fields, the largest value); the first line that matches counts. What is smaller stays as
# it is.
SIZES: tuple[tuple[str, int], ...] = (
    ("num_hidden_layers n_layer n_layers num_layers *_layers depth *_depth layers num_blocks", 2),
    ("*vocab_size* encoder_hash_byte_group_vocab max_position_embeddings n_positions max_seq_len "
     "n_ctx max_*_position_embeddings", VOCABULARY),
    ("image_size pretrain_image_size spec_size crop_size", IMAGE),
    ("attn_layer_period expert_layer_period", 2),
    ("attn_layer_offset expert_layer_offset first_k_dense_replace topk_group", 1),
    ("*key_value_heads *kv_heads num_experts_per_tok *topk *top_k n_group n_groups mamba_n_groups "
     "moe_k", 2),
    ("*attention_heads *num_heads n_head n_heads mamba_n_heads *_n_heads", 4),
    ("*num_experts n_routed_experts *local_experts mm_tokens_per_image", 4),
    ("qk_*_head_dim *head_dim v_head_dim d_kv d_head rotary_dim", 8),
    ("num_queries num_query_tokens *num_latents *_n_latents sliding_window attention_window "
     "index_kpool", 8),
    ("*lora_rank", 16),
    ("*hidden_size d_model n_embd *_embd dim *hidden_dim embedding_size emb_dim *projection_dim "
     "*_embed_dim *_width output_dim condition_dim hidden_size_global d_latents output_proj_dims "
     "upsample_groups base_channels", 32),
    ("embed_dim *intermediate_size* *ffn_dim d_ff *ffn_hidden_size mlp_dim d_inner "
     "*dim_feedforward dff dim_ff", 48),
    ("max_source_positions", 64),
)
LISTS = {"depths": 1, "decoder_in_channels": 32, "num_block_repeats": 1}  # what each item is set to
_SERIES = {"prediction_length": 4, "context_length": 8}
_WINDOW = {"window_size": 2}
_HEAD = {"head_dim": 8}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE = {"rope_parameters": _ROPE | {"mrope_section": [2, 1, 1]}}
_HALF_MROPE = {
    "rope_parameters": _ROPE | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}}
OVERRIDES: dict[str, dict[str, Any]] = {  # by model_type
    "autoformer": _SERIES, "informer": _SERIES, "time_series_transformer": _SERIES,
    "donut-swin": _WINDOW, "swin": _WINDOW,
    "hunyuan_v1_dense": _HEAD, "hunyuan_v1_moe": _HEAD, "hunyuan_vl_text": _HEAD,
    "ministral": _HEAD,
    "qwen2_vl_text": _MROPE, "qwen2_5_vl_text": _MROPE, "qwen2_5_omni_text": _MROPE,
    "paddleocr_vl_text": _MROPE,
    "glm4v_text": _HALF_MROPE, "glm4v_moe_text": _HALF_MROPE, "glm_image_text": _HALF_MROPE,
    "glm_ocr_text": _HALF_MROPE,
    "aria": {"projector_patch_to_query_dict": {4: 2, 16: 4}},
    "bamba": {"attn_layer_indices": [1]},
    "bridgetower_vision_model": {"hidden_size": 64},
    "chameleon": {"vocabulary_map": {"<image>": 100, "IMGIMGA0Z": 101}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "fun_asr_nano_encoder": {"num_stacked_frames": 1},
    "glm5_next_text": {"num_key_value_heads": 4, "index_topk": 8, "index_kpool": 4},
    "glmasr_encoder": {"intermediate_size": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_vision_model": {"intermediate_size": 128, "projector_input_dim": 32,
                            "projector_output_dim": 32, "vision_output_dim": 32},
    "mamba2": {"head_dim": 16},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "muse_spark_audio": {"hidden_sizes": [16, 16, 32, 32], "out_hidden_size": 32},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "neomme": {"head_dim": 16},
    "pixtral": {"head_dim": 8},
    "qwen4_exp_text": {"indexer_budget": 8, "indexer_compress_ratio": 2, "indexer_n_heads": 2,
                       "indexer_kv_heads": 1, "indexer_head_dim": 8},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "sam2_hiera_det_model": {"hidden_size": 96, "image_size": [64, 64]},
    "shieldgemma2": {"yes_token_index": 6, "no_token_index": 7},
    "vibevoice_acoustic_tokenizer": {"num_filters": 4},
    "vibevoice_acoustic_tokenizer_decoder": {"num_filters": 4},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 4},
    "vitmatte": {"fusion_hidden_sizes": [256, 128, 64, 32]},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "voxtral_encoder": {"intermediate_size": 128},
    "xmod": {"default_language": "en_XX"},
}


def sentence(error: BaseException) -> str:
    """An exception in one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


class NoModel(Exception):
    """No Auto class makes a model of this config: it is a part of another one's."""


@dataclasses.dataclass
class Tiny:
    """A model in eval mode; its inputs, or None and the reason why none of the dummy inputs fit.

    `size` says how it was made small and `how` which inputs they are.
    """

    model: PreTrainedModel
    size: str
    inputs: dict[str, Tensor] | None = None
    how: str = ""
    reason: str = ""


def architectures() -> list[str]:
    """Every model type that transformers has a config for."""
    return sorted(CONFIG_MAPPING.keys())


def tiny(name: str) -> Tiny:
    """An architecture at the smallest of three sizes that can be built and run, or that can at
    least be built."""
    best: Tiny | None = None
    errors: list[Exception] = []
    for size, sizes in (("tiny", SIZES), ("few layers", SIZES[:3]), ("as it is", ())):
        try:
            model = build(Shrinker(sizes).config(CONFIG_MAPPING[name], {}))
        except NoModel:
            raise
        except Exception as error:
            errors.append(error)
            continue
        found = Tiny(model, size)
        for how, make in attempts(model):
            try:
                inputs = make()
                with torch.no_grad():
                    model(**inputs)
                return Tiny(model, size, inputs, how)
            except Exception as error:
                found.reason = found.reason or sentence(error)
        best = best or found
    if best is None:
        raise errors[0]
    return best


def build(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config in float32, if it has no more than LARGEST parameters."""
    cls = model_class(config)
    with torch.device("meta"):
        empty = cls._from_config(config, dtype=torch.float32)
        count = sum(parameter.numel() for parameter in empty.parameters())
    if count > LARGEST:
        raise ValueError(f"{count / 1e6:.0f}M parameters even so")
    torch.manual_seed(0)
    return cls._from_config(config, dtype=torch.float32).eval()


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that an Auto class makes of a config: AutoModel's, else the first other one's."""
    others = [name for name in vars(modeling_auto) if fnmatch.fnmatch(name, "MODEL_FOR_*_MAPPING")]
    for name in ("MODEL_MAPPING", *others):
        with contextlib.suppress(KeyError):
            found = getattr(modeling_auto, name)[type(config)]
            return found[0] if isinstance(found, (tuple, list)) else found
    raise NoModel("no Auto class makes a model of it")


class Shrinker:
    """Makes small configs; `sizes` is a table like SIZES. A special token gets the same id in all
    configs of a model.

    Without sizes it makes the defaults, but for OVERRIDES.
    """

    def __init__(self, sizes: Sequence[tuple[str, int]]) -> None:
        self.sizes = [(names.split(), value) for names, value in sizes]
        self.special: dict[str, int] = {}

    def config(self, cls: type[PreTrainedConfig], given: Mapping[str, Any]) -> PreTrainedConfig:
        """A small config of this class, in which `given` are its parent's values for it."""
        values = dict(given)
        for key, spec in cls.sub_configs_defaults.items():
            own = spec.config_class
            if not spec.optional:
                if not issubclass(own, PreTrainedConfig):
                    own = CONFIG_MAPPING[spec.model_type]
                values[key] = self.config(own, spec.init_kwargs)
        if self.sizes:
            self.shrink(values, cls, given)
        return cls(**(values | OVERRIDES.get(cls.model_type, {})))

    def shrink(self, values: dict[str, Any], cls: type[PreTrainedConfig],
               given: Mapping[str, Any]) -> None:
        """Set the fields of one config to small values."""
        for field in dataclasses.fields(cls):
            default = given.get(field.name, field.default)
            if field.name not in cls.sub_configs_defaults and default is not dataclasses.MISSING:
                values[field.name] = self.value(field.name, default)
        values |= self.layers(cls, given)
        if {"kv_lora_rank", "num_key_value_heads"} <= values.keys():
            # latent attention makes keys for every head
            values["num_key_value_heads"] = values["num_attention_heads"]

    def value(self, name: str, default: Any) -> Any:
        """What a field is set to."""
        if isinstance(default, (list, tuple)) and name == "image_size":
            return type(default)(IMAGE * round(side / min(default)) for side in default)
        if isinstance(default, (list, tuple)) and name in LISTS:
            return type(default)(LISTS[name] for _ in default)
        if isinstance(default, bool) or not isinstance(default, int):
            return default
        if name.endswith(("_id", "_token_index")) and default >= FIRST_SPECIAL:
            place = len(self.special) % (VOCABULARY - FIRST_SPECIAL)
            return self.special.setdefault(name, FIRST_SPECIAL + place)
        return next((min(default, largest) for names, largest in self.sizes
                     if any(fnmatch.fnmatchcase(name, pattern) for pattern in names)), default)

    def layers(self, cls: type[PreTrainedConfig], given: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that have an item for each layer, cut to a layer of each kind, at least two
        and at most four.

        A backbone keeps as many layers as it hands out, and sections of rotary frequencies fit
        heads of 8.
        """
        found = dict(_fields(cls(**given)))
        number = cls.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        count = found.get(number)
        rope = found.get("rope_parameters") or {}
        changed = {}
        if "mrope_section" in rope:
            changed = {"rope_parameters": rope | {"mrope_section": [2, 1, 1]}}
        if not isinstance(count, int) or count < 3:
            return changed
        stages = len(given.get("out_indices") or given.get("out_features") or ())
        if stages and "depths" not in found:
            kept = max(2, stages)
            return {number: kept, "out_features": None,
                    "out_indices": list(range(kept - stages + 1, kept + 1))}
        lists = {name: items for name, items in found.items()
                 if isinstance(items, (list, tuple)) and len(items) == count}
        if not lists:
            return changed
        kinds: dict[str, int] = {}
        for index, kind in enumerate(zip(*lists.values())):
            kinds.setdefault(str(kind), index)
        indices = sorted(kinds.values())[:4] if len(kinds) > 1 else [0, 1]
        return changed | {number: len(indices)} | {
            name: [items[index] for index in indices] for name, items in lists.items()}


def _fields(config: PreTrainedConfig) -> Iterator[tuple[str, Any]]:
    """(name, value) of each field; one that differs from layer to layer has no value and raises."""
    for field in dataclasses.fields(config):
        with contextlib.suppress(Exception):
            yield field.name, getattr(config, field.name)
