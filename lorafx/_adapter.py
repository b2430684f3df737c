"""An adapter is data: a config, and at each site a pair A (rank, in), B (out, rank) with its scale s."""

import dataclasses
import math
import numbers
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._errors import ConfigError


def _gaussian(A: Tensor) -> None:
    nn.init.normal_(A, std=0.02)


def _kaiming(A: Tensor) -> None:
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))


INITS: dict[str, Callable[[Tensor], None]] = {"gaussian": _gaussian, "kaiming": _kaiming}
LONGEST_NAME = 200  # characters of an adapter's name
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """How an adapter is made; the arguments of `lorafx.inject`, validated.

    A site's rank is the value of the first `rank_pattern` key that matches its name, else `rank`; its alpha likewise.
    A key K matches a name as in PEFT: re.match(rf"(.*\\.)?({K})$", name). The scale is alpha / rank, or
    alpha / sqrt(rank) with `rslora` (Kalajdzievski 2023, arXiv:2312.03732), or 1 where there is no alpha.
    """

    rank: int = 8
    alpha: float | None = None
    targets: Any = "square"
    exclude: Any = ()
    dropout: float = 0.0
    rslora: bool = False
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    trainable: Any = ()
    init: str = "gaussian"
    dtype: torch.dtype | None = None
    rounding: bool = False
    share_dropout: bool = False

    def __post_init__(self) -> None:
        for field in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, field, _checked_patterns(field, getattr(self, field)))
        for rank in (self.rank, *self.rank_pattern.values()):
            if isinstance(rank, bool) or not isinstance(rank, numbers.Integral) or rank < 1:
                raise ConfigError(f"rank must be an integer of at least 1, not {shown(rank)}.")
            if rank >= 2**31:
                raise ConfigError(f"rank must be below 2^31, not {shown(rank)}.")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            if alpha is not None and not (is_number(alpha) and alpha > 0):
                raise ConfigError(f"alpha must be a finite number above 0, not {shown(alpha)}; without it the scale is "
                                  "1.")
        if self.rslora and self.alpha is None and not self.alpha_pattern:
            raise ConfigError("rslora divides alpha by sqrt(rank), but there is no alpha: give one, such as alpha=16.")
        if not (is_number(self.dropout) and 0 <= self.dropout < 1):
            raise ConfigError(f"dropout must be at least 0 and below 1, not {shown(self.dropout)}.")
        for flag in ("rslora", "rounding", "share_dropout"):
            if not isinstance(getattr(self, flag), bool):
                raise ConfigError(f"{flag} must be True or False, not {shown(getattr(self, flag))}.")
        if not isinstance(self.init, str) or self.init not in INITS:
            raise ConfigError(f"init must be one of {', '.join(map(repr, INITS))}, not {shown(self.init)}.")
        if self.dtype is not None and self.dtype not in FLOATS:
            raise ConfigError(f"dtype must be one of {', '.join(map(str, FLOATS))} or None, not {shown(self.dtype)}.")

    def site_rank(self, name: str) -> int:
        """The rank at the site of this name."""
        return int(first_match(self.rank_pattern, name, self.rank))

    def site_scale(self, name: str) -> float:
        """The scale s at the site of this name."""
        alpha = first_match(self.alpha_pattern, name, self.alpha)
        if alpha is None:
            return 1.0
        rank = self.site_rank(name)
        return float(alpha) / (math.sqrt(rank) if self.rslora else rank)


def is_number(value: Any) -> bool:
    """Whether a value is a finite real number, and no bool."""
    try:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


def shown(value: Any) -> str:
    """A value as an error shows it, in a few characters whatever a file says."""
    return repr(value[:80]) if isinstance(value, str) else reprlib.repr(value)


def _checked_patterns(field: str, patterns: Any) -> dict[str, Any]:
    if not isinstance(patterns, Mapping):
        raise ConfigError(f"{field} must be a dict of regular expressions to numbers, not {patterns!r}.")
    for key in patterns:
        try:
            re.compile(key)
        except (re.error, TypeError, OverflowError, RecursionError) as error:
            raise ConfigError(f"the pattern {shown(key)} is not a regular expression: {error}.") from error
    return dict(patterns)


def pattern_matches(key: str, name: str) -> bool:
    """Whether a key of rank_pattern or alpha_pattern applies to a site's name, by PEFT's rule."""
    return re.match(rf"(.*\.)?({key})$", name) is not None


