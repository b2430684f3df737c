"""How an adapter uses its rank, and how two adapters point: of D = s B A, which is never formed."""

import math

import torch
from torch import Tensor

from .._kernels.addend import Addend, norm, singular_values
from .adapter import Pair


def over(change: float, size: float) -> float:
    """Return |D| / |W|: infinity where W alone is 0, NaN where W holds NaN or infinity."""
    if not size:
        return math.inf if change else 0.0
    return change / size if math.isfinite(size) else math.nan


def spectrum(pair: Pair) -> Tensor:
    """Return the singular values of s B A in float64, (rank,) or (experts, rank), large to small.

    There are fewer where the rank is more than the weight's size.
    """
    return singular_values([Addend(pair.B, pair.A, pair.scale)])


def effective_rank(values: Tensor) -> float:
    """Return exp(-sum p log p) for p = values / sum of values (Roy and Vetterli, 2007).

    It is n where n singular values are equal and all others 0, and 0 where all are. Of a stack of
    spectra it is the mean.
    """
    total = values.sum(-1, keepdim=True)
    shares = values / total.where(total > 0, 1)
    entropy = -torch.xlogy(shares, shares).sum(-1)
    return float(entropy.exp().where(total[..., 0] > 0, 0).mean())


def cosine(first: Pair, second: Pair) -> float | None:
    """Return <D1, D2> / (|D1| |D2|), from -1 to 1, for two of one shape.

    None where the shapes are not the same, or one is zero. <D1, D2> is s1 s2 times the sum of
    (B1^T B2) (A1 A2^T), element by element.
    """
    if (first.A.shape[-1], first.B.shape[:-1]) != (second.A.shape[-1], second.B.shape[:-1]):
        return None
    left = first.B.double().mT @ second.B.double()  # (..., rank1, rank2)
    right = first.A.double() @ second.A.double().mT
    sizes = [norm([Addend(pair.B, pair.A, pair.scale)]) for pair in (first, second)]
    if not all(sizes):
        return None
    product = float((left * right).sum()) * first.scale * second.scale
    return max(-1.0, min(1.0, product / (sizes[0] * sizes[1])))
