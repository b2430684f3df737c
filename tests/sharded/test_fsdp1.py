"""FSDP1, in processes: what one process computes, at any number of them."""

import pytest

from tests.support.torchrun import torchrun


@pytest.mark.parametrize("processes", [2, 4])
def test_set_ups_of_fsdp1(processes: int) -> None:
    assert torchrun("tests.sharded.fsdp1", processes)
