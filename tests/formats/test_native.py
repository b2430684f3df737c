"""lorafx's own format: what it keeps, and that safetensors reads it."""

import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import lorafx
from tests.support.adapter_files import Model, edit, edit_about, injected
from tests.support.oracle import randomise


class TestNative:
    def test_all_of_the_adapter_is_kept(self, tmp_path: Path) -> None:
        model = randomise(
            lorafx.inject(
                Model(), 4, targets="up", alpha=8, rank_pattern={"up": 3}, trainable="head",
                adapter="french"
            )
        )
        lorafx.save(model, tmp_path / "a.safetensors")
        base = Model()
        loaded, x = lorafx.load(base, tmp_path / "a.safetensors"), torch.randn(4, 5)
        assert lorafx.adapters(loaded) == ["french"]
        assert loaded.up.lora.french.scale == 8 / 3
        assert torch.equal(loaded.head.weight, model.head.weight)
        assert not torch.equal(base.head.weight, model.head.weight)
        base.load_state_dict({k: v for k, v in lorafx.eject(model).state_dict().items()})
        assert torch.equal(loaded(x), model(x))
        lorafx.save(loaded, tmp_path / "b.safetensors")
        first, second = (
            safetensors.safe_open(tmp_path / f"{name}.safetensors", "pt") for name in "ab"
        )
        assert first.metadata() == second.metadata()
        assert all(
            torch.equal(first.get_tensor(key), second.get_tensor(key)) for key in first.keys()
        )

    def test_keys_and_header(self, tmp_path: Path) -> None:
        lorafx.save(injected(), tmp_path / "a.safetensors")
        with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
            assert sorted(file.keys()) == ["head.lora.A", "head.lora.B", "up.lora.A", "up.lora.B"]
            assert file.metadata()["format"] == "lorafx"
            assert json.loads(file.metadata()["adapter"])["config"]["targets"] == ["up", "head"]

    def test_only_the_adapter_is_written(self, tmp_path: Path) -> None:
        lorafx.save(injected(), tmp_path / "new" / "folder" / "a.safetensors")
        stored = safetensors.torch.load_file(tmp_path / "new" / "folder" / "a.safetensors")
        assert sum(t.numel() for t in stored.values()) == 2 * (5 + 5) + 2 * (5 + 3)
        assert os.listdir(tmp_path / "new" / "folder") == ["a.safetensors"]

    def test_a_model_that_is_one_linear(self, tmp_path: Path) -> None:
        base = nn.Linear(4, 4)
        model, x = randomise(lorafx.inject(base)), torch.randn(2, 4)
        for name in ("a.safetensors", "a.pth"):
            lorafx.save(model, tmp_path / name)
        assert torch.equal(lorafx.load(base, tmp_path / "a.safetensors")(x), model(x))
        assert set(torch.load(tmp_path / "a.pth")) == {"lora.A.weight", "lora.B.weight"}


def test_one_weight_under_two_names(tmp_path: Path) -> None:
    class Tied(Model):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(5, 5)
            self.other.weight = self.up.weight

    path = tmp_path / "a.safetensors"
    tensors = {"up.weight": torch.ones(5, 5), "other.weight": torch.zeros(5, 5)}
    lorafx.save(lorafx.inject(Tied(), targets="head"), path)
    edit(path, lambda t, h: (t.update(tensors), edit_about(trained=list(tensors))(t, h)))
    with pytest.raises(
        lorafx.MismatchError,
        match="trained 'other.weight', which in this model is the weight of 'up",
    ):
        lorafx.load(Tied(), path)
    lorafx.save(lorafx.inject(Model(), targets="up"), path)
    edit(
        path,
        lambda t, h: (
            t.update({"up.weight": torch.ones(5, 5)}), edit_about(trained=["up.weight"])(t, h)
        )
    )
    with pytest.raises(
        lorafx.MismatchError,
        match="a trained 'up.weight', which in this model is the weight of 'up'",
    ):
        lorafx.load(Model(), path)


def test_a_reserved_name(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("lorafx:x", nn.Linear(3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self._modules["lorafx:x"](x)

    with pytest.raises(
        lorafx.FormatError, match="the name 'lorafx:x.lora.A' begins with 'lorafx:', as only"
    ):
        lorafx.save(lorafx.inject(Named()), tmp_path / "a.safetensors")


def test_safetensors_reads_what_lorafx_writes(tmp_path: Path) -> None:
    model = injected()
    lorafx.save(model, tmp_path / "a.safetensors")
    stored = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert torch.equal(stored["up.lora.A"], model.up.lora.default.A)


def test_tensors_that_share_memory_are_saved(tmp_path: Path) -> None:
    """As where all parameters are views of one flat buffer."""
    model = lorafx.inject(nn.Linear(4, 4), rank=2)
    flat = torch.randn(16)
    model.lora.default.A.data, model.lora.default.B.data = flat[:8].view(2, 4), flat[8:].view(4, 2)
    lorafx.save(model, tmp_path / "a.safetensors")
    loaded = lorafx.load(nn.Linear(4, 4), tmp_path / "a.safetensors")
    assert torch.equal(torch.cat([p.detach().flatten() for p in lorafx.parameters(loaded)]), flat)
