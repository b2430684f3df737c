"""Adapters written as diffusers and kohya-ss read them, each pair with its alpha."""

import json

import torch
from torch import Tensor, nn

from .._adapter.adapter import Adapter
from .._errors import ConfigError
from .._graph.modules import submodule, users_modules
from .._storage.safetensors_files import safetensors_bytes
from .adapter_file import INSTEAD, Destination
from .peft_pairs import PeftPair, conv1d, peft_pairs
from .peft_write import config_of
from .pipelines import in_kohyas_file


def diffusers(adapter: Adapter, destination: Destination) -> dict[str, bytes]:
    """Return {file name: content} of what `load_lora_adapter` of diffusers loads at full strength.

    The alpha is in the header, in PEFT's config; a part of a pipeline stands before all names.
    """
    pairs, model = _pairs(adapter, destination)
    before = "" if destination.part is None else f"{destination.part}."
    tensors: dict[str, Tensor] = {}
    for name, _, _, (A, B, _) in pairs:
        tensors[f"{before}{name}.lora_A.weight"] = A
        tensors[f"{before}{name}.lora_B.weight"] = B
    config = config_of(adapter, model, pairs, [], "none", {})
    settings = {f"{before}{key}": value for key, value in config.items()}
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(settings, sort_keys=True)}
    return {destination.path.name: safetensors_bytes(tensors, header)}


def kohya(adapter: Adapter, destination: Destination) -> dict[str, bytes]:
    """Return {file name: content} as kohya's scripts and what understands them name modules."""
    pairs, model = _pairs(adapter, destination)
    keys = in_kohyas_file([pair.name for pair in pairs], users_modules(model),
                          destination.part or "unet")
    tensors: dict[str, Tensor] = {}
    for name, _, _, (A, B, scale) in pairs:
        key = keys[name]
        tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = A, B
        tensors[f"{key}.alpha"] = torch.tensor(float(scale * A.shape[0]))
    ranks = {pair.pair.A.shape[0] for pair in pairs}
    header = {"ss_network_module": "networks.lora", "ss_network_dim": str(max(ranks))}
    return {destination.path.name: safetensors_bytes(tensors, header)}


def _pairs(adapter: Adapter, destination: Destination) -> tuple[list[PeftPair], nn.Module]:
    """An adapter's pairs, each of a linear layer's whole weight, and their model."""
    if destination.model is None:
        raise ConfigError("its format depends on the model: load the adapter into it, and save it "
                          "from there.")
    for name in adapter.trained:
        raise ConfigError(f"such a file has no place for a trained '{name}'; {INSTEAD}.")
    pairs = peft_pairs(adapter, destination.model)
    for pair in pairs:
        module = submodule(destination.model, pair.module)
        if pair.attribute is not None or not isinstance(module, (nn.Linear, *conv1d())):
            raise ConfigError(f"such a file has adapters of linear layers, not of '{pair.name}', a "
                              f"parameter of a {type(module).__name__}; {INSTEAD}.")
    return pairs, destination.model
