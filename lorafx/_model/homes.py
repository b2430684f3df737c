"""Where new tensors of an adapter go: to the device on which the weight beside them is used."""

import torch
from torch import Tensor, nn


def home(owner: nn.Module, weight: Tensor, has_values: bool) -> torch.device:
    """Return the device for a new tensor beside a weight of this module.

    A weight on the meta device may get its values later: until then, new tensors that have values
    (`has_values`), as from a file, wait on the CPU, and those that have none are on meta too.
    """
    if weight.device.type == "meta" and has_values:
        return torch.device("cpu")
    return weight.device
