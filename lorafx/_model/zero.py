"""Models of which DeepSpeed's ZeRO-3 partitions the parameters: what it takes is said, not done."""

from typing import Any

from torch import nn

from .._errors import UnsupportedModelError
from .._graph.loaded import loaded

# What tells a parameter that ZeRO-3 manages. It is looked up only where its module is loaded.
IS_MANAGED = ("deepspeed.runtime.zero.partition_parameters", "is_zero_param")
ORDER = ("make the model outside of deepspeed.zero.Init and inject before deepspeed.initialize, "
         "with a ZeRO stage of at most 2")


def _managed(model: nn.Module) -> list[tuple[str, Any]]:
    """(name, parameter) of all that ZeRO-3 manages."""
    is_managed = loaded(*IS_MANAGED)
    if is_managed is None:
        return []
    return [(path, parameter) for path, parameter in model.named_parameters()
            if is_managed(parameter)]


def check_not_managed(model: nn.Module) -> None:
    """Raise if ZeRO-3 manages a parameter: a copy of the model would not be managed."""
    for name, _ in _managed(model):
        raise UnsupportedModelError(
            f"The parameter '{name}' of this {type(model).__name__} is one that DeepSpeed's ZeRO-3 "
            f"partitions: {ORDER}.")


def check_gathered(model: nn.Module) -> None:
    """Raise if ZeRO-3 has left a parameter without values in this process."""
    for name, parameter in _managed(model):
        if parameter.shape != parameter.ds_shape:
            raise UnsupportedModelError(
                f"The parameter '{name}' is partitioned by DeepSpeed's ZeRO-3 and has no values "
                "here: do this within deepspeed.zero.GatheredParameters([*model.parameters()]), or "
                f"{ORDER}.")
