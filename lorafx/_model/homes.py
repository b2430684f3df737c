"""Where new tensors of an adapter go: to the device on which the weight beside them is used."""

import torch
from torch import Tensor, nn

from .._graph.dispatched import device_in_use


def home(owner: nn.Module, weight: Tensor, has_values: bool) -> torch.device:
    """Return the device for a new tensor beside a weight of this module.

    A weight on the meta device may get its values later: until then, new tensors that have values
    (`has_values`), as from a file, wait on the CPU, and those that have none are on meta too.
    """
    device = device_in_use(owner, weight)
    return torch.device("cpu") if device.type == "meta" and has_values else device
