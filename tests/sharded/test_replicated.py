"""DDP, in processes: what one process computes, at any number of them."""

import pytest

from tests.support.torchrun import torchrun


@pytest.mark.parametrize("processes", [2, 4])
def test_set_ups_of_replicated(processes: int) -> None:
    assert torchrun("tests.sharded.replicated", processes)
