"""Small checkpoints on a disk and adapters for them, and what is read back."""

import json
import os
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

import lorafx
from tests.support.internals import INDEX, SINGLE
from tests.support.oracle import randomise

SHARD = "model-00002-of-00002.safetensors"  # with both weights


def save_sharded(
    tensors: dict[str, torch.Tensor], folder: Path, shards: int, config: object = None
) -> Path:
    """A folder as Hugging Face's, its tensors dealt out to shards, with some other files."""
    folder.mkdir()
    names, places = sorted(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name].contiguous() for name in names[i::shards]}
        safetensors.torch.save_file(part, folder / file, {"format": "pt", "shard": str(i)})
        places |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    (folder / INDEX).write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": places})
    )
    (folder / "config.json").write_text(
        json.dumps(config or {"tie_word_embeddings": False, "dtype": "float32"})
    )
    (folder / "sub").mkdir()
    (folder / "sub" / "tokenizer.json").write_bytes(os.urandom(100))
    return folder


def read_folder(path: str | Path = "out") -> dict[str, torch.Tensor]:
    """The tensors of all shards of a folder, or of the only one."""
    folder, index = Path(path), Path(path, INDEX)
    files = (
        set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {SINGLE}
    )
    return {
        name: tensor
        for file in files for name, tensor in safetensors.torch.load_file(folder / file).items()
    }


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*") if path.is_file()
    }


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether all tensors have the same names, dtypes and bits."""
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name])
        for name in first
    )


def small_files(folder: Path) -> dict[str, torch.Tensor]:
    """base.safetensors, base.pth, base/: two layers; adapters: both (a), one (t), a head (h, i)."""
    base = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    whole = dict(targets="0", trainable="1")
    for name, config in (
        ("a", dict(targets="linear")),
        ("t", dict(targets="0")),
        ("h", whole),
        ("i", whole),
    ):
        lorafx.save(
            randomise(lorafx.inject(base, rank=2, **config, adapter=name)),
            folder / f"{name}.safetensors",
        )
    state = dict(base.state_dict())
    safetensors.torch.save_file(state, folder / "base.safetensors")
    torch.save(state, folder / "base.pth")
    save_sharded(state, folder / "base", 2)
    return state


class Turned(nn.Module):
    """y = x W, W stored as (in, out)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight
