"""What a model of the zoo gives when it is called."""

import torch
from torch import Tensor, nn

from tests.zoo.rows import Row


def outputs(
    row: Row, model: nn.Module, training: bool = False, grad: bool = True
) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    with torch.set_grad_enabled(grad):
        return row.run(model.train(training))
