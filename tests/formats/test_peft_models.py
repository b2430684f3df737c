"""PEFT's folders of transformers' models, drawn configs: what one saved, the other computes."""

import copy
import warnings
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import lorafx
from tests.support.oracle import randomise
from tests.support.peft_adapters import saved_by_peft
from tests.zoo.outputs import outputs
from tests.zoo.all_architectures import ROWS
from tests.zoo.rows import Row

MODELS = (
    "llama", "qwen3", "gemma2", "phi3", "gpt2", "gpt_neox", "falcon", "bert", "roberta",
    "deberta-v2", "t5", "bart", "vit", "clip", "distilbert", "opt"
)
FOUND = {row.name: row for row in ROWS}
ROUNDS = settings(
    max_examples=2, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)


def assert_same(row: Row, ours: nn.Module, theirs: nn.Module) -> None:
    """To rounding, of float64 where the model keeps that."""
    for a, b in zip(outputs(row, ours, grad=False), outputs(row, theirs, grad=False), strict=True):
        allowed = 1e-9 if a.dtype == torch.float64 else 1e-5
        torch.testing.assert_close(a, b, rtol=0, atol=allowed * max(float(b.abs().max()), 1))


def drawn_adapter(data: st.DataObject, row: Row) -> tuple[nn.Module, dict[str, object]]:
    """A model, and options that both libraries take: modules are sites of both, of own weights."""
    base = row.build().double().eval()
    layers = {
        name for name, module in base.named_modules() if isinstance(module, (nn.Linear, Conv1D))
    }
    names = [site.name for site in lorafx.sites(base, "linear")
             if site.name in layers and not site.aliases and not site.tied_to]
    chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=6, unique=True))
    ranks = data.draw(st.dictionaries(st.sampled_from(chosen), st.integers(1, 5), max_size=2))
    return base, {
        "r": data.draw(st.integers(1, 4)),
        "lora_alpha": data.draw(st.integers(1, 9)),
        "use_rslora": data.draw(st.booleans()),
        "target_modules": chosen,
        "rank_pattern": {f"^{name}": rank for name, rank in ranks.items()},
        "alpha_pattern": {f"^{name}": 2 * rank for name, rank in ranks.items() if rank % 2},
    }


@pytest.mark.parametrize("name", MODELS)
@ROUNDS
@given(data=st.data())
def test_both_directions(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    row, folder = FOUND[name], tmp_path_factory.mktemp("peft")
    base, options = drawn_adapter(data, row)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = saved_by_peft(base, folder / "theirs", **options).eval()
    ours = lorafx.load(base, folder / "theirs")
    assert_same(row, ours, theirs.base_model.model)
    assert_same(row, lorafx.merge(ours), theirs.base_model.model)
    assert_saved(row, base, randomise(ours), folder / "ours")


def assert_saved(row: Row, base: nn.Module, ours: nn.Module, folder: Path) -> None:
    """What lorafx saves, PEFT loads."""
    lorafx.save(ours, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    assert_same(row, ours, theirs.base_model.model)
    assert_same(row, lorafx.load(base, folder), theirs.base_model.model)
