"""Files that lorafx wrote in November 2026 still load, and compute what their tensors say.

Today's writer writes the same. The oracle reads the files with safetensors and torch alone.
"""

import json
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors
import torch
from torch import Tensor, nn
from torch.func import functional_call

import lorafx
from tests.support.saved_files import Plain, Unusual, filled, write

SAVED = Path(__file__).parent / "saved"
X = torch.tensor([[0.5, -1.0, 0.25, 2.0, -0.125], [1.5, 0.75, -2.0, 0.0, 1.0]], dtype=torch.float64)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, and its metadata with what is JSON in it parsed."""
    if path.suffix == ".pth":
        return torch.load(path, weights_only=True), {}
    with safetensors.safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
        if "adapter" in metadata:
            metadata["adapter"] = json.loads(metadata["adapter"])
        return {name: file.get_tensor(name) for name in file.keys()}, metadata


def expected(base: nn.Module, deltas: dict[str, Tensor], trained: dict[str, Tensor]) -> Tensor:
    """The base's output with deltas added to its weights, and trained tensors in place."""
    weights = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    for name, delta in deltas.items():
        weights[name] += delta
    return functional_call(base, weights | {name: t.double() for name, t in trained.items()}, (X,))


def test_native() -> None:
    tensors, metadata = read(SAVED / "native.safetensors")
    scale = metadata["adapter"]["scales"]["up"]
    delta = scale * tensors["up.lora.B"].double() @ tensors["up.lora.A"].double()
    trained = {name: tensors[name] for name in ("down.weight", "down.bias")}
    base = filled(Plain())
    model = lorafx.load(base, SAVED / "native.safetensors")
    assert lorafx.adapters(model) == ["french"]
    assert {p.dtype for p in (model.up.lora.french.A, model.up.lora.french.B)} == {torch.float32}
    wanted = expected(base, {"up.weight": delta}, trained)
    torch.testing.assert_close(model(X), wanted, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(model(X), base(X), atol=0.1)


def test_rows_transposed_weights_and_experts() -> None:
    tensors, metadata = read(SAVED / "unusual.safetensors")
    about = metadata["adapter"]
    delta = {}
    for site, scale in about["scales"].items():
        delta[site] = scale * tensors[f"{site}.lora.B"] @ tensors[f"{site}.lora.A"]
    qkv = torch.zeros(15, 5, dtype=torch.float64)
    qkv[0:5] += delta["qkv[q]"]
    qkv[7:12] += delta["qkv[7:12]"]
    deltas = {"qkv.weight": qkv, "conv.weight": delta["conv"].mT, "experts": delta["experts"]}
    base = filled(Unusual())
    model = lorafx.load(base, SAVED / "unusual.safetensors")
    torch.testing.assert_close(model(X), expected(base, deltas, {}), rtol=1e-12, atol=1e-12)
    for name in deltas:
        others = {other: delta for other, delta in deltas.items() if other != name}
        assert not torch.allclose(model(X), expected(base, others, {}), atol=1e-3)


def test_minimind() -> None:
    tensors, _ = read(SAVED / "minimind.pth")
    deltas = {}
    for site in ("up", "down"):
        A, B = (tensors[f"{site}.lora.{half}.weight"].double() for half in "AB")
        deltas[f"{site}.weight"] = B @ A
    base = filled(Plain())
    model = lorafx.load(base, SAVED / "minimind.pth")
    torch.testing.assert_close(model(X), expected(base, deltas, {}), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("adapter, folder", [("default", "peft"), ("french", "peft/french")])
def test_peft(adapter: str, folder: str) -> None:
    tensors, _ = read(SAVED / folder / "adapter_model.safetensors")
    tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    config = json.loads((SAVED / folder / "adapter_config.json").read_text())
    deltas = {}
    for module in config["target_modules"]:
        rank = config.get("rank_pattern", {}).get(f"^{module}", config["r"])
        A, B = (tensors.pop(f"{module}.lora_{half}.weight").double() for half in "AB")
        assert A.shape[0] == rank
        deltas[f"{module}.weight"] = _alpha(config, module) / rank * B @ A
    assert tensors.keys() == ({"down.weight", "down.bias"} if adapter == "french" else set())
    base = filled(Plain())
    model = lorafx.load(base, SAVED / "peft", adapter)
    assert lorafx.adapters(model) == [adapter]
    torch.testing.assert_close(model(X), expected(base, deltas, tensors), rtol=1e-6, atol=1e-6)
    by_its_own_folder = lorafx.load(base, SAVED / folder, adapter)
    assert torch.equal(by_its_own_folder(X), model(X))


def _alpha(config: dict[str, Any], module: str) -> float:
    return config.get("alpha_pattern", {}).get(f"^{module}", config["lora_alpha"])


def test_resume() -> None:
    path = SAVED / "training.safetensors"
    tensors, metadata = read(path)
    model = lorafx.load(filled(Plain()).float(), path)
    parameters = list(lorafx.parameters(model))
    optimizer = torch.optim.AdamW([{"params": parameters[:2]}, {"params": parameters[2:]}])
    assert lorafx.resume(model, optimizer, path) == metadata["adapter"]["training"]["step"] == 7
    names = ["up.lora.A", "up.lora.B", "down.weight", "down.bias"]
    for name, parameter in zip(names, parameters, strict=True):
        assert torch.equal(parameter, tensors[name])
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(value, tensors[f"lorafx:state:{key}:{name}"])
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 1e-3]
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.999), (0.75, 0.875)]
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.5}
    assert torch.equal(torch.get_rng_state(), tensors["lorafx:random:cpu"])
    version, words, gauss = json.loads(bytes(tensors["lorafx:random:python"].tolist()))
    assert random.getstate() == (version, tuple(words), gauss)
    state = json.loads(bytes(tensors["lorafx:random:numpy"].tolist()))
    assert numpy.random.get_state()[1].tolist() == state["state"]["key"]


