"""The config of an adapter: the arguments of `lorafx.inject`, validated."""

import dataclasses
import math
import numbers
import re
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import ConfigError


def _gaussian(A: Tensor) -> None:
    nn.init.normal_(A, std=0.02)


def _kaiming(A: Tensor) -> None:
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))


INITS: dict[str, Callable[[Tensor], None]] = {"gaussian": _gaussian, "kaiming": _kaiming}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """How an adapter is made; the arguments of `lorafx.inject`, validated.

    A site's rank is the value of the first `rank_pattern` key that matches its name, else `rank`;
    its alpha likewise. A key K matches a name as in PEFT: re.match(rf"(.*\\.)?({K})$", name). The
    scale is alpha / rank, or alpha / sqrt(rank) with `rslora` (Kalajdzievski 2023,
    arXiv:2312.03732), or 1 where there is no alpha.
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
                raise ConfigError(f"rank must be an integer of at least 1, not {short_repr(rank)}.")
            if rank >= 2**31:
                raise ConfigError(f"rank must be below 2^31, not {short_repr(rank)}.")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            if alpha is not None and not (is_number(alpha) and alpha > 0):
                raise ConfigError(f"alpha must be a finite number above 0, not "
                                  f"{short_repr(alpha)}; without it the scale is 1.")
        if self.rslora and self.alpha is None and not self.alpha_pattern:
            raise ConfigError("rslora divides alpha by sqrt(rank), but there is no alpha: give "
                              "one, such as alpha=16.")
        if not (is_number(self.dropout) and 0 <= self.dropout < 1):
            raise ConfigError(f"dropout must be at least 0 and below 1, not "
                              f"{short_repr(self.dropout)}.")
        for flag in ("rslora", "rounding", "share_dropout"):
            if not isinstance(getattr(self, flag), bool):
                raise ConfigError(
                    f"{flag} must be True or False, not {short_repr(getattr(self, flag))}.")
        if not isinstance(self.init, str) or self.init not in INITS:
            raise ConfigError(f"init must be one of {', '.join(map(repr, INITS))}, not "
                              f"{short_repr(self.init)}.")
        if self.dtype is not None and self.dtype not in FLOATS:
            raise ConfigError(f"dtype must be one of {', '.join(map(str, FLOATS))} or None, not "
                              f"{short_repr(self.dtype)}.")

    def site_rank(self, name: str) -> int:
        """Return the rank at the site of this name."""
        return int(first_match(self.rank_pattern, name, self.rank))

    def site_scale(self, name: str) -> float:
        """Return the scale s at the site of this name."""
        alpha = first_match(self.alpha_pattern, name, self.alpha)
        if alpha is None:
            return 1.0
        rank = self.site_rank(name)
        return float(alpha) / (math.sqrt(rank) if self.rslora else rank)


def is_number(value: Any) -> bool:
    """True if a value is a finite real number and not a bool."""
    try:
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        return real and math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


def short_repr(value: Any) -> str:
    """Return a value as an error shows it, in a few characters whatever a file says."""
    return repr(value[:80]) if isinstance(value, str) else reprlib.repr(value)


def _checked_patterns(field: str, patterns: Any) -> dict[str, Any]:
    if not isinstance(patterns, Mapping):
        raise ConfigError(f"{field} must be a dict of regular expressions to numbers, not "
                          f"{patterns!r}.")
    for key in patterns:
        try:
            re.compile(key)
        except (re.error, TypeError, OverflowError, RecursionError) as error:
            raise ConfigError(
                f"the pattern {short_repr(key)} is not a regular expression: {error}.") from error
    return dict(patterns)


def pattern_matches(key: str, name: str) -> bool:
    """True if a key of rank_pattern or alpha_pattern applies to a site's name, by PEFT's rule."""
    return re.match(rf"(.*\.)?({key})$", name) is not None


def first_match(patterns: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    """Return the value of the first key of rank_pattern or alpha_pattern that applies to a name."""
    for key, value in patterns.items():
        if pattern_matches(key, name):
            return value
    return otherwise


def factor_dtype(config: LoRAConfig, weight: Tensor) -> torch.dtype:
    """Return the dtype of a weight's A and B: the config's, else its own, at least float32."""
    return config.dtype or torch.promote_types(weight.dtype, torch.float32)


def trained_dtype(config: LoRAConfig, weight: Tensor) -> torch.dtype:
    """Return the dtype of what is trained in a tensor's place: as A and B, but an exact copy."""
    return torch.promote_types(factor_dtype(config, weight), weight.dtype)
