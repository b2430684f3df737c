"""Exported programs run without their models: the base and two adapters on one, equal to eager."""

import copy
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from common.minimind import MiniMind
from common.minimind_layers import Config
from torch import nn
from torch.utils._pytree import tree_map

import lorafx
from lorafx._model.adapter_inputs import plain
from tests.export.run_program import flat
from tests.support.oracle import randomise
from tests.support.transformers_models import SIZES, VISION, maker

ONE_LAYER = {**SIZES, "num_hidden_layers": 1}
TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)


def drawn(*shape):
    return torch.randint(3, 99, shape)


def text(batch, length):
    ids = drawn(batch, length)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def two_texts(batch, length):
    return {**text(batch, length), "decoder_input_ids": drawn(batch, 4)}


def with_cache(batch, length):
    """One more token for each row, and keys and values of those before."""
    pair = torch.randn(batch, 2, length, 8), torch.randn(batch, 2, length, 8)
    return {"tokens": drawn(batch, 2), "cache": [pair]}


def minimind():
    return MiniMind(Config(hidden=32, layers=1, heads=4, kv_heads=2, vocabulary=100, max_length=64))


# {name: (model, its inputs for a batch and a length, constants of its forward, other batches and
# lengths for the same program)}
MODELS = {
    "two layers": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)),
                   lambda batch, _: {"input": torch.randn(batch, 4)}, {}, [(1, 0), (3, 0)]),
    "minimind with a cache": (minimind, with_cache, {"use_cache": True}, [(1, 5), (3, 11)]),
    "decoder": (maker(transformers.LlamaForCausalLM, **ONE_LAYER, **TOKENS, num_key_value_heads=2),
                text, {"use_cache": False}, [(1, 5), (3, 11)]),
    "decoder of Conv1D": (
        maker(transformers.GPT2LMHeadModel, vocab_size=100, n_embd=32, n_layer=1, n_head=4,
              **TOKENS), text, {"use_cache": False}, [(1, 5), (3, 11)]),
    "encoder": (maker(transformers.BertForMaskedLM, **ONE_LAYER), text, {}, [(1, 5), (3, 11)]),
    "encoder and decoder": (
        maker(transformers.T5ForConditionalGeneration, d_model=32, num_layers=1, d_ff=64,
              num_heads=4, d_kv=8, vocab_size=100, decoder_start_token_id=0),
        two_texts, {"use_cache": False}, [(1, 5), (3, 11)]),
    "vision": (maker(transformers.ViTForImageClassification, **VISION | ONE_LAYER, num_labels=3),
               lambda batch, _: {"pixel_values": torch.randn(batch, 3, 16, 16)}, {}, [(1, 0)]),
}
# torch.onnx takes seconds for each, and most for what is left out
IN_ONNX = ["minimind with a cache", "decoder", "encoder", "vision"]


def adapted(base):
    """A model with two adapters of different ranks; the second is not at all sites."""
    model = lorafx.inject(base, rank=3, targets="linear", adapter="french", alpha=6)
    fewer = [site.name for site in lorafx.sites(base)][1:]
    lorafx.add(model, "german", rank=1, targets=fewer)
    return randomise(model)


def export(folder: Path, ending, model, calls, constants):
    """Write the program and what is run on it."""
    folder.mkdir()
    lorafx.export(model, folder / f"model{ending}", (), {**constants, **calls[0]})
    for adapter in lorafx.adapters(model):
        if ending == ".onnx":
            lorafx.save(model, folder / f"{adapter}.onnx_adapter", adapter)
        else:
            lorafx.save(model, folder / f"{adapter}.safetensors", adapter, format="exported")
    if ending != ".onnx":
        calls = [{**constants, **call} for call in calls]
    torch.save({"calls": calls}, folder / "inputs.pt")


def check(folder, model, calls, constants):
    """What the program gives is as far from float64 as what the model gives, which is rounding."""
    outputs = torch.load(folder / "outputs.pt")
    assert outputs.keys() == {"base", "french", "german"}
    exact = copy.deepcopy(model).double()
    programs, rounding = [], [torch.finfo(torch.float32).eps]
    for name, found in outputs.items():
        for each in (model, exact):
            lorafx.activate(each, [] if name == "base" else name)
        for given, output in zip(calls, found, strict=True):
            with torch.no_grad():
                eager = flat(plain(model(**given, **constants)))
                true = flat(plain(exact(**tree_map(double, given), **constants)))
            assert output.keys() == eager.keys() == true.keys()
            for key, value in true.items():
                assert output[key].dtype == eager[key].dtype
                programs.append(distance(output[key], value))
                rounding.append(distance(eager[key], value))
    assert max(programs) <= 8 * max(rounding)


def double(value):
    """A tensor in float64, if it is one of numbers."""
    is_number = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if is_number else value


def distance(tensor, true):
    """|tensor - true| / |true|, in Frobenius norms."""
    return float((tensor.double() - true).norm() / true.norm())


# {ending: the models of which there is such a program}
PROGRAMS = {".pt2": [*MODELS], ".onnx": IN_ONNX, ".aoti.pt2": ["two layers"]}
PACKAGES = {".onnx": ("onnx", "onnxruntime", "onnxscript")}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """{ending: what `check` takes} of all programs, which one process has run."""
    path = tmp_path_factory.mktemp("programs")
    made = {}
    for ending, names in PROGRAMS.items():
        if all(map(importlib.util.find_spec, PACKAGES.get(ending, ()))):
            made[ending] = [exported(path / f"{name}{ending}", ending, name) for name in names]
    folders = [folder for each in made.values() for folder, *_ in each]
    subprocess.run(
        [sys.executable, Path(__file__).with_name("run_program.py"), *folders], check=True)
    return made


def exported(folder, ending, name):
    build, inputs, constants, sizes = MODELS[name]
    base = build().eval()
    model = adapted(base)
    calls = [inputs(batch, length) for batch, length in [(2, 7), *sizes]]
    export(folder, ending, model, calls, constants)
    return folder, model, calls, constants


@pytest.mark.parametrize("ending", PROGRAMS)
def test_one_program_for_the_base_and_all_adapters(ran, ending):
    for package in PACKAGES.get(ending, ()):
        pytest.importorskip(package)
    for each in ran[ending]:
        check(*each)
