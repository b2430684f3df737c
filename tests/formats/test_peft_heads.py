"""PEFT's folders with modules that are trained whole: heads, norms, biases."""

import copy
import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import lorafx
from tests.support.oracle import randomise

peft = pytest.importorskip("peft")


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(self.q(x))


class Outer(nn.Module):
    """The site can be below `model.`, and what trains beside it not, by a name that exists too."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.norm, self.head = Inner(), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.norm(self.model(x).tanh()))


@pytest.mark.parametrize(
    "form, trainable", [("a.safetensors", "n*"), ("a.safetensors", "head"), ("peft", "head")]
)
def test_what_is_trained_beside_sites_below_a_prefix(
    tmp_path: Path, form: str, trainable: str
) -> None:
    base, x = Outer(), torch.randn(3, 8)
    model = randomise(lorafx.inject(base, 2, targets="q", trainable=trainable))
    assert "model.norm.trained.default.weight" not in dict(lorafx.named_parameters(model))
    lorafx.save(model, tmp_path / form)
    loaded = lorafx.load(base, tmp_path / form)
    assert torch.allclose(loaded(x), model(x), atol=1e-6)
    assert not torch.allclose(model(x), base(x), atol=1e-2)


def test_two_heads_of_which_one_is_below_a_prefix(tmp_path: Path) -> None:
    base, x = Outer(), torch.randn(3, 8)
    theirs = saved_by_peft(base, tmp_path, target_modules=["q"], modules_to_save=["norm"])
    assert torch.allclose(lorafx.load(base, tmp_path)(x), theirs(x), atol=1e-5)


def saved_by_peft(base: nn.Module, folder: Path, **config: object) -> nn.Module:
    """What PEFT makes of a model, with values of its own, saved in a folder."""
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    model.save_pretrained(folder)
    return model.eval()


class Classifier(nn.Module):
    """Has one of the two heads that PEFT means where it is told of a classifier."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.q, self.score = nn.Linear(8, 8), head

    def forward(self, x):
        return self.score(self.q(x))


def test_heads_of_classifiers(tmp_path: Path) -> None:
    base, x = Classifier(nn.Linear(8, 3)), torch.randn(2, 8)
    theirs = saved_by_peft(
        base, tmp_path, target_modules=["q"], modules_to_save=["classifier", "score"]
    )
    assert torch.allclose(lorafx.load(base, tmp_path)(x), theirs(x), atol=1e-5)
    path = tmp_path / "adapter_model.safetensors"
    rest = {
        name: tensor
        for name, tensor in safetensors.torch.load_file(path).items() if "lora_" in name
    }
    safetensors.torch.save_file(rest, path)
    with pytest.raises(
        lorafx.FormatError, match="has no tensor of 'score', which modules_to_save names"
    ):
        lorafx.load(base, tmp_path)


def test_all_biases_of_a_head_of_several_layers(tmp_path: Path) -> None:
    base, x = Classifier(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3))), torch.randn(2, 8)
    theirs = saved_by_peft(
        base, tmp_path, target_modules=["q"], modules_to_save=["score"], bias="all"
    )
    assert torch.allclose(lorafx.load(base, tmp_path)(x), theirs(x), atol=1e-5)


def test_a_folder_of_peft_with_checkpoints_in_it(tmp_path: Path) -> None:
    """The folders in it are named by adapters, so that another name must say which it means."""
    model, base = lorafx.inject(nn.Sequential(nn.Linear(4, 4)), rank=2), nn.Sequential(
        nn.Linear(4, 4)
    )
    lorafx.save(model, tmp_path / "run")
    lorafx.save(model, tmp_path / "run" / "checkpoint-2")
    with pytest.raises(lorafx.FormatError) as caught:
        lorafx.load(base, tmp_path / "run", adapter="french")
    path = re.search(r"or '([^']*)' under any name", str(caught.value))[1]
    assert lorafx.adapters(lorafx.load(base, path, adapter="french")) == ["french"]


class Biased(nn.Module):
    """Layers with biases, a norm, and a parameter of a module that holds others."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)
            self.scale = nn.Parameter(torch.randn(8))

        def forward(self, x):
            return self.norm(torch.tanh(self.q(x)) * self.k(x) * self.scale)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = Biased.Layer(), Biased.Layer(), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.b(x + self.a(x)))


KEY = "base_model.model."


@pytest.mark.parametrize("bias, count", [("all", 7), ("lora_only", 2)])
def test_biases_that_peft_trained(tmp_path: Path, bias: str, count: int) -> None:
    base, x = Biased(), torch.randn(3, 8)
    theirs = saved_by_peft(base, tmp_path / "theirs", target_modules=["a.q", "b.k"], bias=bias)
    ours = lorafx.load(base, tmp_path / "theirs")
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)
    assert sum(name.endswith(".bias") for name, _ in lorafx.named_parameters(ours)) == count
    lorafx.save(ours, tmp_path / "ours")
    files = [
        safetensors.torch.load_file(tmp_path / name / "adapter_model.safetensors")
        for name in ("theirs", "ours")
    ]
    assert files[0].keys() == files[1].keys() >= {f"{KEY}a.q.base_layer.bias"}
    for name, tensor in files[0].items():
        assert torch.equal(tensor, files[1][name])
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["bias"] == bias and "modules_to_save" not in config


@pytest.mark.parametrize(
    "trainable, bias",
    [("*.bias", "all"), ("a.q.bias", "lora_only"), (["b.q.bias", "b.norm"], "all"),
     (["*.norm.weight", "a.*.bias"], "lora_only")],
    ids=str
)
def test_biases_that_lorafx_trained(tmp_path: Path, trainable: object, bias: str) -> None:
    base, x = Biased(), torch.randn(3, 8)
    model = randomise(lorafx.inject(base, 2, targets=["a.q", "a.k"], trainable=trainable))
    lorafx.save(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["bias"] == bias
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.allclose(theirs(x), model(x), atol=1e-5)
    again = lorafx.load(base, tmp_path)
    assert torch.equal(again(x), model(x))


def test_a_parameter_that_peft_cannot_train_alone(tmp_path: Path) -> None:
    model = lorafx.inject(Biased(), 2, targets=["q"], trainable="a.scale")
    with pytest.raises(
        lorafx.FormatError, match="that of 'a.scale' has an adapter at 'a.q' too: save to a path"
    ):
        lorafx.save(model, tmp_path / "a")
