"""What fresh eyes found in files: names of trained tensors, orders of sums, PEFT's heads, diffusers' scales."""

import copy
import json
import math
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from oracle import randomise
from torch import nn
from torch.optim import lr_scheduler

import lorafx

peft = pytest.importorskip("peft")


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(self.q(x))


class Outer(nn.Module):
    """The site can be below `model.`, and what is trained beside it not, under a name that is there too."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.norm, self.head = Inner(), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.norm(self.model(x).tanh()))


@pytest.mark.parametrize("form, trainable", [("a.safetensors", "n*"), ("a.safetensors", "head"), ("peft", "head")])
def test_what_is_trained_beside_sites_below_a_prefix(tmp_path: Path, form: str, trainable: str) -> None:
    base, x = Outer(), torch.randn(3, 8)
    model = randomise(lorafx.inject(base, 2, targets="q", trainable=trainable))
    assert "model.norm.trained.default.weight" not in dict(lorafx.named_parameters(model))
    lorafx.save(model, tmp_path / form)
    loaded = lorafx.load(base, tmp_path / form)
    assert torch.allclose(loaded(x), model(x), atol=1e-6) and not torch.allclose(model(x), base(x), atol=1e-2)


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
    theirs = saved_by_peft(base, tmp_path, target_modules=["q"], modules_to_save=["classifier", "score"])
    assert torch.allclose(lorafx.load(base, tmp_path)(x), theirs(x), atol=1e-5)
    path = tmp_path / "adapter_model.safetensors"
    rest = {name: tensor for name, tensor in safetensors.torch.load_file(path).items() if "lora_" in name}
    safetensors.torch.save_file(rest, path)
    with pytest.raises(lorafx.FormatError, match="has no tensor of 'classifier', which modules_to_save names"):
        lorafx.load(base, tmp_path)


def test_all_biases_of_a_head_of_several_layers(tmp_path: Path) -> None:
    base, x = Classifier(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3))), torch.randn(2, 8)
    theirs = saved_by_peft(base, tmp_path, target_modules=["q"], modules_to_save=["score"], bias="all")
    assert torch.allclose(lorafx.load(base, tmp_path)(x), theirs(x), atol=1e-5)


@pytest.mark.parametrize("targets", ["linear", ["linear1[0:8]", "linear1[8:20]", "in_proj_weight[v]", "out_proj"]])
def test_attention_goes_on_bitwise(tmp_path: Path, targets: object) -> None:
    """Gradients are summed in the same order, as the sites of a file are in that of the model."""
    base = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 20, batch_first=True), 2, enable_nested_tensor=False)
    model = lorafx.inject(base, 2, targets=targets).train()
    optimizer = torch.optim.AdamW(lorafx.parameters(model), lr=0.05)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(3, 5, 8)).pow(4).mean().backward()
            optimizer.step()

    train(model, optimizer, 3)
    lorafx.save(model, tmp_path / "a.safetensors", optimizer=optimizer, step=3)
    train(model, optimizer, 8)
    resumed = lorafx.load(base, tmp_path / "a.safetensors").train()
    other = torch.optim.AdamW(lorafx.parameters(resumed))
    lorafx.resume(resumed, other, tmp_path / "a.safetensors")
    train(resumed, other, 8)
    assert [n for n, _ in lorafx.named_parameters(resumed)] == [n for n, _ in lorafx.named_parameters(model)]
    assert all(map(torch.equal, lorafx.parameters(resumed), lorafx.parameters(model)))


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [4, 6], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, 4),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1, 20),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.3, 1, 2), lr_scheduler.ExponentialLR(o, 0.9)], [3])}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_by_their_own_state(tmp_path: Path, name: str) -> None:
    """As the README says: made anew, with its own state, before lorafx.resume."""
    base, make = nn.Linear(3, 3), SCHEDULERS[name]
    model = lorafx.inject(base)
    optimizer = torch.optim.AdamW(lorafx.parameters(model), lr=0.1)
    schedule = make(optimizer)

    def rates(optimizer: torch.optim.Optimizer, schedule: lr_scheduler.LRScheduler, steps: int) -> list[float]:
        found = []
        for _ in range(steps):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return found

    model(torch.ones(1, 3)).sum().backward()
    rates(optimizer, schedule, 4)
    lorafx.save(model, tmp_path / "a.safetensors", optimizer=optimizer, step=4)
    state = schedule.state_dict()
    resumed = lorafx.load(base, tmp_path / "a.safetensors")
    other = torch.optim.AdamW(lorafx.parameters(resumed), lr=0.1)
    again = make(other)
    again.load_state_dict(copy.deepcopy(state))
    lorafx.resume(resumed, other, tmp_path / "a.safetensors")
    assert rates(other, again, 5) == rates(optimizer, schedule, 5)


@pytest.mark.parametrize("about, scale", [
    ({"r": 2, "lora_alpha": 8}, 4.0), ({"r": 2, "lora_alpha": 8, "use_rslora": True}, None)])
def test_the_config_of_one_model_of_diffusers(tmp_path: Path, about: dict[str, object], scale: float | None) -> None:
    base, x = nn.Sequential(nn.Linear(4, 5)), torch.randn(2, 4)
    A, B = torch.randn(2, 4), torch.randn(5, 2)
    safetensors.torch.save_file({"0.lora_A.weight": A, "0.lora_B.weight": B}, tmp_path / "a.safetensors",
                                {"lora_adapter_metadata": json.dumps(about)})
    if scale is None:
        with pytest.raises(lorafx.FormatError, match="asks for use_rslora"):
            lorafx.load(base, tmp_path / "a.safetensors")
    else:
        loaded = lorafx.load(base, tmp_path / "a.safetensors")
        assert torch.allclose(loaded(x), base(x) + scale * x @ A.T @ B.T, atol=1e-5)


def test_tensors_that_share_memory_are_saved(tmp_path: Path) -> None:
    """As where all parameters are views of one flat buffer."""
    model = lorafx.inject(nn.Linear(4, 4), rank=2)
    flat = torch.randn(16)
    model.lora.default.A.data, model.lora.default.B.data = flat[:8].view(2, 4), flat[8:].view(4, 2)
    lorafx.save(model, tmp_path / "a.safetensors")
    loaded = lorafx.load(nn.Linear(4, 4), tmp_path / "a.safetensors")
    assert torch.equal(torch.cat([p.detach().flatten() for p in lorafx.parameters(loaded)]), flat)


@pytest.mark.parametrize("act", [lorafx.save, lorafx.load])
@pytest.mark.parametrize("ending", [".safetensors", ".pth", ""])
def test_a_path_with_a_nul(act: object, ending: str) -> None:
    model = lorafx.inject(nn.Linear(4, 4), rank=2)
    with pytest.raises(lorafx.FormatError, match=r"No path has a NUL character, as 'a\\x00b.* has"):
        act(model, "a\0b" + ending)


def test_what_is_not_finite_is_let_in_only_by_load(tmp_path: Path) -> None:
    model = lorafx.inject(nn.Linear(4, 4), rank=2)
    with torch.no_grad():
        model.lora.default.B.fill_(math.nan)
    with pytest.raises(lorafx.FormatError, match=r"'lora.B' has NaN or infinite values\.$"):
        lorafx.save(model, tmp_path / "a.safetensors")
    tensors = {"lora.A.weight": torch.ones(2, 4), "lora.B.weight": torch.full((4, 2), math.inf)}
    torch.save(tensors, tmp_path / "a.pth")
    with pytest.raises(lorafx.FormatError, match="'lora.B' has .* which lorafx.load lets in with allow_nonfinite=True"):
        lorafx.load(nn.Linear(4, 4), tmp_path / "a.pth")
    assert lorafx.load(nn.Linear(4, 4), tmp_path / "a.pth", allow_nonfinite=True).lora.default.B.isinf().all()


def test_errors_show_the_beginning_of_a_value() -> None:
    for options in ({"alpha": "1" * 3000}, {"dropout": "1" * 3000}, {"init": "1" * 3000}):
        with pytest.raises(lorafx.ConfigError) as caught:
            lorafx.inject(nn.Linear(4, 4), **options)
        assert len(str(caught.value)) < 300


def test_a_folder_of_peft_with_checkpoints_in_it(tmp_path: Path) -> None:
    """The names of folders in it are those of adapters, so that another name must say which it means."""
    model, base = lorafx.inject(nn.Sequential(nn.Linear(4, 4)), rank=2), nn.Sequential(nn.Linear(4, 4))
    lorafx.save(model, tmp_path / "run")
    lorafx.save(model, tmp_path / "run" / "checkpoint-2")
    with pytest.raises(lorafx.FormatError) as caught:
        lorafx.load(base, tmp_path / "run", adapter="french")
    path = re.search(r"or '([^']*)' under any name", str(caught.value))[1]
    assert lorafx.adapters(lorafx.load(base, path, adapter="french")) == ["french"]
