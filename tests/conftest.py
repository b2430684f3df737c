"""What every test has: the same random numbers, one thread, and examples that repeat.

Hypothesis repeats the same examples in every run; `--hypothesis-profile=search` looks for new ones,
and longer.
"""

import gc
from pathlib import Path

import hypothesis
import pytest
import torch
from torch import nn

from tests.support.checkpoints import small_files
from tests.support.models import Block

hypothesis.settings.register_profile(
    "default", deadline=None, derandomize=True, max_examples=40, database=None
)
hypothesis.settings.register_profile("search", deadline=None, max_examples=1000, database=None)
hypothesis.settings.load_profile("default")

torch.set_num_threads(1)  # the models are too small for more
gc.disable()  # while modules are imported, which stay


def pytest_collection_finish() -> None:
    """The garbage collector, which tests call often, need not look at all that was imported."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def block() -> nn.Module:
    """A small model in float64, in eval."""
    return Block().double().eval()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runs in its own folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def small(here: None, tmp_path: Path) -> dict[str, torch.Tensor]:
    """A small checkpoint in the current folder, in three forms, and adapters for it."""
    return small_files(tmp_path)
