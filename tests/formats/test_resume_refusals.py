"""A training state that cannot be saved, or does not fit, is refused and changes nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorafx
from tests.support.adapter_files import Model, edit, edit_about, injected
from tests.support.training_runs import CONFIG, everything, same, scheduled, steps

REFUSED = {
    "pth": (
        "a.pth", {}, lorafx.FormatError,
        "MiniMind file, which keeps no optimizer and step: leave out optimizer="
    ),
    "no step": (
        "a.safetensors", {"step": None}, lorafx.ConfigError,
        "saved with both, optimizer=... and step=..."
    ),
    "no optimizer": (
        "a.safetensors", {"optimizer": None}, lorafx.ConfigError, "not with NoneType and 1"
    ),
    "step": ("a.safetensors", {"step": -1}, lorafx.ConfigError, "not with AdamW and -1"),
    "base": (
        "a.safetensors", {"optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters())},
        lorafx.ConfigError, "holds a parameter that is not of adapter 'default'"
    ),
}


@pytest.mark.parametrize("name, arguments, error, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_saved(
    tmp_path: Path, name: str, arguments: dict, error: type, message: str
) -> None:
    model = injected()
    given = {"optimizer": torch.optim.AdamW(lorafx.parameters(model)), "step": 1} | arguments
    with pytest.raises(error, match=message):
        lorafx.save(model, tmp_path / name, **given)
    assert not list(tmp_path.iterdir())


def test_state_that_cannot_be_saved(tmp_path: Path) -> None:
    model = injected()
    optimizer = torch.optim.SGD(lorafx.parameters(model))
    first = next(lorafx.parameters(model))
    for value, message in [
        ([torch.zeros(1)], r"the optimizer's 'x' of 'up.lora.A' is .*file keeps tensors, finite"),
        (torch.full((2, 5), torch.nan), "'lorafx:state:x:up.lora.A' has NaN or infinite values"),
        (torch.zeros(2, 5, dtype=torch.complex64), "has dtype torch.complex64"),
        (torch.zeros(1).expand(2, 5), "is expanded: its elements share memory"),
        (torch.zeros(7), r"keeps 'x' \(7,\) of 'up.lora.A' \(2, 5\)"),
        (float("inf"), "is inf, and a file keeps"),
    ]:
        optimizer.state[first] = {"x": value}
        with pytest.raises(lorafx.LorafxError, match=message):
            lorafx.save(model, tmp_path / "a.safetensors", optimizer=optimizer, step=1)
    assert not list(tmp_path.iterdir())


def training(**values: Any) -> Any:
    """A change of the training state in a file's header."""
    def change(tensors: dict, header: dict) -> None:
        import json
        about = json.loads(header["adapter"])
        edit_about(training=about["training"] | values)(tensors, header)
    return change


def damage(name: str, tensor: torch.Tensor | None) -> Any:
    """A change of one tensor in a file."""
    return lambda tensors, header: (
        tensors.pop(name) if tensor is None else tensors.update({name: tensor})
    )


STATE = "lorafx:state:exp_avg:up.lora.A"
DAMAGE = {
    "kind": (
        training(kind="torch.optim.sgd.SGD"), lorafx.MismatchError,
        "the state of a 'torch.optim.sgd.SGD', not"
    ),
    "groups": (
        training(groups=[]), lorafx.FormatError, "names are not those of the adapter's tensors"
    ),
    "step": (training(step=1.5), lorafx.FormatError, "1.5 is not a number of steps"),
    "part": (training(more=1), lorafx.FormatError, "does not have the parts of one"),
    "no tensor": (damage(STATE, None), lorafx.FormatError, f"damaged: KeyError: '{STATE}'"),
    "more tensors": (
        damage("lorafx:x", torch.zeros(1)), lorafx.FormatError,
        "'lorafx:x' is not in the training state"
    ),
    "shape": (
        damage(STATE, torch.zeros(3, 5)), lorafx.MismatchError,
        r"'exp_avg' \(3, 5\) for 'up.lora.A' \(2, 5\)"
    ),
    "nan": (
        damage(STATE, torch.full((2, 5), torch.nan)), lorafx.FormatError,
        f"'{STATE}' has NaN or infinite"
    ),
    "short": (
        damage("lorafx:random:cpu", torch.zeros(9).byte()), lorafx.FormatError,
        "does not take the state"
    ),
    "zeros": (
        damage("lorafx:random:cpu", torch.zeros(5056).byte()), lorafx.FormatError,
        "does not take the state"
    ),
    "python": (
        damage("lorafx:random:python", torch.zeros(9).byte()), lorafx.FormatError,
        "does not take the state"
    ),
    "floats": (
        damage("lorafx:random:python", torch.zeros(9)), lorafx.FormatError, "is not made of bytes"
    ),
    "dropout": (
        lambda t, h: h.update(adapter=h["adapter"].replace('"dropout": 0.3', '"dropout": 0.5')),
        lorafx.MismatchError, "was trained with dropout=0.5, and adapter 'french' has 0.3"
    ),
    "none": (
        lambda t, h: (
            [t.pop(name) for name in list(t) if name.startswith("lorafx:")],
            h.update(adapter=h["adapter"].partition(', "training"')[0] + "}")
        ),
        lorafx.FormatError, "has no training state: it was saved without optimizer="
    ),
}


