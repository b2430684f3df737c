"""MLX-LM's folders: `adapters.safetensors` with a = A^T and b = B^T, y += scale (x a) b.

`adapter_config.json` beside it has one rank and one scale for all, and says how many of the last
layers are adapted, all at the same keys.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .._adapter.adapter import Adapter, Pair
from .._adapter.config import LoRAConfig, is_number
from .._adapter.names import dotted
from .._errors import ConfigError, FormatError
from .._graph.modules import users_modules
from .._storage.files import read_config, read_npz, read_safetensors
from .._storage.safetensors_files import safetensors_bytes
from .adapter_file import INSTEAD, AdapterFile, Decoded, Destination
from .pairs import pairs_of


CONFIG, TENSORS, OLD = "adapter_config.json", "adapters.safetensors", "adapters.npz"


def recognises(file: AdapterFile) -> bool:
    """True for a folder that has MLX's files, which PEFT's has not."""
    return file.path.is_dir() and any((file.path / name).is_file() for name in (TENSORS, OLD))


def decode(file: AdapterFile) -> Decoded:
    """Return the adapter in a folder."""
    path = file.path / TENSORS
    tensors = read_safetensors(path)[0] if path.is_file() else read_npz(file.path / OLD)
    config = read_config(file.path / CONFIG)
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise FormatError(f"'{file.path}' is MLX's {kind!r}, and lorafx reads its 'lora' only.")
    settings = config.get("lora_parameters")
    if not isinstance(settings, dict) or not is_number(settings.get("scale")):
        raise FormatError(f"'{file.path / CONFIG}' has no scale in its lora_parameters.")
    halves: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        half = {"lora_a": "A", "lora_b": "B"}.get(name.rpartition(".")[2])
        if half is None or tensor.ndim not in (2, 3):
            raise FormatError(f"'{path}' has a tensor '{name}' {tuple(tensor.shape)}, which is no "
                              "lora_a (in, rank) or lora_b (rank, out).")
        halves[dotted(name.rpartition(".")[0], half)] = tensor.mT.contiguous()
    sites = {name.rpartition(".")[0] for name in halves}
    pairs = pairs_of(halves, "A", "B", path, dict.fromkeys(sites, float(settings["scale"])))
    rank = max(pair.A.shape[-2] for pair in pairs.values())
    made = LoRAConfig(rank, dropout=settings.get("dropout", 0.0), targets=list(pairs))
    return Decoded(Adapter("default", made, pairs))


def encode(adapter: Adapter, destination: Destination) -> Mapping[str, bytes]:
    """Return {file name: content}; ConfigError where the format cannot hold the adapter."""
    for name in adapter.trained:
        raise ConfigError(f"an MLX folder of an adapter has no place for a trained '{name}'; "
                          f"{INSTEAD}.")
    if destination.model is None:
        raise ConfigError("MLX's format depends on the model: load the adapter into it, and save "
                          "it from there.")
    keys, layers = _layers(adapter, destination.model)
    rank = max(pair.A.shape[-2] for pair in adapter.pairs.values())
    scale = next(iter(adapter.pairs.values())).scale
    tensors: dict[str, Tensor] = {}
    for site, pair in adapter.pairs.items():
        a, b = _padded(site, pair, rank, scale)
        tensors[f"{site}.lora_a"], tensors[f"{site}.lora_b"] = a, b
    config: dict[str, Any] = {
        "fine_tune_type": "lora", "num_layers": layers,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": adapter.config.dropout,
                            "keys": keys}}
    return {TENSORS: safetensors_bytes(tensors, {"format": "mlx"}),
            CONFIG: json.dumps(config, indent=2).encode()}


def _padded(site: str, pair: Pair, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """a (in, rank) and b (rank, out) of this rank, with zeros, and this scale."""
    if pair.A.ndim != 2:
        raise ConfigError(f"an MLX folder of lorafx's has no stacks, as of the experts at "
                          f"'{site}'; {INSTEAD}.")
    more = rank - pair.A.shape[0]
    b = pair.B if pair.scale == scale else pair.B * (pair.scale / scale)
    return F.pad(pair.A.T, (0, more)).contiguous(), F.pad(b.T, (0, 0, 0, more)).contiguous()


_LAYER = re.compile(r"(.*?layers)\.(\d+)\.([^\[]+)")


def _layers(adapter: Adapter, model: nn.Module) -> tuple[list[str], int]:
    """The keys in a layer that are adapted, and in how many layers, counted from the last."""
    keys, stacks, first = set(), set(), None
    for site in adapter.pairs:
        found = _LAYER.fullmatch(site)
        if found is None:
            raise ConfigError(f"MLX adapts linear layers of numbered layers, such as "
                              f"'model.layers.0.self_attn.q_proj', and not '{site}'; {INSTEAD}.")
        stack, number, key = found.groups()
        keys.add(key)
        stacks.add(stack)
        first = int(number) if first is None else min(first, int(number))
    if len(stacks) != 1 or first is None:
        raise ConfigError(f"MLX adapts one stack of layers, and this has {sorted(stacks)}; "
                          f"{INSTEAD}.")
    stack, = stacks
    return sorted(keys), len(users_modules(model)[stack]._modules) - first
