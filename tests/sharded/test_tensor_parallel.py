"""Tensor parallelism, in processes: what one process computes, at any number of them."""

import pytest

from tests.support.torchrun import torchrun


@pytest.mark.parametrize("processes", [2, 4])
def test_set_ups_of_tensor_parallelism(processes: int) -> None:
    assert torchrun("tests.sharded.tensor_parallel", processes)


def test_tensor_parallelism_of_transformers() -> None:
    assert torchrun("tests.sharded.transformers_tp_plan", 2)
