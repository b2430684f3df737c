"""What an adapter is, and how two differ: sizes, norms of s B A and of their differences.

B A is never formed.
"""

import dataclasses
import math
import sys
from typing import Any

import torch
from torch import Tensor

from .._kernels.addend import Addend, norm
from .adapter import Adapter, Pair
from .config import LoRAConfig


def describe(adapter: Adapter, base: str | None) -> dict[str, Any]:
    """Return all about an adapter as plain data; `base` is its base's fingerprint, if known."""
    sites = {}
    for site, pair in adapter.pairs.items():
        A, B, scale = pair
        sites[site] = {
            "rank": A.shape[-2], "scale": scale, "A": list(A.shape), "B": list(B.shape),
            "dtype": _dtype_name(A.dtype), "bytes": A.nbytes + B.nbytes,
            "norm": norm([_addend(pair)])}
    trained = {}
    for name, tensor in adapter.trained.items():
        trained[name] = {
            "shape": list(tensor.shape), "dtype": _dtype_name(tensor.dtype),
            "bytes": tensor.nbytes, "norm": _tensor_norm(tensor.double())}
    parameters = size = 0
    for _, tensor in adapter.tensors():
        parameters += tensor.numel()
        size += tensor.nbytes
    return {"name": adapter.name, "base": base, "config": _settings(adapter.config), "sites": sites,
            "trained": trained, "parameters": parameters, "bytes": size}


def difference(
    first: Adapter, second: Adapter, bases: tuple[str | None, str | None]
) -> dict[str, Any]:
    """Return how two adapters differ, as plain data.

    `sites` holds ||D_a - D_b|| / ||D_a|| of each site that both have, D = s B A, or infinity where
    only D_a is zero or the shapes are not the same; `trained` the same of tensors trained whole. It
    is 0 only where both are zero or made of the same numbers s B and A. `config` holds what else
    differs, which changes none of these.
    """
    sites = {}
    for site, pair in first.pairs.items():
        if site in second.pairs:
            sites[site] = _pair_difference(pair, second.pairs[site])
    trained = {}
    for name, tensor in first.trained.items():
        if name in second.trained:
            trained[name] = _tensor_difference(tensor, second.trained[name])
    ours = {"name": first.name, "base": bases[0]} | _settings(first.config)
    theirs = {"name": second.name, "base": bases[1]} | _settings(second.config)
    config = {key: [ours[key], theirs[key]] for key in ours if ours[key] != theirs[key]}
    return {
        "only_first": _only_in_first(first, second), "only_second": _only_in_first(second, first),
        "sites": sites, "trained": trained, "config": config}


def adapters_equal(found: dict[str, Any], tolerance: float) -> bool:
    """True if `difference` found that both adapters add the same, up to a relative tolerance.

    Their configs may differ.
    """
    if found["only_first"] or found["only_second"]:
        return False
    relative = [*found["sites"].values(), *found["trained"].values()]
    return all(value <= tolerance for value in relative)


def _only_in_first(first: Adapter, second: Adapter) -> list[str]:
    """The sites and trained tensors that only the first has."""
    sites = [site for site in first.pairs if site not in second.pairs]
    return sites + [name for name in first.trained if name not in second.trained]


def _pair_difference(first: Pair, second: Pair) -> float:
    if (first.A.shape[-1], first.B.shape[:-1]) != (second.A.shape[-1], second.B.shape[:-1]):
        return math.inf
    same_A = torch.equal(first.A.double(), second.A.double())
    if same_A and torch.equal(_scaled(first), _scaled(second)):
        return 0.0
    apart = norm([_addend(first), _addend(second._replace(scale=-second.scale))])
    return _ratio(apart, norm([_addend(first)]))


def _addend(pair: Pair) -> Addend:
    return Addend(pair.B, pair.A, pair.scale)


def _scaled(pair: Pair) -> Tensor:
    """s B."""
    return pair.scale * pair.B.double()


def _tensor_difference(first: Tensor, second: Tensor) -> float:
    if first.shape != second.shape:
        return math.inf
    if torch.equal(first.double(), second.double()):
        return 0.0
    return _ratio(_tensor_norm(first.double() - second.double()), _tensor_norm(first.double()))


def _tensor_norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))


def _ratio(apart: float, size: float) -> float:
    """The relative distance of two that are not made of the same numbers; 0 only if both are 0."""
    if not size:
        return math.inf if apart else 0.0
    return max(apart / size, sys.float_info.min) if math.isfinite(size) else math.inf


def _settings(config: LoRAConfig) -> dict[str, Any]:
    """A config's settings but for its targets, which are the sites."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    del fields["targets"], fields["exclude"]
    fields["trainable"] = list(config.trainable)
    fields["dtype"] = config.dtype and _dtype_name(config.dtype)
    return fields


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
