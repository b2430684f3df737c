"""PEFT's folders with modules that are trained whole: heads, norms, biases."""

import copy
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
