"""What a format decodes, what that gives, and where it encodes to: the same for all formats."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from .._adapter.adapter import Adapter


INSTEAD = "save to a path that ends in .safetensors"  # which keeps all of every adapter


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """A path to load from: the tensors and the metadata of a file, neither of a folder.

    `adapter` is the name that was asked for, which chooses among several adapters of one folder,
    `model` what the adapter is loaded into, `part` which part of a pipeline that is, and `alpha`
    that of a file which does not keep it; all may be unknown.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    adapter: str | None = None
    model: nn.Module | None = None
    part: str | None = None
    alpha: float | None = None


class Decoded(NamedTuple):
    """An adapter, and the fingerprint of the model that it was made for, if its file keeps that."""

    adapter: Adapter
    base: str | None = None


@dataclasses.dataclass(frozen=True)
class Destination:
    """The file or folder to save to, the model that the adapter is from, and its fingerprint.

    `part` says which part of a pipeline that is.
    """

    path: Path
    model: nn.Module | None = None
    base: str | None = None
    part: str | None = None
