"""The kinds of checkpoints that can be merged, a row each."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .._errors import FormatError
from .checkpoint import Readable
from .folder_base import open_folder, prepare_folder
from .jobs import PreparedMerge
from .plan import MergeRequest
from .safetensors_base import open_base, prepare_safetensors
from .torch_base import open_torch_file, prepare_torch_file


@dataclass(frozen=True)
class Kind:
    """The endings of a kind, for what is read and what is written, none for a folder.

    Then how it is merged, and how it is opened to be read only.
    """

    endings: tuple[str, ...]
    prepare: Callable[[Path, MergeRequest], PreparedMerge]
    open: Callable[[Path], Readable]


FOLDER = Kind((), prepare_folder, open_folder)
FILES = (Kind((".safetensors",), prepare_safetensors, open_base),
         Kind((".pth", ".pt"), prepare_torch_file, open_torch_file))


def kind_of(base: Path) -> Kind:
    """Return the kind of a checkpoint that is there; FormatError if it is of none."""
    if base.is_dir():
        return FOLDER
    for kind in FILES:
        if base.suffix.lower() in kind.endings:
            return kind
    raise FormatError(f"'{base}' is not a checkpoint by its ending: name a .safetensors, .pth or "
                      ".pt file, or a folder.")
