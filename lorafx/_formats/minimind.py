"""MiniMind's format, `.pth`: float16 tensors, the scale folded into B."""

import io
from collections import defaultdict
from pathlib import Path

import torch

from .._adapter.adapter import Adapter, all_finite
from .._adapter.config import LoRAConfig
from .._adapter.names import dotted
from .._errors import ConfigError
from .._storage.files import read_pickle
from .pairs import pairs_of


def encode(adapter: Adapter, base: str | None) -> bytes:
    """The content of a file."""
    if adapter.trained:
        name = next(iter(adapter.trained))
        raise ConfigError(f"a MiniMind file holds no base weights, such as the trained '{name}'; save to a path that "
                          "ends in .safetensors.")
    for site, (shape, transposed, _) in adapter.stored.items():
        if transposed and shape[-1] == shape[-2]:
            raise ConfigError(f"a MiniMind file cannot say that the square weight of '{site}' is stored as (in, out); "
                              "save to a path that ends in .safetensors.")
    tensors = {}
    for site, (A, B, scale) in adapter.pairs.items():
        tensors[dotted(site, "lora.A.weight")] = A.half()
        tensors[dotted(site, "lora.B.weight")] = (scale * B.to(torch.float64)).half()  # its readers know no scale
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise ConfigError(f"'{name}' exceeds float16's 65504; save to a path that ends in .safetensors.")
    buffer = io.BytesIO()
    torch.save({name: tensor.cpu() for name, tensor in tensors.items()}, buffer)
    return buffer.getvalue()


def decode(path: Path) -> tuple[Adapter, str | None]:
    """The adapter in a file, and the fingerprint of its base if the file has one."""
    tensors = read_pickle(path)
    pairs = pairs_of(tensors, "lora.A.weight", "lora.B.weight", path, defaultdict(lambda: 1.0))
    rank = max(pair.A.shape[-2] for pair in pairs.values())
    return Adapter("default", LoRAConfig(rank=rank, targets=list(pairs)), pairs), None
