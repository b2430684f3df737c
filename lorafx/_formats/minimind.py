"""MiniMind's format, `.pth`: A and s B in float16, by name, and nothing else."""

import io
from collections import defaultdict

import torch

from .._adapter.adapter import Adapter, all_finite
from .._adapter.config import LoRAConfig
from .._adapter.names import dotted
from .._errors import ConfigError
from .adapter_file import AdapterFile, Decoded, Destination
from .pairs import pairs_of


_INSTEAD = "save to a path that ends in .safetensors"


def encode(adapter: Adapter, destination: Destination) -> dict[str, bytes]:
    """Return {file name: content}; ConfigError where float16 or the format cannot hold the adapter."""
    for name in adapter.trained:
        raise ConfigError(f"a MiniMind file holds no base weights, such as the trained '{name}'; {_INSTEAD}.")
    for site, (shape, transposed, _) in adapter.stored.items():
        if transposed and shape[-1] == shape[-2]:
            raise ConfigError(f"a MiniMind file cannot say that the square weight of '{site}' is stored "
                              f"as (in, out); {_INSTEAD}.")
    tensors = {}
    for site, (A, B, scale) in adapter.pairs.items():
        tensors[dotted(site, "lora.A.weight")] = A.half().cpu()
        scaled = scale * B.to(torch.float64)  # the format's readers know no scale
        tensors[dotted(site, "lora.B.weight")] = scaled.half().cpu()
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise ConfigError(f"'{name}' exceeds float16's 65504; {_INSTEAD}.")
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return {destination.path.name: buffer.getvalue()}


def decode(file: AdapterFile) -> Decoded:
    """Return the adapter in a file, whose scales are 1."""
    scales: defaultdict[str, float] = defaultdict(lambda: 1.0)
    pairs = pairs_of(file.tensors, "lora.A.weight", "lora.B.weight", file.path, scales)
    rank = max(pair.A.shape[-2] for pair in pairs.values())
    return Decoded(Adapter("default", LoRAConfig(rank=rank, targets=list(pairs)), pairs))