def test_the_next_step_is_adamws() -> None:
    """Loshchilov and Hutter 2019, arXiv:1711.05101, with the state in the file."""
    path = SAVED / "training.safetensors"
    tensors, _ = read(path)
    model = lorafx.load(filled(Plain()).float(), path)
    A, B, *others = lorafx.parameters(model)
    optimizer = torch.optim.AdamW([{"params": [A, B]}, {"params": others}])
    lorafx.resume(model, optimizer, path)
    model(X.float()).square().sum().backward()
    gradient = A.grad.double()
    optimizer.step()
    m = 0.9 * tensors["lorafx:state:exp_avg:up.lora.A"] + 0.1 * gradient
    v = 0.999 * tensors["lorafx:state:exp_avg_sq:up.lora.A"] + 0.001 * gradient.square()
    update = (m / (1 - 0.9**8)) / ((v / (1 - 0.999**8)).sqrt() + 1e-8)
    stepped = tensors["up.lora.A"] * (1 - 0.125 * 0.5) - 0.125 * update
    torch.testing.assert_close(A.detach().double(), stepped, rtol=1e-5, atol=1e-5)


def test_the_writer_of_today(tmp_path: Path) -> None:
    """All that the saved files hold is in those that are written now, bit for bit."""
    state = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
    try:
        write(tmp_path)
    finally:
        torch.set_rng_state(state[0])
        random.setstate(state[1])
        numpy.random.set_state(state[2])
    files = [path.relative_to(SAVED) for path in SAVED.rglob("*") if path.is_file()]
    assert len(files) == 8
    for file in files:
        if file.suffix == ".json":
            old, new = (json.loads((folder / file).read_text()) for folder in (SAVED, tmp_path))
            assert old == new
            continue
        (old, old_metadata), (new, new_metadata) = read(SAVED / file), read(tmp_path / file)
        assert old.keys() == new.keys()
        for name, tensor in old.items():
            assert tensor.dtype == new[name].dtype and torch.equal(tensor, new[name]), name
        assert _includes(new_metadata, old_metadata)


def _includes(new: Any, old: Any) -> bool:
    """True if new is old but for what objects in it have besides."""
    if isinstance(old, dict):
        return all(key in new and _includes(new[key], value) for key, value in old.items())
    return bool(new == old)