def run_of(base: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A run that has begun."""
    model = lorafx.inject(base, **CONFIG).train()
    optimizer = torch.optim.AdamW(lorafx.parameters(model))
    steps(model, optimizer, scheduled(optimizer), 2)
    return model, optimizer


@pytest.mark.parametrize("change, error, message", DAMAGE.values(), ids=DAMAGE)
def test_nothing_is_half_resumed(tmp_path: Path, change: Any, error: type, message: str) -> None:
    base, path = Model(), tmp_path / "a.safetensors"
    model, optimizer = run_of(base)
    lorafx.save(model, path, optimizer=optimizer, step=2)
    model, optimizer = run_of(base)
    edit(path, change)
    before = everything(model, optimizer)
    with pytest.raises(error, match=message):
        lorafx.resume(model, optimizer, path)
    assert same(everything(model, optimizer), before)


def test_another_optimizer(tmp_path: Path) -> None:
    base, path = Model(), tmp_path / "a.safetensors"
    model, optimizer = run_of(base)
    lorafx.save(model, path, optimizer=optimizer, step=2)
    first, *rest = lorafx.parameters(model)
    before = everything(model, optimizer)
    for other, message in [
        (
            torch.optim.Adam([first, *rest]),
            "the state of a 'torch.optim.adamw.AdamW', not of a torch",
        ),
        (
            torch.optim.AdamW(rest),
            "with 4 tensors, such as 'up.lora.A', and the optimizer holds others",
        ),
        (
            torch.optim.AdamW([{"params": [first]}, {"params": rest}]),
            "has 1 parameter groups, and the optimizer 2",
        ),
        (None, "not of a builtins.NoneType"),
    ]:
        with pytest.raises(lorafx.MismatchError, match=message):
            lorafx.resume(model, other, path)
    assert same(everything(model, optimizer), before)


@pytest.mark.parametrize("settings, message", [
    ({"rank": 3}, r"'up.lora.A' as \(\(2, 5\), .*as \(\(3, 5\)"), ({"alpha": 9}, "has scale 1.0"),
    ({"trainable": ()}, "'head.bias' as .* as nothing")])
def test_another_adapter(tmp_path: Path, settings: dict, message: str) -> None:
    base, path = Model(), tmp_path / "a.safetensors"
    model, optimizer = run_of(base)
    lorafx.save(model, path, optimizer=optimizer, step=2)
    other = lorafx.inject(base, **CONFIG | settings)
    optimizer = torch.optim.AdamW(lorafx.parameters(other))
    before = everything(other, optimizer)
    with pytest.raises(lorafx.MismatchError, match=message):
        lorafx.resume(other, optimizer, path)
    assert same(everything(other, optimizer), before)


class Product(nn.Module):
    """A linear layer that keeps its weight as (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def test_a_weight_that_is_stored_in_another_way(tmp_path: Path) -> None:
    other, path = Model(), tmp_path / "a.safetensors"
    other.up = Product()
    model = injected()
    optimizer = torch.optim.AdamW(lorafx.parameters(model))
    model(torch.randn(2, 5)).sum().backward()
    optimizer.step()
    lorafx.save(model, path, optimizer=optimizer, step=1)
    loaded = lorafx.load(other, path)
    optimizer = torch.optim.AdamW(lorafx.parameters(loaded))
    before = everything(loaded, optimizer)
    with pytest.raises(
        lorafx.MismatchError,
        match="stores its weights in another way: lorafx.load takes the adapter",
    ):
        lorafx.resume(loaded, optimizer, path)
    assert same(everything(loaded, optimizer), before)


def test_a_format_without_a_place_for_training(tmp_path: Path) -> None:
    model = injected()
    optimizer = torch.optim.AdamW(lorafx.parameters(model))
    with pytest.raises(
        lorafx.FormatError, match="is a PEFT file, which keeps no optimizer and step"
    ):
        lorafx.save(model, tmp_path / "folder", optimizer=optimizer, step=1)
    for name in ("folder", "a.pth"):
        lorafx.save(model, tmp_path / name)
        with pytest.raises(lorafx.FormatError, match="has no training state: it was saved without"):
            lorafx.resume(model, optimizer, tmp_path / name)
