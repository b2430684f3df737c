"""An adapter is data: a config, and at each site A (rank, in), B (out, rank) and their scale s."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._errors import ConfigError
from .config import FLOATS, LoRAConfig, is_number
from .names import check_name, dotted


class Pair(NamedTuple):
    """One site of an adapter: A (rank, in), B (out, rank) and the scale of B A; of experts, stacks.
    """

    A: Tensor
    B: Tensor
    scale: float


class StoredWeight(NamedTuple):
    """How a site's weight is stored: its whole shape, if as (in, out), and the site's first row."""

    shape: tuple[int, ...]
    transposed: bool = False
    start: int = 0


@dataclasses.dataclass(frozen=True)
class Training:
    """Where a training run stands: after `step` steps of an optimizer, and its random generators.

    `kind` is the optimizer's class. `groups` has for each parameter group its options and the names
    of its tensors, `state` for each of these names what the optimizer keeps for it. Names are those
    of `Adapter.tensors`, which no order and no adapter's name changes. `random` has the generators'
    states, uint8, by where they are.
    """

    step: int
    kind: str
    groups: list[tuple[dict[str, Any], list[str]]]
    state: dict[str, dict[str, Any]]
    random: dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A named adapter apart from any model: config, {site: Pair}, base tensors trained beside it.

    `buffers` names those of them that are buffers, as a BatchNorm's statistics: of any dtype, and
    infinity may mean something in them, as in a mask.
    `stored` says how the weights of its sites are stored, where that is known; `training` where its
    training stands. `untied` says that what it is for goes by no other name: where a model has a
    site or a trained tensor under several, it means something else. `alone` names rows of which
    that is so; others are for all that is tied to them. `says_transposed` is true if its file says
    that the weights are stored as (in, out), which shapes may contradict.
    """

    name: str
    config: LoRAConfig
    pairs: Mapping[str, Pair]
    trained: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    stored: Mapping[str, StoredWeight] = dataclasses.field(default_factory=dict)
    training: Training | None = None
    untied: bool = False
    says_transposed: bool = False
    buffers: frozenset[str] = frozenset()
    alone: frozenset[str] = frozenset()

    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        """Yield every tensor and its name in a file of lorafx.

        That is `<site>.lora.A`, `<site>.lora.B`, or of a base tensor its own.
        """
        for site, pair in self.pairs.items():
            yield dotted(site, "lora.A"), pair.A
            yield dotted(site, "lora.B"), pair.B
        yield from self.trained.items()


def validate(adapter: Adapter) -> None:
    """Raise ConfigError unless every pair fits together and all tensors are floating-point."""
    check_name(adapter.name)
    for name, tensor in adapter.tensors():
        check_plain(name, tensor)
    for site, (A, B, scale) in adapter.pairs.items():
        check_shapes(site, A, B)
        if not is_number(scale) or abs(scale) > torch.finfo(torch.float32).max:
            raise ConfigError(f"at '{site}', the scale is {scale!r}.")
    for name, tensor in adapter.tensors():
        if tensor.dtype not in FLOATS and name not in adapter.buffers:
            raise ConfigError(f"'{name}' has dtype {tensor.dtype}.")


def check_finite(adapter: Adapter, otherwise: str = "") -> None:
    """Raise ConfigError if a value is NaN or infinite."""
    for name, tensor in adapter.tensors():
        sound = not tensor.isnan().any() if name in adapter.buffers else all_finite(tensor)
        if not sound:
            raise ConfigError(f"'{name}' has NaN or infinite values{otherwise}.")


def all_finite(tensor: Tensor) -> bool:
    """True if no value is NaN or infinite.

    The least and the greatest tell, in a tenth of the time that asking each value takes.
    """
    return tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())


def check_plain(name: str, tensor: Tensor) -> None:
    """Raise ConfigError unless a tensor is of torch's own class, with memory for each value."""
    if type(tensor) not in (Tensor, nn.Parameter):
        raise ConfigError(f"'{name}' is a {type(tensor).__name__}, of which a file keeps no more "
                          "than a plain tensor.")
    if tensor.is_nested:
        raise ConfigError(f"'{name}' is a nested tensor.")
    if tensor.is_meta:
        raise ConfigError(f"'{name}' is on the meta device and has no values.")
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ConfigError(f"'{name}' has dtype {tensor.dtype} and layout {tensor.layout}.")
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise ConfigError(f"'{name}' {tuple(tensor.shape)} is expanded: its elements share memory.")


def check_shapes(site: str, A: Tensor, B: Tensor) -> None:
    """Raise ConfigError unless A and B are those of a linear layer, or stacks of such."""
    if A.ndim > 3:
        raise ConfigError(f"it adapts '{site}', a convolution, which lorafx does not support.")
    of_one_kind = 2 <= A.ndim == B.ndim and A.shape[:-2] == B.shape[:-2]
    if not (of_one_kind and A.shape[-2] == B.shape[-1] > 0):
        shapes = f"A {tuple(A.shape)} and B {tuple(B.shape)}"
        raise ConfigError(f"at '{site}', {shapes} are not (rank, in) and (out, rank), nor stacks "
                          "of such.")
