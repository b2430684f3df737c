"""Adapters made under the names that transformers' modules had before, by transformers' table."""

import json
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

import lorafx
from tests.formats.test_peft_heads import saved_by_peft

pytestmark = pytest.mark.filterwarnings("ignore")  # what PEFT says of old options

IDS = torch.tensor([[1, 2, 3, 4]])
TEXT = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1,
            eos_token_id=2)
VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
              image_size=8, patch_size=4)


def qwen2_vl() -> nn.Module:
    text = TEXT | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    vision = dict(depth=1, embed_dim=32, hidden_size=32, num_heads=4)
    return transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(text_config=text, vision_config=vision))


def with_text(config: type, cls: type, text: str, vision: str) -> nn.Module:
    return cls(config(
        text_config=TEXT | {"model_type": text}, vision_config=VISION | {"model_type": vision}))


def llava() -> nn.Module:
    return with_text(transformers.LlavaConfig, transformers.LlavaForConditionalGeneration,
                     "llama", "clip_vision_model")


def llava_next() -> nn.Module:
    return with_text(transformers.LlavaNextConfig, transformers.LlavaNextForConditionalGeneration,
                     "llama", "clip_vision_model")


def gemma3() -> nn.Module:
    return with_text(transformers.Gemma3Config, transformers.Gemma3ForConditionalGeneration,
                     "gemma3_text", "siglip_vision_model")


def paligemma() -> nn.Module:
    return with_text(
        transformers.PaliGemmaConfig, transformers.PaliGemmaForConditionalGeneration,
        "gemma", "siglip_vision_model")


def mllama() -> nn.Module:
    text = TEXT | {"cross_attention_layers": [], "rope_scaling": {"rope_type": "default"}}
    vision = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_global_layers=1,
                  attention_heads=2, image_size=8, patch_size=4, vision_output_dim=32,
                  intermediate_layers_indices=[0], supported_aspect_ratios=[[1, 1]])
    return transformers.MllamaForConditionalGeneration(
        transformers.MllamaConfig(text_config=text, vision_config=vision))


def clip_text() -> nn.Module:
    sizes = {name: size for name, size in TEXT.items() if name != "num_key_value_heads"}
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes))


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VISION))


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(
        **TEXT, num_local_experts=4, num_experts_per_tok=2))


def qwen3_moe() -> nn.Module:
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(
        **TEXT, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8))


LATE = ("language_model.model.", "model.language_model.")  # what it was, and what it is


