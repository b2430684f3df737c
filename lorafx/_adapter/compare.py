"""What an adapter is, and how two differ: sizes, norms of s B A and of differences of such, without forming B A."""

import dataclasses
import math
import sys
from typing import Any

import torch
from torch import Tensor

from .adapter import Adapter, Pair
from .config import LoRAConfig


def describe(adapter: Adapter, base: str | None) -> dict[str, Any]:
    """All about an adapter, as plain data; `base` is the fingerprint of the model that it was made for, if known."""
    sites = {}
    for site, pair in adapter.pairs.items():
        A, B, scale = pair
        sites[site] = {"rank": A.shape[-2], "scale": scale, "A": list(A.shape), "B": list(B.shape),
                       "dtype": _name(A.dtype), "bytes": A.nbytes + B.nbytes, "norm": norm([pair])}
    trained = {name: {"shape": list(tensor.shape), "dtype": _name(tensor.dtype), "bytes": tensor.nbytes,
                      "norm": torch.linalg.vector_norm(tensor.double()).item()}
               for name, tensor in adapter.trained.items()}
    size = sum(tensor.nbytes for _, tensor in adapter.tensors())
    count = sum(tensor.numel() for _, tensor in adapter.tensors())
    return {"name": adapter.name, "base": base, "config": _plain(adapter.config), "sites": sites, "trained": trained,
            "parameters": count, "bytes": size}


def difference(first: Adapter, second: Adapter, bases: tuple[str | None, str | None]) -> dict[str, Any]:
    """How two adapters differ, as plain data.

    `sites` holds ||D_a - D_b|| / ||D_a|| of each site that both have, D = s B A, or infinity where only D_a is zero or
    the shapes are not the same; `trained` the same of tensors trained whole. It is 0 only where both are zero or made
    of the same numbers s B and A. `config` holds what else differs, which changes none of these.
    """
    ours, theirs = (dict(name=adapter.name, base=base, **_plain(adapter.config))
                    for adapter, base in zip((first, second), bases))
    return {
        "only_first": _only(first, second),
        "only_second": _only(second, first),
        "sites": {site: _relative(pair, second.pairs[site])
                  for site, pair in first.pairs.items() if site in second.pairs},
        "trained": {name: _relative_whole(tensor, second.trained[name])
                    for name, tensor in first.trained.items() if name in second.trained},
        "config": {key: [ours[key], theirs[key]] for key in ours if ours[key] != theirs[key]},
    }


def _only(first: Adapter, second: Adapter) -> list[str]:
    """The sites and trained tensors that only the first has."""
    return [*(site for site in first.pairs if site not in second.pairs),
            *(name for name in first.trained if name not in second.trained)]


def adapters_equal(found: dict[str, Any], tolerance: float) -> bool:
    """Whether both adapters add the same to the same weights, up to a relative tolerance; their configs may differ."""
    relative = [*found["sites"].values(), *found["trained"].values()]
    return not (found["only_first"] or found["only_second"] or any(not value <= tolerance for value in relative))


def norm(pairs: list[Pair]) -> float:
    """The Frobenius norm of sum s B A, all of one shape, in float64.

    The sum is L R with L the B's side by side, (..., out, ranks), and R the A's stacked, (..., ranks, in). With
    L = Q1 R1 and R^T = Q2 R2 its norm is that of the small R1 R2^T, which loses no digits as Gram matrices would.
    """
    left = torch.cat([_scaled(pair) for pair in pairs], -1)
    right = torch.cat([pair.A.double() for pair in pairs], -2)
    return float(torch.linalg.vector_norm(_corner(left) @ _corner(right.mT).mT))


def _corner(tall: Tensor) -> Tensor:
    """R of a matrix Q R."""
    return torch.linalg.qr(tall, mode="r").R if tall.numel() else tall[..., :0, :]


def _relative(first: Pair, second: Pair) -> float:
    if (first.A.shape[-1], first.B.shape[:-1]) != (second.A.shape[-1], second.B.shape[:-1]):
        return math.inf
    if torch.equal(first.A.double(), second.A.double()) and torch.equal(_scaled(first), _scaled(second)):
        return 0.0
    return _ratio(norm([first, second._replace(scale=-second.scale)]), norm([first]))


def _scaled(pair: Pair) -> Tensor:
    """s B."""
    return pair.scale * pair.B.double()


def _relative_whole(first: Tensor, second: Tensor) -> float:
    if first.shape != second.shape:
        return math.inf
    if torch.equal(first.double(), second.double()):
        return 0.0
    apart = torch.linalg.vector_norm(first.double() - second.double()).item()
    return _ratio(apart, torch.linalg.vector_norm(first.double()).item())


def _ratio(apart: float, size: float) -> float:
    """How far from each other two are that are not made of the same numbers; 0 only if both are zero."""
    if not size:
        return math.inf if apart else 0.0
    return max(apart / size, sys.float_info.min) if math.isfinite(size) else math.inf


def _plain(config: LoRAConfig) -> dict[str, Any]:
    """A config's settings; its targets are the sites, which are told apart."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    del fields["targets"], fields["exclude"]
    return {**fields, "trainable": list(config.trainable), "dtype": config.dtype and _name(config.dtype)}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
