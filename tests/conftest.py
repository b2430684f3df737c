"""Hypothesis repeats the same examples in every run; `--hypothesis-profile=search` looks for new ones, and longer."""

import hypothesis
import pytest
import torch
from models import Block
from torch import nn

hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=40, database=None)
hypothesis.settings.register_profile("search", deadline=None, max_examples=1000, database=None)
hypothesis.settings.load_profile("default")

torch.set_num_threads(1)  # the models are too small for more


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def block() -> nn.Module:
    """A small model in float64, in eval."""
    return Block().double().eval()