@pytest.mark.parametrize("build, targets, older", [
    (qwen2_vl, ["q_proj", "v_proj"], [("model.", "model.language_model.")]),
    (qwen2_vl, ["down_proj"], [("model.", "model.language_model.")]),
    (llava, ["q_proj", "v_proj"], [LATE, ("vision_tower.", "model.vision_tower.")]),
    (llava, ["linear_1"], [("multi_modal_projector.", "model.multi_modal_projector.")]),
    (llava_next, ["up_proj"], [LATE]),
    (gemma3, ["q_proj"], [LATE, ("vision_tower.", "model.vision_tower.")]),
    (paligemma, ["q_proj", "fc1"], [LATE, ("vision_tower.", "model.vision_tower.")]),
    (mllama, ["self_attn.q_proj"], [LATE, ("vision_model.", "model.vision_model.")]),
    (clip_text, ["q_proj", "fc1"], [("text_model.", "")]),
])
def test_older_names_of_modules(
    tmp_path: Path, build, targets: list[str], older: list[tuple[str, str]]
) -> None:
    base = build().eval()
    theirs = saved_by_peft(base, tmp_path, target_modules=targets)
    named_as_before(tmp_path, older)
    model = lorafx.load(base, tmp_path)
    torch.testing.assert_close(model(IDS)[0], theirs(IDS)[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(IDS)[0], base(IDS)[0], atol=1e-2) or targets == ["linear_1"]
    sites = [name for name in theirs.base_model.model.state_dict() if "lora_A" in name]
    assert len(lorafx.summary(model).sites) == len(sites)


def named_as_before(folder: Path, older: list[tuple[str, str]]) -> None:
    """The folder of PEFT's with keys as they were; each begins with one of those that are older."""
    file, prefix = folder / "adapter_model.safetensors", "base_model.model."
    found = {}
    for key, tensor in safetensors.torch.load_file(file).items():
        name = key.removeprefix(prefix)
        old, new = next(pair for pair in older if name.startswith(pair[1]))
        found[prefix + old + name.removeprefix(new)] = tensor
    safetensors.torch.save_file(found, file)


@pytest.mark.parametrize("key, part", [
    ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", "text_encoder"),
    ("lora_te_encoder_layers_0_self_attn_q_proj", None),
    ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", None),
])
def test_a_text_encoder_in_a_file_of_a_pipeline(
    tmp_path: Path, key: str, part: str | None
) -> None:
    base, path = clip_text().eval(), tmp_path / "style.safetensors"
    A, B = torch.randn(2, 32), torch.randn(32, 2)
    up, down = ("lora_up", "lora_down") if key.startswith("lora") else ("lora_B", "lora_A")
    safetensors.torch.save_file({f"{key}.{down}.weight": A, f"{key}.{up}.weight": B}, path)
    model = lorafx.load(base, path, part=part)
    changed = {"encoder.layers.0.self_attn.q_proj.weight": B @ A + base.encoder.layers[
        0].self_attn.q_proj.weight}
    wanted = torch.func.functional_call(base, changed, IDS)
    torch.testing.assert_close(model(IDS)[0], wanted[0], rtol=1e-5, atol=1e-5)


def test_older_names_inside_a_layer(tmp_path: Path) -> None:
    """ViT's layers changed theirs, and what adapters name are the old ends."""
    base, image = vit().eval(), torch.randn(2, 3, 8, 8)
    theirs = saved_by_peft(
        base, tmp_path, target_modules=["q_proj", "o_proj", "fc2"], modules_to_save=["classifier"])
    at = "vit.layers.0.", "vit.encoder.layer.0."
    named_as_before(tmp_path, [
        (f"{at[1]}attention.attention.query.", f"{at[0]}attention.q_proj."),
        (f"{at[1]}attention.output.dense.", f"{at[0]}attention.o_proj."),
        (f"{at[1]}output.dense.", f"{at[0]}mlp.fc2."), ("classifier", "classifier")])
    change_config(tmp_path, target_modules=["query", "output.dense"])
    model = lorafx.load(base, tmp_path)
    torch.testing.assert_close(model(image)[0], theirs(image)[0], rtol=1e-5, atol=1e-5)


def change_config(folder: Path, **changes: object) -> None:
    change_json(folder / "adapter_config.json", **changes)


def change_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def one_by_one(
    folder: Path, base: nn.Module, at: str, ends: tuple[str, str, str], **changes: object
) -> None:
    """A folder of PEFT's for a model whose experts were modules; `ends` are gate, down and up."""
    saved_by_peft(base, folder, target_modules=["q_proj"], lora_alpha=6)
    file = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    wide, narrow = base.model.layers[0].mlp.experts.down_proj.shape[1:]
    for expert in range(4):
        for end, (rows, columns) in zip(ends, [(narrow, wide), (wide, narrow), (narrow, wide)]):
            stem = f"base_model.model.model.layers.0.{at}.experts.{expert}.{end}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(2, columns)
            tensors[f"{stem}.lora_B.weight"] = torch.randn(rows, 2)
    safetensors.torch.save_file(tensors, file)
    change_config(folder, target_modules=["q_proj", *ends], **changes)


MOE = [(mixtral, "block_sparse_moe", ("w1", "w2", "w3")),
       (qwen3_moe, "mlp", ("gate_proj", "down_proj", "up_proj"))]


@pytest.mark.parametrize("build, at, ends", MOE)
def test_experts_one_by_one(tmp_path: Path, build, at: str, ends: tuple[str, str, str]) -> None:
    base = build().eval()
    one_by_one(tmp_path, base, at, ends)
    model = lorafx.load(base, tmp_path)
    theirs = peft.PeftModel.from_pretrained(build_same(base, build), tmp_path).eval()
    torch.testing.assert_close(model(IDS)[0], theirs(IDS)[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(IDS)[0], base(IDS)[0], atol=1e-2)
    stacks = {row.name.rpartition(".")[2] for row in lorafx.summary(model).sites}
    assert stacks == {"q_proj", "gate_up_proj", "down_proj"}
    lorafx.save(model, tmp_path / "today.safetensors")
    again = lorafx.load(base, tmp_path / "today.safetensors")
    assert torch.equal(again(IDS)[0], model(IDS)[0])


def test_experts_of_other_ranks_and_scales(tmp_path: Path) -> None:
    """Stacks have one rank and one scale, so that A and B are filled up with zeros, and B scaled.
    """
    base = mixtral().eval()
    one_by_one(tmp_path, base, "block_sparse_moe", ("w1", "w2", "w3"),
               alpha_pattern={"experts.1.w1": 3}, rank_pattern={"experts.2.w2": 1})
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    at = "base_model.model.model.layers.0.block_sparse_moe.experts."
    tensors[f"{at}2.w2.lora_A.weight"] = tensors[f"{at}2.w2.lora_A.weight"][:1].clone()
    tensors[f"{at}2.w2.lora_B.weight"] = tensors[f"{at}2.w2.lora_B.weight"][:, :1].clone()
    safetensors.torch.save_file(tensors, file)

    def delta(expert: int, end: str) -> torch.Tensor:
        A, B = (tensors[f"{at}{expert}.{end}.lora_{half}.weight"] for half in "AB")
        scale = {(1, "w1"): 3 / 2, (2, "w2"): 6 / 1}.get((expert, end), 6 / 2)
        return scale * B @ A

    merged = lorafx.merge(lorafx.load(base, tmp_path))
    ours, was = (model.model.layers[0].mlp.experts for model in (merged, base))
    for expert in range(4):
        both = torch.cat([delta(expert, "w1"), delta(expert, "w3")])
        torch.testing.assert_close(
            ours.gate_up_proj[expert], was.gate_up_proj[expert] + both, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            ours.down_proj[expert], was.down_proj[expert] + delta(expert, "w2"),
            rtol=1e-5, atol=1e-5)


def test_an_injected_model_knows_the_older_names_too(tmp_path: Path) -> None:
    base = mixtral().eval()
    one_by_one(tmp_path, base, "block_sparse_moe", ("w1", "w2", "w3"))
    model = lorafx.inject(base, targets=["q_proj"], adapter="other")
    lorafx.load(model, tmp_path)
    lorafx.activate(model, "default")
    assert torch.equal(model(IDS)[0], lorafx.load(base, tmp_path)(IDS)[0])


def test_what_the_table_cannot_join_stays_an_error(tmp_path: Path) -> None:
    base = mixtral().eval()
    one_by_one(tmp_path, base, "block_sparse_moe", ("w1", "w2", "w3"))
    file = tmp_path / "adapter_model.safetensors"
    whole = safetensors.torch.load_file(file)
    for lost in (".w3.", "experts.3.w2."):
        safetensors.torch.save_file({k: v for k, v in whole.items() if lost not in k}, file)
        change_config(tmp_path, target_modules=["q_proj", "w1", "w2"])
        if lost != ".w3.":
            change_config(tmp_path, target_modules=["q_proj", "w1", "w2", "w3"])
        with pytest.raises(lorafx.MismatchError, match="experts"):
            lorafx.load(base, tmp_path)


def build_same(base: nn.Module, build) -> nn.Module:
    """Another model with these weights, as PEFT changes the one that it is given."""
    other = build()
    other.load_state_dict(base.state_dict())
    return other
