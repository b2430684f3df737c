"""Tensors that a file keeps no place for, and values that are not finite."""

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorafx
from tests.support.adapter_files import Model, edit, injected


class Odd(torch.Tensor):
    """A class of somebody's own."""


NO_TENSORS = {
    "sparse": (lambda t: t.to_sparse(), "has dtype torch.float32 and layout torch.sparse_coo"),
    "complex": (lambda t: t.to(torch.complex64), "has dtype torch.complex64"),
    "quantized": (
        lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "has dtype torch.qint8"
    ),
    "expanded": (lambda t: torch.ones(1).expand(t.shape), "is expanded: its elements share memory"),
    "subclass": (
        lambda t: t.as_subclass(Odd), "is a Odd, of which a file keeps no more than a plain tensor"
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*quantiz")
@pytest.mark.parametrize("make, message", NO_TENSORS.values(), ids=NO_TENSORS)
@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_odd_tensors_are_not_saved(tmp_path: Path, make: Any, message: str, name: str) -> None:
    model = injected()
    factors = model.up.lora.default
    factors._parameters["A"] = nn.Parameter(make(factors.A.detach()), requires_grad=False)
    with pytest.raises(lorafx.FormatError, match=f"'up.lora.A'.*{message}"):
        lorafx.save(model, tmp_path / name)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_not_a_number_only_if_allowed(tmp_path: Path, value: float) -> None:
    lorafx.save(injected(), tmp_path / "a.safetensors")
    edit(tmp_path / "a.safetensors", lambda tensors, header: tensors["up.lora.A"].fill_(value))
    with pytest.raises(lorafx.FormatError, match="'up.lora.A' has NaN or infinite values"):
        lorafx.load(Model(), tmp_path / "a.safetensors")
    loaded = lorafx.load(Model(), tmp_path / "a.safetensors", allow_nonfinite=True)
    assert not loaded.up.lora.default.A.isfinite().any()


def test_what_is_not_finite_is_let_in_only_by_load(tmp_path: Path) -> None:
    model = lorafx.inject(nn.Linear(4, 4), rank=2)
    with torch.no_grad():
        model.lora.default.B.fill_(math.nan)
    with pytest.raises(lorafx.FormatError, match=r"'lora.B' has NaN or infinite values\.$"):
        lorafx.save(model, tmp_path / "a.safetensors")
    tensors = {"lora.A.weight": torch.ones(2, 4), "lora.B.weight": torch.full((4, 2), math.inf)}
    torch.save(tensors, tmp_path / "a.pth")
    with pytest.raises(
        lorafx.FormatError,
        match="'lora.B' has .* which lorafx.load lets in with allow_nonfinite=True",
    ):
        lorafx.load(nn.Linear(4, 4), tmp_path / "a.pth")
    assert (
        lorafx.load(nn.Linear(4, 4), tmp_path / "a.pth", allow_nonfinite=True)
        .lora.default.B.isinf()
        .all()
    )
