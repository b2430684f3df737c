"""The errors raised on purpose: each says what was asked, what was found, what to try."""


class LorafxError(Exception):
    """The root of all errors raised by lorafx."""

    __module__ = "lorafx"  # where users import it from, and so what a traceback shows

    def __init_subclass__(cls) -> None:
        cls.__module__ = "lorafx"


class ConfigError(LorafxError, ValueError):
    """A setting (rank, alpha, dtype, an adapter's name, ...) is out of its range."""


class NoSiteError(LorafxError, ValueError):
    """A pattern matches no linear call of the model, or the model has none that can be adapted."""


class UnsupportedModelError(LorafxError, TypeError):
    """A rewrite would be unsound: the model is wrapped, compiled, patched, lazy or adapted."""


class AdaptedWeightError(LorafxError, RuntimeError):
    """Python writes into an adapted weight, or rounding it would lose the adapter, or too much."""


class NotInjectedError(LorafxError, TypeError):
    """The function needs a model made by `lorafx.inject` or `lorafx.load`."""


class AdapterError(LorafxError, ValueError):
    """An adapter's name is unknown, or is taken already."""


class TiedWeightError(LorafxError, ValueError):
    """Folding an adapter into a weight would also change something else that reads that weight."""


class FormatError(LorafxError, ValueError):
    """A file is missing, damaged, or not in a format that lorafx reads or writes."""


class MismatchError(FormatError):
    """A file is sound, but was made for another model: other sites, other shapes."""
