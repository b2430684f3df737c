"""Thousands of damaged PEFT folders and kohya files: a clean error, or what PEFT computes too."""

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import lorafx
from tests.support.adapter_files import Model
from tests.support.mutations import SEED, Dice, mutate_safetensors, mutate_zip, tensors_of

peft = pytest.importorskip("peft")
CONFIG, TENSORS, OLD = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
ENTRIES = {
    "r": [1, 2, 3, 8],
    "lora_alpha": [0, 1, 2.5, -1],
    "use_rslora": [True, False, None],
    "rank_pattern": [{}, {"up": 2}, {"u.": 3}, {"^up": 2}, {"p": 4}, {"(": 1}],
    "alpha_pattern": [{}, {"up": 2}, {"u.": 3.5}, {"p": 4}, {"up": None}],
    "target_modules": ["up", ["up"], "u.", [], ["up", "head"], "all-linear", None, "(", ["p"]],
    "modules_to_save": [None, [], ["head"], ["ead"], ["up"], ["none"], "head"],
    "bias": ["none", "all", "lora_only", "x"],
    "use_dora": [True, False],
    "lora_bias": [True],
    "fan_in_fan_out": [True, None, 1],
    "peft_type": ["LOHA", None],
    "init_lora_weights": ["pissa", "gaussian"],
    "target_parameters": [["up.weight"], [], ["weight"]],
    "layers_to_transform": [0, [1]],
    "news": [1, None],
    "exclude_modules": ["up", ["head"]],
    "lora_dropout": [0.5, 2, None],
    "task_type": ["CAUSAL_LM", "x"],
}
NAMES = [
    f"base_model.model.{name}"
    for name in (
        "up.lora_A.weight",
        "up.lora_B.weight",
        "head.weight",
        "head.lora_A.weight",
        "up.base_layer.bias",
        "up.bias",
        "up.base_layer.lora_A.weight",
        "up.lora_magnitude_vector",
        "up.base_layer.weight",
        "head.modules_to_save.bias",
    )
] + [
    "up.lora_A.weight",
    "lora_unet_up.lora_down.weight",
    "lora_unet_up.lora_up.weight",
    "lora_unet_head.alpha",
    "lora_te_up.alpha",
    "unet.up.lora_down.weight",
    "up.lora.up.weight",
    "lora_unet_up.lora_A.weight",
    "lora_unet_up.dora_scale",
]


def mutate_config(data: bytes, dice: Dice) -> bytes:
    """Change an entry to one that means something, or anything in the JSON, or bytes."""
    config, kind = json.loads(data), dice.random()
    if kind < 0.7:
        for name in dice.sample(sorted(ENTRIES), dice.randint(1, 3)):
            config[name] = dice.choice(ENTRIES[name])
    elif kind < 0.9:
        config = dice.json(config)
    else:
        return dice.bytes_of(data)
    return json.dumps(config).encode()


def of_peft(folder: Path, **config: object) -> None:
    """A folder that PEFT writes."""
    model = peft.get_peft_model(
        Model(), peft.LoraConfig(r=2, lora_alpha=3, target_modules=["up"], **config)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.normal_()
    model.save_pretrained(folder)
    (folder / "README.md").unlink()


def output_of_peft(folder: Path, base: torch.nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """What PEFT computes from a folder, or None where it does not load it."""
    model = Model()
    model.load_state_dict(base.state_dict())
    try:
        return peft.PeftModel.from_pretrained(model, folder).eval()(x)
    except Exception:
        return None


def outcome_of_folder(folder: Path, model: torch.nn.Module, x: torch.Tensor) -> str:
    """How loading ends: a one-sentence error, or what PEFT computes, if it loads the folder."""
    try:
        ours = lorafx.load(model, folder).eval()(x)
    except lorafx.LorafxError as error:
        assert str(error).isprintable() and len(str(error)) < 1000, error
        return type(error).__name__
    theirs = output_of_peft(folder, model, x)
    if theirs is None:
        return "PEFT does not load it"
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    return "loaded"


@pytest.mark.filterwarnings("ignore")  # what PEFT says of odd configs
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["head"]}, {"bias": "all"}], ids=str)
def test_damaged_folders_of_peft(options: dict[str, Any], tmp_path: Path) -> None:
    folder, outcomes = tmp_path / "peft", Counter[str]()
    of_peft(folder, **options)
    whole = {name: (folder / name).read_bytes() for name in (CONFIG, TENSORS)}
    model, x = Model(), torch.randn(4, 5)
    before = tensors_of(model)
    for index in range(700):
        files, dice = dict(whole), Dice(f"{SEED} peft {options} {index}")
        if dice.random() < 0.65:
            files[CONFIG] = mutate_config(files[CONFIG], dice)
        if files == whole or dice.random() < 0.1:
            files[TENSORS] = mutate_safetensors(files[TENSORS], dice, NAMES)
        if options.get("bias") and b"all-linear" in files[CONFIG]:
            continue  # PEFT leaves out what it takes for a head: its bias then has another name
        for name, data in files.items():
            (
                folder / name
            ).unlink()  # some file systems wait for the disk when a file is made empty
            (folder / name).write_bytes(data)
        try:
            outcomes[outcome_of_folder(folder, model, x)] += 1
            now = tensors_of(model)
            assert all(torch.equal(now[name], before[name]) for name in before)
            assert {
                name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))
            } == files
        except BaseException as error:
            raise AssertionError(f"{options} {index} (seed {SEED}): {files!r}"[:6000]) from error
    print(options, dict(outcomes))
    assert outcomes["FormatError"] > 300
    assert outcomes["loaded"] > 100 > outcomes["PEFT does not load it"]


