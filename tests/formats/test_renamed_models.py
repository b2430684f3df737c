"""An adapter is found a place in a model whose names differ by what stands before all of them.

The rule is that of the merge on disk, for files of all formats.
"""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

import lorafx
from tests.support.command_line import main
from tests.support.oracle import randomise

IDS = torch.tensor([[1, 2, 3, 4]])
TINY = GPT2Config(vocab_size=32, n_positions=8, n_embd=8, n_layer=2, n_head=2)


def gpt2(cls: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return cls(TINY).eval()


def trained(base: nn.Module) -> nn.Module:
    return randomise(
        lorafx.inject(base, rank=2, targets=["c_attn", "mlp.c_fc"], trainable=["ln_1"])
    )


@pytest.mark.parametrize("file", ["adapter.safetensors", "adapter"])
@pytest.mark.parametrize("made_for, loaded_into, prefixes", [
    (GPT2Model, GPT2LMHeadModel, ("", "transformer.")),
    (GPT2LMHeadModel, GPT2Model, ("transformer.", "")),
])
def test_a_model_and_the_model_around_it(
    tmp_path: Path,
    file: str,
    made_for: type[nn.Module],
    loaded_into: type[nn.Module],
    prefixes: tuple[str, str],
) -> None:
    source = trained(gpt2(made_for))
    lorafx.save(source, tmp_path / file)
    model = lorafx.load(gpt2(loaded_into), tmp_path / file)
    old, new = prefixes
    ours, theirs = (dict(lorafx.named_parameters(m, "default")) for m in (model, source))
    assert {new + name.removeprefix(old) for name in theirs} == ours.keys()
    inner = model.get_submodule(new.rstrip("."))
    wanted = source.get_submodule(old.rstrip("."))
    torch.testing.assert_close(
        inner(IDS).last_hidden_state, wanted(IDS).last_hidden_state, rtol=0, atol=0
    )


@pytest.mark.parametrize(
    "made_for, merged_into", [(GPT2Model, GPT2LMHeadModel), (GPT2LMHeadModel, GPT2Model)]
)
def test_the_merge_of_a_file_on_disk_follows_the_same_rule(
    tmp_path: Path, made_for: type[nn.Module], merged_into: type[nn.Module],
) -> None:
    adapter, base, out = (
        str(tmp_path / f"{name}.safetensors") for name in ("adapter", "base", "out")
    )
    lorafx.save(trained(gpt2(made_for)), adapter)
    model = gpt2(merged_into)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(tensors, base)
    model.config.save_pretrained(tmp_path)  # which says that it is a model of transformers
    assert main(["merge", base, adapter, "-o", out]) == 0
    merged, wanted = (
        safetensors.torch.load_file(out), lorafx.merge(lorafx.load(model, adapter)).state_dict()
    )
    assert merged.keys() == wanted.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=0)


class Around(nn.Module):
    """Models side by side."""

    def __init__(self, **inner: nn.Module) -> None:
        super().__init__()
        for name, module in inner.items():
            setattr(self, name, module)

    def forward(self, x):
        for module in self.children():
            x = module(x)
        return x


def net(*widths: int) -> nn.Module:
    return Around(
        **{f"layer{i}": nn.Linear(a, b) for i, (a, b) in enumerate(zip(widths, widths[1:]))}
    )


def test_two_places_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    lorafx.save(lorafx.inject(net(4, 4, 4)), path)
    with pytest.raises(lorafx.MismatchError, match="'layer0'.* no such site; near it"):
        lorafx.load(Around(one=net(4, 4, 4), two=net(4, 4, 4)), path)


def test_names_that_fit_as_they_are_stay(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    lorafx.save(lorafx.inject(net(4, 4)), path)
    model = lorafx.load(Around(layer0=nn.Linear(4, 4), two=net(4, 4)), path)
    assert {name for name, _ in lorafx.named_parameters(model)} == {
        "layer0.lora.default.A",
        "layer0.lora.default.B",
    }


def test_one_place_that_does_not_hold_all_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    lorafx.save(lorafx.inject(net(4, 4, 4)), path)
    with pytest.raises(lorafx.MismatchError, match="no such site"):
        lorafx.load(Around(one=net(4, 4)), path)


def test_shapes_are_checked_there_too(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    lorafx.save(lorafx.inject(net(4, 4)), path)
    with pytest.raises(
        lorafx.MismatchError, match="maps 4 to 4 features at 'one.layer0', but this model 4 to 8"
    ):
        lorafx.load(Around(one=net(4, 8)), path)
