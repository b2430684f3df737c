"""Singular values, effective ranks and cosines, against D = s B A formed as a whole."""

import math

import pytest
import torch

from lorafx._adapter.adapter import Pair
from lorafx._adapter.spectrum import cosine, effective_rank, spectrum


def pair(*stack: int, rank: int = 3, scale: float = -0.7) -> Pair:
    A = torch.randn(*stack, rank, 7, dtype=torch.float64)
    return Pair(A, torch.randn(*stack, 5, rank, dtype=torch.float64), scale)


def delta(one: Pair) -> torch.Tensor:
    return one.scale * one.B @ one.A


@pytest.mark.parametrize("stack", [(), (4,)])
@pytest.mark.parametrize("rank", [1, 3, 9])
def test_singular_values_are_those_of_the_product(stack, rank):
    one = pair(*stack, rank=rank)
    expected = torch.linalg.svdvals(delta(one))[..., :rank]
    torch.testing.assert_close(spectrum(one), expected, rtol=1e-12, atol=1e-12)


def test_effective_rank_by_hand():
    def effective(*values):
        return effective_rank(torch.tensor(values, dtype=torch.float64))

    assert effective(2.0, 2.0, 2.0, 0.0) == pytest.approx(3)
    assert effective(5.0, 0.0) == pytest.approx(1) and effective(0.0, 0.0) == 0
    half = -(0.5 * math.log(0.5) + 0.3 * math.log(0.3) + 0.2 * math.log(0.2))
    assert effective(5.0, 3.0, 2.0) == pytest.approx(math.exp(half))
    assert effective([1.0, 1.0], [1.0, 0.0]) == pytest.approx(1.5)  # the mean of a stack


@pytest.mark.parametrize("stack", [(), (4,)])
def test_the_cosine_is_that_of_the_products(stack):
    first, second = pair(*stack), pair(*stack, rank=2, scale=1.3)
    expected = torch.nn.functional.cosine_similarity(
        delta(first).flatten(), delta(second).flatten(), 0)
    assert cosine(first, second) == pytest.approx(float(expected), abs=1e-12)
    assert cosine(first, first) == pytest.approx(1, abs=1e-12)
    assert cosine(first, first._replace(scale=2.0)) == pytest.approx(-1, abs=1e-12)
    assert cosine(first, first._replace(B=torch.zeros_like(first.B))) is None
    assert cosine(first, Pair(first.A[..., :6], first.B, 1.0)) is None
