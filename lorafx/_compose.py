"""Makes one adapter of several: B A = sum w s B A at each site, exact or the best of a rank."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ._adapter.adapter import Adapter, Pair, all_finite, check_finite
from ._adapter.config import LoRAConfig
from ._errors import AdapterError
from ._model.attach import attach, check_new_name
from ._model.branches import branches
from ._model.extract import extract_here
from ._model.program import read_program
from ._model.record import weights_of


@torch.inference_mode(False)
def compose(
    model: nn.Module, weights: Mapping[str, float], adapter: str, rank: int | None = None
) -> dict[str, float]:
    """Make one adapter that computes what these do together with these weights.

    Without `rank` it is exact: its A is theirs stacked, (sum of ranks, in), and its B theirs side
    by side, (out, sum of ranks), each times its weight and scale. With `rank` a wider pair becomes
    the best of that rank: of D = sum w s B A, the first singular values (Eckart and Young 1936),
    each half in A and half in B. D itself is never made. Of a stack of experts that is so of each.
    A and B are float32, or float64 where theirs are; it is inactive at first.

    Returns:
        {site: relative error}, |D - B A| / |D| in Frobenius norms, 0 where it is exact.

    Raises:
        AdapterError: a name is unknown, the new one is taken, or the sum overflows.
        ConfigError: `rank` is not an integer of at least 1, or a value to be composed is NaN or
            infinite.

    Example:
        >>> import torch, lorafx
        >>> model = lorafx.inject(torch.nn.Linear(4, 4), rank=2, adapter="a")
        >>> lorafx.add(model, "b", rank=3)
        >>> lorafx.compose(model, {"a": 0.7, "b": 0.3}, adapter="c")
        {'': 0.0}
        >>> model.lora.c
        Factors(rank=5, scale=1)
        >>> errors = lorafx.compose(model, {"a": 0.7, "b": 0.3}, adapter="d", rank=2)
        >>> model.lora.d
        Factors(rank=2, scale=1)
    """
    check_new_name(model, adapter)
    if rank is not None:
        LoRAConfig(rank)  # which says what a rank may be
    chosen = weights_of(model, weights)
    if not chosen:
        raise AdapterError("There is nothing to compose: name at least one adapter.")
    parts = [(extract_here(model, name), weight) for name, weight in chosen.items()]
    for part, _ in parts:
        check_finite(part, f", so that adapter {part.name!r} cannot be composed")
    pairs: dict[str, Pair] = {}
    errors: dict[str, float] = {}
    for site in branches(model):
        found = [(part.pairs[site], weight) for part, weight in parts if site in part.pairs]
        if found:
            pair = _sum_of_pairs(found)
            if not all_finite(pair.B):
                raise AdapterError(f"The sum of these adapters at '{site}' has values beyond those "
                                   f"of {pair.B.dtype}: compose them with smaller weights.")
            pairs[site], errors[site] = _of_rank(pair, rank)
    whole: dict[str, Tensor] = {}
    for part, _ in parts:
        for name, tensor in part.trained.items():
            whole[name] = tensor.clone()
    attach(read_program(model), _adapter(adapter, [part for part, _ in parts], pairs, whole))
    return errors


def _sum_of_pairs(weighted: Sequence[tuple[Pair, float]]) -> Pair:
    """One pair whose B A is the sum of w s B A over these."""
    wide = torch.float32
    for pair, _ in weighted:
        wide = torch.promote_types(wide, pair.A.dtype)
    A = torch.cat([pair.A.to(wide) for pair, _ in weighted], dim=-2)  # (sum of ranks, in)
    scaled = [weight * pair.scale * pair.B.to(wide) for pair, weight in weighted]
    return Pair(A, torch.cat(scaled, dim=-1), 1.0)  # B (out, sum of ranks)


def _of_rank(pair: Pair, rank: int | None) -> tuple[Pair, float]:
    """The pair of at most this rank whose B A is nearest to that of one, and how far it is.

    With B = Q T and A^T = P S, B A = Q (T S^T) P^T, and T S^T, which is as small as the sum of
    ranks, has the singular values of B A. In float64 and on the CPU, as not every device has these.
    """
    A, B, _ = pair
    if rank is None or A.shape[-2] <= rank:
        return pair, 0.0
    Q, T = torch.linalg.qr(B.cpu().double())  # (out, k), (k, sum of ranks)
    P, S = torch.linalg.qr(A.mT.cpu().double())  # (in, m), (m, sum of ranks)
    U, values, V = torch.linalg.svd(T @ S.mT, full_matrices=False)  # (k, n), (n), (n, m)
    roots = values[..., :rank].sqrt()
    left = Q @ (U[..., :rank] * roots.unsqueeze(-2))  # (out, rank)
    right = (roots.unsqueeze(-1) * V[..., :rank, :]) @ P.mT  # (rank, in)
    size, lost = float(values.norm()), float(values[..., rank:].norm())
    return Pair(right.to(A), left.to(B), 1.0), lost / size if size else 0.0


def _adapter(
    name: str, parts: Sequence[Adapter], pairs: Mapping[str, Pair], trained: Mapping[str, Tensor]
) -> Adapter:
    """An adapter of these pairs and tensors; what all of its parts accept, it does."""
    ranks = [pair.A.shape[-2] for pair in pairs.values()]
    rounding = all(part.config.rounding for part in parts)
    buffers = frozenset[str]().union(*(part.buffers for part in parts))
    config = LoRAConfig(rank=max(ranks, default=1), rounding=rounding)
    return Adapter(name, config, pairs, trained, buffers=buffers)
