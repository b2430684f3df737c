"""What wrappers and PEFT's live models put into names of a PEFT folder is seen through."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn

import lorafx
from tests.formats.test_peft_heads import saved_by_peft

P = "base_model.model."


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layers[1](self.layers[0](x).tanh()))


def with_adapter(key: str) -> str:
    return key.replace(".weight", ".default.weight") if "lora_" in key else key


NAMES: dict[str, Callable[[str], str]] = {
    "the adapter's": with_adapter,
    "fsdp": lambda key: key.replace(P, f"_fsdp_wrapped_module.{P}_fsdp_wrapped_module."),
    "fsdp of layers": lambda key: key.replace(".layers.0.", ".layers.0._fsdp_wrapped_module."),
    "checkpoints": lambda key: key.replace("layers.1.", "layers.1._checkpoint_wrapped_module."),
    "compile": lambda key: f"_orig_mod.{key}",
    "compile inside": lambda key: key.replace(P, f"{P}_orig_mod."),
    "ddp": lambda key: f"module.{key}",
    "ddp inside": lambda key: key.replace(P, f"{P}module."),
    "ddp and compile": lambda key: f"module._orig_mod.{key}",
    "twice": lambda key: P + key,
    "three times": lambda key: P + P + key,
    "all": lambda key: with_adapter(f"module._orig_mod.{P}{key}"),
}


def saved(folder: Path, rename: Callable[[str], str]) -> tuple[nn.Module, nn.Module]:
    base = Net()
    theirs = saved_by_peft(
        base, folder, target_modules=["layers.0", "layers.1"], modules_to_save=["head"])
    file = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({rename(key): tensor for key, tensor in tensors.items()}, file)
    return base, theirs


@pytest.mark.parametrize("rename", NAMES.values(), ids=NAMES)
def test_names_with_more_in_them(tmp_path: Path, rename: Callable[[str], str]) -> None:
    base, theirs = saved(tmp_path, rename)
    x = torch.randn(5, 8)
    torch.testing.assert_close(lorafx.load(base, tmp_path)(x), theirs(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("targets", [
    ["_orig_mod.layers.0", "layers.1"], r"_orig_mod\.layers\.\d", r"(_orig_mod.)?layers.(0|1)"])
def test_a_config_that_has_what_wrappers_put_into_names(
    tmp_path: Path, targets: list[str] | str
) -> None:
    """PEFT, given a compiled model, names its modules so in the config and in the keys."""
    base, theirs = saved(tmp_path, NAMES["compile inside"])
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {
        "target_modules": targets, "modules_to_save": ["_orig_mod.head"],
        "rank_pattern": {"_orig_mod.layers.0": 2}, "r": 2}))
    x = torch.randn(5, 8)
    torch.testing.assert_close(lorafx.load(base, tmp_path)(x), theirs(x), rtol=1e-5, atol=1e-6)


class Around(nn.Module):
    """A model whose own modules are called as PEFT's prefix is."""

    def __init__(self) -> None:
        super().__init__()
        self.base_model = nn.ModuleDict({"model": nn.ModuleDict({"q": nn.Linear(8, 8)})})

    def forward(self, x):
        return self.base_model["model"]["q"](x)


def test_a_model_that_has_the_prefix_in_its_own_names(tmp_path: Path) -> None:
    base, x = Around(), torch.randn(5, 8)
    theirs = saved_by_peft(base, tmp_path, target_modules=["q"])
    torch.testing.assert_close(lorafx.load(base, tmp_path)(x), theirs(x), rtol=1e-5, atol=1e-6)


def test_names_that_are_not_one_adapters(tmp_path: Path) -> None:
    base, _ = saved(tmp_path, lambda key: key.replace(
        "lora_A.weight", "lora_A.french.weight").replace("lora_B.weight", "lora_B.law.weight"))
    with pytest.raises(lorafx.FormatError, match="several adapters, 'french', 'law': save each"):
        lorafx.load(base, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    base, _ = saved(tmp_path, lambda key: key)
    tensors = safetensors.torch.load_file(file)
    key = f"{P}layers.0.lora_A.weight"
    for other in (f"_orig_mod.{key}", with_adapter(key)):
        safetensors.torch.save_file(tensors | {other: tensors[key].clone()}, file)
        with pytest.raises(lorafx.FormatError, match=f"two tensors for '{key}'"):
            lorafx.load(base, tmp_path)


PARTS = st.sampled_from(
    ["base_model", "model", "module", "_orig_mod", "_fsdp_wrapped_module", "layers", "0", "q",
     "lora_A", "lora_B", "default", "weight", "lora_embedding_A", "hada_w1_a", "diff", "bias",
     "base_layer", "modules_to_save", "head"])


@settings(suppress_health_check=list(HealthCheck))
@given(names=st.sets(st.lists(PARTS, min_size=1, max_size=9).map(".".join), min_size=1, max_size=5),
       prefixed=st.booleans())
def test_any_names_load_whole_or_are_an_error(
    tmp_path_factory: pytest.TempPathFactory, names: set[str], prefixed: bool
) -> None:
    folder = tmp_path_factory.mktemp("any")
    base, _ = saved(folder, lambda key: key)
    file = folder / "adapter_model.safetensors"
    more = {(P if prefixed else "") + name: torch.zeros(2, 8) for name in names}
    safetensors.torch.save_file(safetensors.torch.load_file(file) | more, file)
    with pytest.raises(lorafx.LorafxError):
        lorafx.load(base, folder)
