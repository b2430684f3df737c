"""The kinds of PEFT's adapters that people publish, tried against PEFT both ways.

265 of 268 compute here what they compute there; the rest are named in REFUSED.
"""

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

import lorafx
from tests.formats.peft_collection import (
    ALL, BNB, COLLECTION, FOUR, FUSED, HEADS, TWO, Published)
from tests.support.oracle import randomise
from tests.support.peft_adapters import stir
from tests.zoo.rows import flat

pytestmark = pytest.mark.filterwarnings("ignore")  # what PEFT says of heads that are not there

IDS = torch.tensor([[7, 8, 9, 10]])
IMAGE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SIZES = dict(
    vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
    intermediate_size=24, pad_token_id=0, bos_token_id=1, eos_token_id=2)
NARROW = dict(
    vocab_size=32, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, decoder_start_token_id=2,
    pad_token_id=0, bos_token_id=1, eos_token_id=2)
GROUPED = SIZES | dict(num_key_value_heads=1)
SIDE = dict(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=8,
    patch_size=4)
FIELDS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "phi3"), GROUPED),
    **dict.fromkeys(("gemma", "gemma2"), GROUPED | dict(head_dim=8)),
    "opt": SIZES | dict(ffn_dim=24, word_embed_proj_dim=16),
    "bart": NARROW,
    "whisper": NARROW | dict(num_mel_bins=4, max_source_positions=4, max_target_positions=8),
    "t5": dict(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
               decoder_start_token_id=0, pad_token_id=0, eos_token_id=1),
    "qwen2_vl": dict(
        text_config=GROUPED | dict(rope_scaling=dict(type="mrope", mrope_section=[1, 1, 2])),
        vision_config=dict(depth=1, embed_dim=16, hidden_size=16, num_heads=2)),
    "gptj": dict(vocab_size=32, n_embd=16, n_layer=1, n_head=2, rotary_dim=4),
    "distilbert": dict(vocab_size=32, dim=16, n_layers=1, n_heads=2, hidden_dim=24),
    "clip": dict(text_config=SIZES, vision_config=SIDE, projection_dim=8),
    "vit": SIDE,
}
AUTO = {"SEQ_CLS": "AutoModelForSequenceClassification", "TOKEN_CLS":
        "AutoModelForTokenClassification", "QUESTION_ANS": "AutoModelForQuestionAnswering",
        "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM"}
AUTO_OF = {"whisper": "AutoModelForSpeechSeq2Seq", "clip": "AutoModel",
           "vit": "AutoModelForImageClassification", "qwen2_vl": "AutoModelForImageTextToText"}
EARS = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0))
INPUTS: dict[str, dict[str, Tensor]] = {
    "vit": dict(pixel_values=IMAGE), "clip": dict(input_ids=IDS, pixel_values=IMAGE),
    "t5": dict(input_ids=IDS, decoder_input_ids=IDS),
    "bart": dict(input_ids=IDS, decoder_input_ids=IDS),
    "whisper": dict(input_features=EARS, decoder_input_ids=IDS),
    "unet": dict(sample=IMAGE[:, :, :4, :4], timestep=torch.tensor(1),
                 encoder_hidden_states=torch.randn(
                     1, 3, 8, generator=torch.Generator().manual_seed(0)))}

# Why some are refused, by what is among their targets.
REFUSED = {"embed_tokens": "1 of its 3 weights as embeddings",
           "conv_in": r"1 of its \d+ weights as convolutions"}


def unet() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=4, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 8),
        norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))


def model_of(row: Published) -> nn.Module:
    torch.manual_seed(0)
    if row.architecture == "unet":
        return unet().double().eval()
    config = transformers.CONFIG_MAPPING[row.architecture](
        **FIELDS.get(row.architecture, SIZES))
    auto = AUTO.get(row.task or "", AUTO_OF.get(row.architecture, "AutoModelForCausalLM"))
    return getattr(transformers, auto).from_config(config).double().eval()


def outputs(row: Published, model: nn.Module) -> list[Tensor]:
    inputs = {}
    for name, value in INPUTS.get(row.architecture, dict(input_ids=IDS)).items():
        inputs[name] = value.double() if value.is_floating_point() else value
    with torch.no_grad():
        found = model(**inputs)
    return [tensor for tensor in flat(found) if tensor.is_floating_point()]


def assert_same(row: Published, ours: nn.Module, theirs: nn.Module) -> None:
    for found, wanted in zip(outputs(row, ours), outputs(row, theirs), strict=True):
        torch.testing.assert_close(
            found, wanted, rtol=0, atol=1e-9 * max(1.0, float(wanted.abs().max())))


def refused(row: Published) -> str | None:
    for target, why in REFUSED.items():
        if target in row.targets:
            return why
    return None


@pytest.mark.parametrize("row", COLLECTION, ids=lambda row: f"{row.architecture}-{row.count}")
def test_both_ways(tmp_path: Path, row: Published) -> None:
    """PEFT made, lorafx loaded; lorafx saved, PEFT loaded."""
    base = model_of(row)
    more = dict(row.more)
    if "base" in more:
        base.name_or_path = more.pop("base")
    config = peft.LoraConfig(
        r=row.r, lora_alpha=row.alpha, target_modules=row.targets, lora_dropout=row.dropout,
        task_type=row.task, init_lora_weights=False, **more)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    stir(theirs, ("lora_", "modules_to_save"))
    theirs.save_pretrained(tmp_path / "theirs")
    why = refused(row)
    if why is not None:
        with pytest.raises(lorafx.LorafxError, match=why):
            lorafx.load(base, tmp_path / "theirs")
        return
    ours = lorafx.load(base, tmp_path / "theirs").eval()
    assert_same(row, ours, theirs.base_model.model)
    assert not torch.allclose(outputs(row, ours)[0], outputs(row, base)[0], atol=1e-3)
    lorafx.save(randomise(ours), tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert_same(row, again.base_model.model, ours)


def test_how_many_of_the_collection_are_held() -> None:
    held = sum(row.count for row in COLLECTION if refused(row) is None)
    assert (held, sum(row.count for row in COLLECTION)) == (265, 268)


def test_the_table_has_the_numbers_of_the_collection() -> None:
    def count(wanted: Callable[[Published], bool]) -> int:
        return sum(row.count for row in COLLECTION if wanted(row))

    targets: Counter[str] = Counter()
    tasks: Counter[str | None] = Counter()
    for row in COLLECTION:
        targets[str(sorted(row.targets) if isinstance(row.targets, list) else row.targets)] += (
            row.count)
        tasks[row.task] += row.count
    by_targets = [targets[str(sorted(names))] for names in (ALL, TWO, FOUR, FUSED)]
    assert by_targets == [84, 39, 37, 16]
    assert count(lambda row: row.architecture == "unet" and "conv_in" not in row.targets) == 17
    assert count(lambda row: row.alpha == 2 * row.r) == 159
    assert count(lambda row: row.dropout == 0.05) == 133
    assert (tasks["CAUSAL_LM"], tasks[None], tasks["SEQ_CLS"], tasks["SEQ_2_SEQ_LM"]) == (
        187, 39, 20, 14)
    assert count(lambda row: "modules_to_save" in row.more) == 21
    assert count(lambda row: row.more == HEADS) == 15
    assert count(lambda row: row.more == BNB) == 30
    assert count(lambda row: "use_rslora" in row.more) == 2
