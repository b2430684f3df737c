"""A model in the place of that of a checkpoint: its linear layers by name, without values."""

from pathlib import Path

import torch
from torch import nn

from .._adapter.config import FLOATS
from .._adapter.names import dotted
from .._checkpoint.checkpoint import Checkpoint
from .._checkpoint.find import read_config, shards_of
from .._checkpoint.layout import stored_orientations
from .._checkpoint.safetensors_base import checkpoint_of
from .._errors import FormatError
from .._formats.peft_tokens import Outline
from .._model.places import base_parameters
from .._storage.safetensors_files import open_safetensors
from .conversions import ties_of


def model_of(base: Path) -> nn.Module:
    """Return modules named as the tensors of a checkpoint, on the meta device.

    A matrix that is a `weight` is a linear layer's (out, in), as an embedding is too; nothing of it
    is run. FormatError for a checkpoint that stores matrices as (in, out).
    """
    checkpoint = _checkpoint(base)
    if True in stored_orientations(checkpoint):
        raise FormatError(f"'{base}' stores weights as (in, out), which only the model itself "
                          "tells apart: lorafx.load the adapter into it, and lorafx.save it from "
                          "there.")
    model = Outline()
    for name, (shape, dtype) in checkpoint.tensors.items():
        owner, _, attribute = name.rpartition(".")
        if attribute == "weight" and len(shape) == 2 and owner:
            path, _, last = owner.rpartition(".")
            bias = dotted(owner, "bias") in checkpoint.tensors
            kept = dtype if dtype in FLOATS else None
            layer = nn.Linear(shape[1], shape[0], bias, device="meta", dtype=kept)
            _module(model, path).add_module(last, layer)
    for name, (shape, dtype) in checkpoint.tensors.items():
        owner, _, attribute = name.rpartition(".")
        module = _module(model, owner)
        if attribute not in module._parameters and dtype in FLOATS:
            tensor = torch.empty(shape, dtype=dtype, device="meta")
            module.register_parameter(attribute, nn.Parameter(tensor))
    ties = ties_of(read_config(base if base.is_dir() else base.parent) or {})
    model.tying = ties.embedding
    for names in ties.names:
        _tie(model, names)
    return model


def _tie(model: nn.Module, names: list[str]) -> None:
    """Let what goes by several names be one, where a checkpoint has it under some or all."""
    parameters = base_parameters(model)
    there = [parameters[name] for name in names if name in parameters]
    for name in names if there else ():
        tied = there[0]
        owner, _, attribute = name.rpartition(".")
        path, _, last = owner.rpartition(".")
        if attribute == "weight" and tied.ndim == 2 and name not in parameters:
            layer = nn.Linear(tied.shape[1], tied.shape[0], False, device="meta")
            _module(model, path).add_module(last, layer)
        _module(model, owner)._parameters[attribute] = tied


def _module(model: nn.Module, path: str) -> nn.Module:
    """The module at a path, made of empty ones where there are none."""
    for name in filter(None, path.split(".")):
        if name not in model._modules:
            model.add_module(name, nn.Module())
        model = model.get_submodule(name)
    return model


def _checkpoint(base: Path) -> Checkpoint:
    if base.is_dir():
        return checkpoint_of(base, shards_of(base), None)
    if base.suffix.lower() == ".safetensors":
        return checkpoint_of(base, [open_safetensors(base)], None)
    raise FormatError(f"'{base}' is not a base that names layers: give a .safetensors file or a "
                      "Hugging Face folder.")
