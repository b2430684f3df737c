"""Damaged files of other libraries, and state_dicts: a clean error, or what the file says.

"What it says" is read independently, by safetensors, torch.load and json.
"""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from torch import Tensor

import lorafx
from tests.support.adapter_files import Model
from tests.support.mutations import SEED, Dice, mutate_safetensors, mutate_zip, tensors_of

CHANCE = torch.Generator().manual_seed(SEED)  # what is damaged is the same in each run
A, B = (torch.randn(shape, generator=CHANCE) for shape in ((2, 5), (5, 2)))
Deltas = dict[str, Tensor]


def named(a: str, b: str, **more: Tensor) -> dict[str, Tensor]:
    return {a: A, b: B, "head.weight": torch.ones(3, 3), **more}


NAMES = ["up.lora.default.A", "up.lora.default.s", "up.lora.x.A", "head.trained.default.weight",
         "lora.default.B", "up.lora_a", "head.lora_b", "up.weight"]


def of_safetensors(data: bytes, dice: Dice) -> bytes:
    return mutate_safetensors(data, dice, NAMES)


def of_json(data: bytes, dice: Dice) -> bytes:
    return json.dumps(dice.json(json.loads(data))).encode()


def of_text(data: bytes, dice: Dice) -> bytes:
    return dice.bytes_of(data)


def states(tensors: dict[str, Tensor]) -> Deltas:
    scale = float(tensors.get("up.lora.default.s", torch.ones(())))
    return {"up": scale * tensors["up.lora.default.B"] @ tensors["up.lora.default.A"]}


def state_dict(folder: Path) -> Path:
    safetensors.torch.save_file(
        named("up.lora.default.A", "up.lora.default.B",
              **{"up.lora.default.s": torch.tensor(1.5, dtype=torch.float64)}),
        folder / "m.safetensors")
    return folder / "m.safetensors"


def shards(folder: Path) -> Path:
    state_dict(folder).rename(folder / "part.safetensors")
    names = [*safetensors.torch.load_file(folder / "part.safetensors")]
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        {"metadata": {"total_size": 9}, "weight_map": dict.fromkeys(names, "part.safetensors")}))
    return folder


def nested(folder: Path) -> Path:
    torch.save({"epoch": 1, "model": named("up.lora.default.A", "up.lora.default.B")},
               folder / "run.pt")
    return folder / "run.pt"


def torchtune(folder: Path) -> Path:
    torch.save({"up.lora_a.weight": A, "up.lora_b.weight": B}, folder / "adapter_0.pt")
    (folder / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 3, "x": [1, {}]}')
    return folder / "adapter_0.pt"


def litgpt(folder: Path) -> Path:
    torch.save({"model": {"attn.qkv.lora_A": A, "attn.qkv.lora_B": torch.ones(3, 2)}},
               folder / "lit_model.pth.lora")
    (folder / "hyperparameters.yaml").write_text(
        "lora_r: 2\nlora_alpha: 3\nlora_query: true\nlora_key: false\nlora_value: false\n")
    (folder / "model_config.yaml").write_text("n_head: 1\nn_query_groups: 1\nhead_size: 3\n")
    return folder / "lit_model.pth.lora"


def mlx(folder: Path) -> Path:
    safetensors.torch.save_file({"up.lora_a": A.T.contiguous(), "up.lora_b": B.T.contiguous()},
                                folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(
        {"fine_tune_type": "lora", "num_layers": 1,
         "lora_parameters": {"rank": 2, "scale": 20.0, "dropout": 0.0}}))
    return folder


def says_torchtune(folder: Path) -> Deltas:
    found = torch.load(folder / "adapter_0.pt", weights_only=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    return {"up": config["lora_alpha"] / 2 * found["up.lora_b.weight"] @ found["up.lora_a.weight"]}


def says_mlx(folder: Path) -> Deltas:
    found = safetensors.torch.load_file(folder / "adapters.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_parameters"]["scale"]
    return {"up": scale * (found["up.lora_a"] @ found["up.lora_b"]).T}


class Kind(NamedTuple):
    write: Callable[[Path], Path]
    mutate: dict[str, Callable[[bytes, Dice], bytes]]
    says: Callable[[Path], Deltas] | None  # None where only errors are looked at


KINDS = {
    "state_dict": Kind(state_dict, {"m.safetensors": of_safetensors},
                       lambda folder: states(
                           safetensors.torch.load_file(folder / "m.safetensors"))),
    "shards": Kind(shards, {"model.safetensors.index.json": of_json,
                            "part.safetensors": of_safetensors},
                   lambda folder: states(
                       safetensors.torch.load_file(folder / "part.safetensors"))),
    "nested": Kind(nested, {"run.pt": mutate_zip}, None),
    "torchtune": Kind(torchtune, {"adapter_config.json": of_json}, says_torchtune),
    "torchtune's tensors": Kind(torchtune, {"adapter_0.pt": mutate_zip}, None),
    "litgpt": Kind(litgpt, {"hyperparameters.yaml": of_text, "model_config.yaml": of_text}, None),
    "MLX": Kind(mlx, {"adapter_config.json": of_json, "adapters.safetensors": of_safetensors},
                says_mlx),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", KINDS)
def test_damaged_files(tmp_path: Path, name: str) -> None:
    kind, outcomes, model = KINDS[name], Counter[str](), Model()
    path = kind.write(tmp_path)
    whole = {file: (tmp_path / file).read_bytes() for file in kind.mutate}
    before = tensors_of(model)
    for index in range(100):
        dice = Dice(f"{SEED} {name} {index}")
        file = dice.choice([*whole])
        for other, data in whole.items():
            (tmp_path / other).unlink(missing_ok=True)
            data = kind.mutate[other](data, dice) if other == file else data
            (tmp_path / other).write_bytes(data)
        try:
            outcomes[_outcome(path, model, kind, before)] += 1
        except BaseException as error:
            raise AssertionError(f"{name} {index} (seed {SEED}), in {tmp_path}") from error
        assert all(torch.equal(now, before[key]) for key, now in tensors_of(model).items())
    print(name, dict(outcomes))
    assert outcomes["FormatError"] + outcomes["MismatchError"] > 10
    assert outcomes["loaded"] > 2 or name == "litgpt"


def _outcome(path: Path, model: Model, kind: Kind, before: dict[str, Any]) -> str:
    try:
        merged = tensors_of(lorafx.merge(lorafx.load(model, path)))
    except lorafx.LorafxError as error:
        assert str(error).isprintable() and len(str(error)) < 1000, error
        return type(error).__name__
    if kind.says is not None:
        for site, delta in kind.says(path if path.is_dir() else path.parent).items():
            expected = before[f"{site}.weight"] + delta
            torch.testing.assert_close(merged[f"{site}.weight"], expected, rtol=1e-5, atol=1e-5)
    return "loaded"
