"""Files that others wrote: whatever is wrong with one becomes a FormatError that names it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .._errors import FormatError


LONGEST_NAME = 500  # characters of a tensor's name


@contextlib.contextmanager
def open_untrusted(path: Path, otherwise: str) -> Iterator[BinaryIO]:
    """Open a file for a parser, whose errors become FormatErrors; an OSError stays one.

    `otherwise` is what the file may be if it is not damaged: "not a safetensors file".
    """
    if path.exists() and not path.is_file():  # opening a pipe would wait for who writes into it
        raise FormatError(f"'{path}' is not a file.")
    try:
        with open(path, "rb") as file:
            yield file
    except (MemoryError, OSError, FormatError):
        raise
    except Exception as error:  # damaged bytes make parsers of JSON, zip and pickle raise anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        reason = "".join(character if character.isprintable() else "?" for character in reason)
        raise FormatError(f"'{path}' is damaged or {otherwise}: {reason}.") from error


def check_tensor_name(name: str) -> None:
    """Raise ValueError unless a name can be shown in a line."""
    if len(name) > LONGEST_NAME:
        raise ValueError(f"a tensor has a name of {len(name)} characters")
    if not name.isprintable():
        raise ValueError(f"the name {name!r} has characters that cannot be printed")
