"""The bound on what folding may lose of what adapters add, and what exceeds it."""

import math
from collections.abc import Mapping

from .._errors import AdaptedWeightError, ConfigError
from .config import is_number, short_repr


_NAMED = 5  # sites that an error names


def check_max_error(max_error: float | None) -> None:
    """Raise ConfigError unless this is None or a number of at least 0."""
    if max_error is not None and not (is_number(max_error) and max_error >= 0):
        raise ConfigError("max_error must be a finite number of at least 0, such as 0.1, not "
                          f"{short_repr(max_error)}.")


def worst_first(errors: Mapping[str, float]) -> list[tuple[str, float]]:
    """(site, error), the largest first, and before it what is no number."""
    return sorted(errors.items(), key=lambda item: -math.inf if item[1] != item[1] else -item[1])


def check_errors(errors: Mapping[str, float], max_error: float) -> None:
    """Raise AdaptedWeightError if an error {site: |stored - (W + D)| / |D|} exceeds the bound."""
    above = [(site, error) for site, error in worst_first(errors) if not error <= max_error]
    if not above:
        return
    named = [f"{error:.3g} at '{site}'" for site, error in above[:_NAMED]]
    more = f", and {len(above) - _NAMED} more" if len(above) > _NAMED else ""
    if not all(math.isfinite(error) for _, error in above):
        more += (" (not finite where W or the adapter has NaN or infinity, or where the sum is too "
                 "large to be stored)")
    raise AdaptedWeightError(
        f"Storing W + s B A would lose more than {max_error:g} of s B A at {len(above)} of "
        f"{len(errors)} sites: {', '.join(named)}{more}. Nothing is merged: merge into a wider "
        "dtype, keep the adapter beside its base, or allow a larger error.")
