"""Pipelines, a stage in each process: what one process computes, with any number of stages."""

import pytest

from tests.support.torchrun import torchrun


@pytest.mark.parametrize("processes", [2, 4])
def test_set_ups_of_pipeline(processes: int) -> None:
    assert torchrun("tests.sharded.pipeline", processes)
