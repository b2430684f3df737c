"""transformers' table of conversions for a checkpoint, of which only the config is here."""

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .._adapter.conversions import ConversionTable
from .._model.older_names import conversion_table


def table_of(config: Mapping[str, Any]) -> ConversionTable | None:
    """Return the table of the model that a config.json is of; None where transformers has none.

    The model is made without memory, and no code but that of transformers is run for it.
    """
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or importlib.util.find_spec("transformers") is None:
        return None
    transformers = importlib.import_module("transformers")
    for name in architectures:
        cls: Any = getattr(transformers, str(name), None)
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            model = _empty(cls, config)
            return None if model is None else conversion_table(model)
    return None


def _empty(cls: Any, config: Mapping[str, Any]) -> nn.Module | None:
    """A model on the meta device; None where this transformers cannot make it of this config."""
    try:
        with torch.device("meta"):
            model: nn.Module = cls(cls.config_class.from_dict(dict(config)))
    except Exception:  # of any class, from any code in transformers: then there is no table
        return None
    return model
