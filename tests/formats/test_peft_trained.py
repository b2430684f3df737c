"""PEFT's folders with modules that have buffers, in half precision too: each reads the other's."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import lorafx

peft = pytest.importorskip("peft")

STATISTICS = "base_model.model.1.running_mean"


def base(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).to(dtype)


def x(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(20, 8, generator=torch.Generator().manual_seed(1)) * 3 + 2).to(dtype)


def train(model: nn.Module, parameters: object) -> nn.Module:
    """Three steps, after which statistics and weights are not the base's."""
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(x()).square().mean().backward()
        optimizer.step()
    return model.eval()


def test_statistics_from_peft(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])
    theirs = peft.get_peft_model(base(), config)
    train(theirs, [p for p in theirs.parameters() if p.requires_grad]).save_pretrained(tmp_path)
    loaded = lorafx.load(base(), tmp_path).eval()
    torch.testing.assert_close(loaded(x()), theirs(x()), rtol=0, atol=1e-6)
    assert loaded[1].trained.default.num_batches_tracked == 3
    lorafx.save(loaded, tmp_path / "again")
    again, first = (
        safetensors.torch.load_file(folder / "adapter_model.safetensors")
        for folder in (tmp_path / "again", tmp_path)
    )
    assert again.keys() == first.keys() and again[STATISTICS].abs().max() > 0.1
    for name, tensor in first.items():
        assert torch.equal(again[name], tensor) and again[name].dtype == tensor.dtype, name


def test_statistics_for_peft(tmp_path: Path) -> None:
    ours = lorafx.inject(base(), 2, targets="0", trainable="1")
    lorafx.save(train(ours, lorafx.parameters(ours)), tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(theirs(x()), ours(x()), rtol=0, atol=1e-6)
    assert not torch.allclose(ours(x()), base().eval()(x()), atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_copies_of_more_digits_than_the_base(dtype: torch.dtype, tmp_path: Path) -> None:
    ours = lorafx.inject(base(dtype), 2, targets="0", trainable=["1", "2"]).eval()
    with torch.no_grad():
        for parameter in lorafx.parameters(ours):
            parameter.add_(torch.randn_like(parameter) / 10)
    lorafx.save(ours, tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.2.weight"
    assert torch.equal(stored[name], ours[2].trained.default.weight)
    assert stored[STATISTICS].dtype == dtype
    theirs = peft.PeftModel.from_pretrained(base(dtype), tmp_path).eval()
    loaded = lorafx.load(base(dtype), tmp_path).eval()
    assert torch.equal(loaded(x(dtype)), ours(x(dtype)))
    assert torch.equal(theirs.base_model.model[2].modules_to_save.default.weight.to(dtype),
                       ours[2].weight)
    stored[name] = stored[name].to(dtype)  # as PEFT saves it under such a base
    safetensors.torch.save_file(stored, tmp_path / "adapter_model.safetensors")
    loaded = lorafx.load(base(dtype), tmp_path).eval()
    assert loaded[2].trained.default.weight.dtype == torch.float32
    assert torch.equal(loaded(x(dtype)), ours(x(dtype)))


def test_a_buffer_of_a_module_that_is_not_saved_whole(tmp_path: Path) -> None:
    ours = lorafx.inject(base(), 2, targets="0", trainable="1")
    lorafx.save(ours, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    stored = safetensors.torch.load_file(file)
    net = base()
    net[2].register_buffer("shift", torch.zeros(3))
    safetensors.torch.save_file(stored | {"base_model.model.2.shift": torch.zeros(3)}, file)
    assert "trained" not in lorafx.load(net, tmp_path)[2]._modules
    safetensors.torch.save_file(stored | {"base_model.model.2.shift": torch.ones(3)}, file)
    with pytest.raises(lorafx.FormatError, match="'2.shift', a buffer, in which this model"):
        lorafx.load(net, tmp_path)
