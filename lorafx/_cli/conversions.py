"""What transformers knows of a checkpoint of which only the config is here: conversions, ties."""

import importlib
import importlib.util
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from .._adapter.conversions import ConversionTable
from .._formats.peft_tokens import ties_head
from .._graph.modules import users_modules
from .._model.older_names import conversion_table
from .._model.places import base_parameters


def table_of(config: Mapping[str, Any]) -> ConversionTable | None:
    """Return the table of the model that a config.json is of; None where transformers has none."""
    model = _model_of(config)
    return None if model is None else conversion_table(model)


class Ties(NamedTuple):
    """The names of each Parameter that has several, and the embedding to which a head is tied."""

    names: list[list[str]]
    embedding: str | None


def ties_of(config: Mapping[str, Any]) -> Ties:
    """Return what is tied in the model that a config.json is of, as far as transformers has it."""
    model, names = _model_of(config), defaultdict[nn.Parameter, list[str]](list)
    if model is None:
        return Ties([], None)
    for name, parameter in base_parameters(model).items():
        names[parameter].append(name)
    tying = [path for path in users_modules(model) if ties_head(model, path)]
    return Ties([found for found in names.values() if len(found) > 1], min(tying, default=None))


def _model_of(config: Mapping[str, Any]) -> nn.Module | None:
    """The model of a config.json, without memory; None where transformers has none.

    No code but that of transformers is run for it.
    """
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or importlib.util.find_spec("transformers") is None:
        return None
    transformers = importlib.import_module("transformers")
    for name in architectures:
        cls: Any = getattr(transformers, str(name), None)
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            return _empty(cls, config)
    return None


def _empty(cls: Any, config: Mapping[str, Any]) -> nn.Module | None:
    """A model on the meta device; None where this transformers cannot make it of this config."""
    try:
        with torch.device("meta"):
            model: nn.Module = cls(cls.config_class.from_dict(dict(config)))
    except Exception:  # of any class, from any code in transformers: then there is no table
        return None
    return model
