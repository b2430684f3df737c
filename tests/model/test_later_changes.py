"""Models that change after injection."""

import pytest
import torch
from torch import nn

import lorafx
from tests.support.oracle import randomise


def test_a_model_that_grows_after_injection():
    model = randomise(lorafx.inject(nn.Sequential(nn.Linear(3, 3))))
    model.append(nn.Linear(3, 2))
    x = torch.randn(4, 3)
    torch.testing.assert_close(lorafx.merge(model)(x), model(x))
    assert len(lorafx.eject(model)) == 2
    with pytest.raises(RuntimeError):  # a parametrization keeps what it reads
        nn.utils.parametrizations.weight_norm(model[0])
    model[0] = nn.Linear(3, 3)


def test_a_module_trained_whole_survives_assignment():
    model = lorafx.inject(
        nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), targets="0", trainable="1"
    )
    model.load_state_dict(
        {key: value + 1 for key, value in model.state_dict().items()}, assign=True
    )
    tensors = dict(lorafx.named_parameters(model))
    model(torch.randn(2, 3)).sum().backward()
    assert all(tensor.grad is not None for tensor in tensors.values())
