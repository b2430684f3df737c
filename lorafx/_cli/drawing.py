"""matplotlib, where it is, with fonts that have the letters of names."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from .._errors import ConfigError

_FONT = "DejaVu Sans"  # which matplotlib brings
_NO_LETTER = 0xFFFE  # a font that has it draws the same box for many letters


def drawing_tool() -> Any:
    """Return matplotlib, or raise ConfigError where it is not."""
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ConfigError("--plot draws with matplotlib, which cannot be imported here: "
                          "pip install 'lorafx[plot]'.") from error
    return matplotlib


@contextlib.contextmanager
def fonts_for(text: str) -> Iterator[None]:
    """Draw with fonts that have the letters of a text, and letters that none here has as boxes."""
    matplotlib = drawing_tool()
    with matplotlib.rc_context({"font.family": _families(text)}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
        yield


def _families(text: str) -> list[str]:
    """The names of fonts that have all letters of a text, as far as there are any."""
    import matplotlib.font_manager as fonts
    families, missing = [_FONT], set(map(ord, text)) - _letters_of(fonts.findfont(_FONT))
    for entry in sorted(fonts.fontManager.ttflist, key=lambda entry: (entry.name, entry.fname)):
        if not missing:
            break
        if entry.style == "normal":
            letters = _letters_of(entry.fname)
            if letters & missing and _NO_LETTER not in letters:
                families.append(entry.name)
                missing -= letters
    return families


def _letters_of(path: str) -> set[int]:
    """The letters of which a font has outlines."""
    import matplotlib.ft2font
    try:
        return set(matplotlib.ft2font.FT2Font(path).get_charmap())
    except RuntimeError:  # of images, or of another kind
        return set()
