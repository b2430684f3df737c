"""MiniMind's format, `.pth`: A and s B in float16, by name, and nothing else."""

import io
from collections import defaultdict
from collections.abc import Collection

import torch

from .._adapter.adapter import Adapter, all_finite
from .._adapter.config import LoRAConfig
from .._adapter.names import dotted
from .._errors import ConfigError
from .adapter_file import INSTEAD, AdapterFile, Decoded, Destination
from .pairs import pairs_of


def encode(adapter: Adapter, destination: Destination) -> dict[str, bytes]:
    """Return {file name: content}; ConfigError where the format cannot hold the adapter."""
    for name in adapter.trained:
        raise ConfigError(f"a MiniMind file holds no base weights, such as the trained '{name}'; "
                          f"{INSTEAD}.")
    for site, (shape, transposed, _) in adapter.stored.items():
        if transposed and shape[-1] == shape[-2]:
            raise ConfigError(f"a MiniMind file cannot say that the square weight of '{site}' is "
                              f"stored as (in, out); {INSTEAD}.")
    tensors = {}
    for site, (A, B, scale) in adapter.pairs.items():
        tensors[dotted(site, "lora.A.weight")] = A.half().cpu()
        scaled = scale * B.to(torch.float64)  # the format's readers know no scale
        tensors[dotted(site, "lora.B.weight")] = scaled.half().cpu()
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise ConfigError(f"'{name}' exceeds float16's 65504; {INSTEAD}.")
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return {destination.path.name: buffer.getvalue()}


def names_in(names: Collection[str]) -> Collection[str]:
    """Return all names if some are of such a file, else none."""
    halves = tuple(f"lora.{half}.weight" for half in "AB")
    return names if any(f".{name}".endswith(halves) for name in names) else []


def decode(file: AdapterFile) -> Decoded:
    """Return the adapter in a file, whose scales are 1."""
    scales: defaultdict[str, float] = defaultdict(lambda: 1.0)
    pairs = pairs_of(file.tensors, "lora.A.weight", "lora.B.weight", file.path, scales)
    rank = max(pair.A.shape[-2] for pair in pairs.values())
    return Decoded(Adapter("default", LoRAConfig(rank=rank, targets=list(pairs)), pairs))
