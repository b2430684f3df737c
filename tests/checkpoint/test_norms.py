"""|W| of an adapter's sites, from each kind of checkpoint, against the model that wrote it."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import lorafx
from lorafx._checkpoint.norms import weight_norms
from lorafx._formats.table import read_adapter
from tests.support.checkpoints import save_sharded
from tests.support.oracle import randomise


class Odd(nn.Module):
    """A fused weight, one stored as (in, out), and experts."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Linear(6, 9)
        self.other = nn.Parameter(torch.randn(9, 5))
        self.experts = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fused(x) @ self.other
        return torch.stack([nn.functional.linear(x, weight) for weight in self.experts])


@pytest.mark.parametrize("kind", ["file.safetensors", "file.pth", "folder"])
@pytest.mark.parametrize("step", [1, 4096])
def test_norms_of_rows_of_stacks_and_of_transposed_weights(kind, step, here, monkeypatch):
    monkeypatch.setattr("lorafx._checkpoint.norms.rows_at_a_time", lambda shape: step)
    monkeypatch.setattr("lorafx._checkpoint.norms._BLOCKS", 1)
    base = Odd()
    targets = ["fused[2:7]", "other", "experts"]
    lorafx.save(randomise(lorafx.inject(base, rank=2, targets=targets)), "a.safetensors")
    tensors, path = base.state_dict(), Path(kind)
    if kind == "folder":
        save_sharded(tensors, path, 2)
    elif path.suffix == ".pth":
        torch.save(tensors, path)
    else:
        safetensors.torch.save_file(tensors, path)
    adapter = read_adapter("a.safetensors")[0]
    same, norms = weight_norms(path, adapter, "'a.safetensors'")
    assert same is adapter
    expected = {"fused[2:7]": base.fused.weight[2:7], "other": base.other, "experts": base.experts}
    assert norms.keys() == expected.keys()
    for name, W in expected.items():
        assert norms[name] == pytest.approx(float(W.detach().double().norm()), rel=1e-12)


def test_rows_of_a_transposed_weight_are_columns(here):
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 9))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.w

    base = Transposed()
    lorafx.save(randomise(lorafx.inject(base, rank=2, targets="w[3:7]")), "a.safetensors")
    safetensors.torch.save_file(base.state_dict(), "base.safetensors")
    norms = weight_norms(Path("base.safetensors"), read_adapter("a.safetensors")[0], "'a'")[1]
    assert norms == {"w[3:7]": pytest.approx(float(base.w.detach()[:, 3:7].double().norm()))}


def test_a_weight_that_is_no_matrix_of_floats_or_not_there(here):
    adapter_of = randomise(lorafx.inject(nn.Sequential(nn.Linear(4, 4)), rank=2))
    lorafx.save(adapter_of, "a.safetensors")
    adapter = read_adapter("a.safetensors")[0]
    packed = {"0.weight": torch.zeros(4, 4, dtype=torch.int8)}
    safetensors.torch.save_file(packed, "packed.safetensors")
    with pytest.raises(lorafx.FormatError, match="stored as torch.int8, in which there is no W"):
        weight_norms(Path("packed.safetensors"), adapter, "'a'")
    safetensors.torch.save_file({"1.weight": torch.zeros(4, 4)}, "other.safetensors")
    with pytest.raises(lorafx.MismatchError, match="'a' has '0', but 'other.safetensors' has no"):
        weight_norms(Path("other.safetensors"), adapter, "'a'")
    with pytest.raises(lorafx.FormatError, match="not a checkpoint by its ending"):
        weight_norms(Path("base.gguf"), adapter, "'a'")