def test_damaged_files_of_torch_in_folders_of_peft(tmp_path: Path) -> None:
    folder, outcomes = tmp_path / "peft", Counter[str]()
    of_peft(folder)
    torch.save(safetensors.torch.load_file(folder / TENSORS), folder / OLD)
    (folder / TENSORS).unlink()
    whole, model, x = (folder / OLD).read_bytes(), Model(), torch.randn(4, 5)
    for index in range(500):
        data = mutate_zip(whole, Dice(f"{SEED} bin {index}"))
        (folder / OLD).unlink()
        (folder / OLD).write_bytes(data)
        try:
            outcomes[outcome_of_folder(folder, model, x)] += 1
        except BaseException as error:
            raise AssertionError(f"{index} (seed {SEED}): {data!r}"[:6000]) from error
    print(dict(outcomes))
    assert outcomes["FormatError"] > 250 and outcomes["loaded"] > 10


def expected_of_kohya(path: Path, model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a file that is accepted says, by the names of its tensors alone."""
    parts = {
        "lora_down": "A",
        "lora.down": "A",
        "lora_A": "A",
        "lora_up": "B",
        "lora.up": "B",
        "lora_B": "B",
    }
    half = {}
    for name, tensor in safetensors.torch.load_file(path).items():
        found = re.fullmatch(
            r"(?:unet\.|lora_\w+_)?(up|head)\.(alpha|lora.(?:down|up|A|B))(?:\.weight)?", name
        )
        assert found is not None
        half[found[1], parts.get(found[2], "alpha")] = tensor
    weights = dict(model.state_dict())
    for name in {name for name, _ in half}:
        A, B, alpha = half[name, "A"], half[name, "B"], half.get((name, "alpha"))
        weights[f"{name}.weight"] = (
            weights[f"{name}.weight"] + (1 if alpha is None else alpha / len(A)) * B @ A
        )
    return torch.func.functional_call(model, weights, x)


def test_damaged_files_of_kohya(tmp_path: Path) -> None:
    path, outcomes = tmp_path / "a.safetensors", Counter[str]()
    shapes = {"up": ((2, 5), (5, 2)), "head": ((3, 5), (3, 3))}
    tensors = {}
    for name, (down, up) in shapes.items():
        tensors |= {
            f"lora_unet_{name}.lora_down.weight": torch.randn(down),
            f"lora_unet_{name}.lora_up.weight": torch.randn(up),
            f"lora_unet_{name}.alpha": torch.tensor(4.0),
        }
    safetensors.torch.save_file(tensors, path, {"ss_network_dim": "2"})
    whole, model, x = path.read_bytes(), Model(), torch.randn(4, 5)
    before = tensors_of(model)
    for index in range(1500):
        data = mutate_safetensors(whole, Dice(f"{SEED} kohya {index}"), NAMES)
        path.unlink()
        path.write_bytes(data)
        try:
            try:
                ours = lorafx.load(model, path)(x)
                torch.testing.assert_close(
                    ours, expected_of_kohya(path, model, x), rtol=1e-5, atol=1e-5
                )
                outcomes["loaded"] += 1
            except lorafx.LorafxError as error:
                assert str(error).isprintable() and len(str(error)) < 1000, error
                outcomes[type(error).__name__] += 1
            assert all(torch.equal(now, before[name]) for name, now in tensors_of(model).items())
        except BaseException as error:
            raise AssertionError(f"{index} (seed {SEED}): {data[:4000]!r}") from error
    print(dict(outcomes))
    assert outcomes["FormatError"] > 500 and outcomes["loaded"] > 20
