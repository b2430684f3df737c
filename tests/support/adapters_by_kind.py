"""Adapters that their rank, alpha and one value tell apart, and the folders that hold them."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

import lorafx
from tests.support.adapter_files import Model
from tests.support.peft_adapters import saved_by_peft

# Rank, alpha, and the one value of every A and B.
KINDS = ((4, 4.0, 1.0), (4, 12.0, 2.0), (6, 12.0, 3.0))


def adapted(kind: tuple[int, float, float], width: int = 8) -> nn.Module:
    rank, alpha, value = kind
    model = lorafx.inject(Model(width), rank, alpha=alpha, targets="linear")
    with torch.no_grad():
        for parameter in lorafx.parameters(model):
            parameter.fill_(value)
    return model


def kind_of(path: Path, width: int = 8) -> tuple[int, float, float]:
    """The kind of the adapter in a folder, all of which is of that kind."""
    model = lorafx.load(Model(width), path)
    factors = [site.lora.default for site in (model.up, model.head)]
    [rank], [alpha], [value] = (
        {pair.A.shape[0] for pair in factors},
        {pair.scale * len(pair.A) for pair in factors},
        {x for pair in factors for t in (pair.A, pair.B) for x in t.unique().tolist()},
    )
    return rank, alpha, value


def contents(path: Path) -> dict[str, bytes]:
    return {
        str(found.relative_to(path)): found.read_bytes()
        for found in path.rglob("*") if found.is_file()
    }


OLD = (3, 9.0, 7.0)


def by_peft(path: Path, **options: Any) -> None:
    model = saved_by_peft(Model(8), path, target_modules=["up", "head"], r=3, lora_alpha=9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.fill_(7.0)
    model.save_pretrained(path, **options)


def old_bin(path: Path) -> None:
    by_peft(path, safe_serialization=False)
    (path / "adapter_model.safetensors").unlink()


def cut(path: Path) -> None:
    """What a save leaves that was killed after its tensors were renamed."""
    lorafx.save(adapted(KINDS[0]), path)
    config = (path / "adapter_config.json").read_bytes()
    lorafx.save(adapted(OLD), path)
    (path / "adapter_config.json").write_bytes(config)