def first_match(patterns: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    """The value of the first key of rank_pattern or alpha_pattern that applies to a site's name."""
    return next((value for key, value in patterns.items() if pattern_matches(key, name)), otherwise)


class Pair(NamedTuple):
    """One site of an adapter: A (rank, in), B (out, rank), and the scale of B A; or stacks of both, for experts."""

    A: Tensor
    B: Tensor
    scale: float


class Stored(NamedTuple):
    """How the weight of a site is stored: its whole shape, whether as (in, out), and the first row that is the site."""

    shape: tuple[int, ...]
    transposed: bool = False
    start: int = 0


@dataclasses.dataclass(frozen=True)
class Training:
    """Where a training run stands: after `step` steps of an optimizer, and with which random numbers to come.

    `kind` is the optimizer's class. `groups` has for each parameter group its options and the names of its tensors,
    `state` for each of these names what the optimizer keeps for it. Names are those of `Adapter.tensors`, which no
    order and no adapter's name changes. `random` has the generators' states, uint8, by where they are.
    """

    step: int
    kind: str
    groups: list[tuple[dict[str, Any], list[str]]]
    state: dict[str, dict[str, Any]]
    random: dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A named adapter apart from any model: its config, {site: Pair}, and base tensors trained beside it.

    `stored` says how the weights of its sites are stored, where that is known; `training` where its training stands.
    `alone` says that what it is for goes by no other name: where a model has a site or a trained tensor under several,
    it means something else. `turned` is whether its file says that the weights are stored as (in, out), which
    shapes may gainsay.
    """

    name: str
    config: LoRAConfig
    pairs: Mapping[str, Pair]
    trained: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    stored: Mapping[str, Stored] = dataclasses.field(default_factory=dict)
    training: Training | None = None
    alone: bool = False
    turned: bool = False

    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        """Every tensor under the name it has in a file of lorafx: `<site>.lora.A`, `<site>.lora.B`, or the base's."""
        for site, pair in self.pairs.items():
            yield join(site, "lora.A"), pair.A
            yield join(site, "lora.B"), pair.B
        yield from self.trained.items()


def validate(adapter: Adapter) -> None:
    """Raise ConfigError unless every pair fits together and all values are floating-point numbers."""
    check_name(adapter.name)
    for name, tensor in adapter.tensors():
        check_plain(name, tensor)
    for site, (A, B, scale) in adapter.pairs.items():
        check_shapes(site, A, B)
        if not is_number(scale):
            raise ConfigError(f"at '{site}', the scale is {scale!r}.")
    for name, tensor in adapter.tensors():
        if tensor.dtype not in FLOATS:
            raise ConfigError(f"'{name}' has dtype {tensor.dtype}.")


def check_finite(adapter: Adapter, otherwise: str = "") -> None:
    """Raise ConfigError if a value is NaN or infinite."""
    for name, tensor in adapter.tensors():
        if not all_finite(tensor):
            raise ConfigError(f"'{name}' has NaN or infinite values{otherwise}.")


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite: the least and the greatest tell, in a tenth of the time of asking each."""
    return tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())


def check_plain(name: str, tensor: Tensor) -> None:
    """Raise ConfigError unless a tensor is of torch's own class, and has values, each with memory of its own."""
    if type(tensor) not in (Tensor, nn.Parameter):
        raise ConfigError(f"'{name}' is a {type(tensor).__name__}, of which a file keeps no more than a plain tensor.")
    if tensor.is_nested:
        raise ConfigError(f"'{name}' is a nested tensor.")
    if tensor.is_meta:
        raise ConfigError(f"'{name}' is on the meta device and has no values.")
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ConfigError(f"'{name}' has dtype {tensor.dtype} and layout {tensor.layout}.")
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise ConfigError(f"'{name}' {tuple(tensor.shape)} is expanded: its elements share memory.")


def check_shapes(site: str, A: Tensor, B: Tensor) -> None:
    """Raise ConfigError unless A and B fit together."""
    if not (2 <= A.ndim == B.ndim <= 3 and A.shape[:-2] == B.shape[:-2] and A.shape[-2] == B.shape[-1] > 0):
        shapes = f"A {tuple(A.shape)} and B {tuple(B.shape)}"
        raise ConfigError(f"at '{site}', {shapes} are not (rank, in) and (out, rank), nor stacks of such.")


def check_name(name: str) -> None:
    """Raise ConfigError unless this can name an adapter: it names a submodule, and in PEFT's format a folder."""
    if (not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= LONGEST_NAME or name[0] == "_"
            or any(mark in name for mark in "./\\:") or name in dir(nn.Module())):
        raise ConfigError(f"{shown(name)} cannot name an adapter: use a word without dots, slashes and colons that is "
                          "no attribute of nn.Module and does not begin with an underscore.")


def join(prefix: str, name: str) -> str:
    """A dotted name below a prefix, which is empty for the model itself."""
    return f"{prefix}.{name}" if prefix else name
