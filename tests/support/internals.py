"""The private names of lorafx that tests of behaviour use: the one file that follows when they move.

Unit tests of a private unit import that unit themselves.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from lorafx import _checkpoint, _durable, _formats, _group, _jobs, _kernels, _merge, _output
from lorafx import _peft_read, _shards, _weight
from lorafx import __main__ as program
from lorafx._adapter import Adapter, LoRAConfig, Pair

INDEX, SINGLE = _checkpoint.INDEX, _checkpoint.SINGLE  # files of a checkpoint
STATE = _output.STATE  # the file in which an interrupted merge keeps what it was doing
WHOLE, DIGEST = _peft_read.WHOLE, _peft_read.DIGEST  # in the header of a PEFT folder's tensors
LARGEST_SUM = _shards._BLOCKS * _merge._BLOCK  # elements that a merge on disk sums at a time

_PLACES: dict[str, tuple[Any, str]] = {
    "merge_from": (_kernels, "MERGE_FROM"),
    "small_below": (_kernels, "SMALL_BELOW"),
    "whole": (_weight, "whole"),
    "read_adapter": (_formats, "read"),
    "read_safetensors": (_peft_read, "read_safetensors"),
    "patience": (_durable, "PATIENCE"),
    "put": (_output, "_put"),
    "sync_folder": (_output, "sync_folder"),
    "progress": (_output, "tqdm"),
    "open": (_jobs, "open"),
    "merge": (program, "merge"),
    "parse": (program, "parse"),
}


def internal(name: str) -> Any:
    """What lorafx has under one of the names above."""
    module, attribute = _PLACES[name]
    return getattr(module, attribute)


def replace_internal(monkeypatch: pytest.MonkeyPatch, name: str, value: Any) -> None:
    """Put something else there until the test ends."""
    module, attribute = _PLACES[name]
    monkeypatch.setattr(module, attribute, value, raising=name != "open")  # open is a builtin


def watch_sums(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list to which a merge on disk adds the size of each matrix that it sums."""
    sizes: list[int] = []
    summed: Callable[..., Any] = _shards.summed

    def watched(matrix: torch.Tensor, *arguments: Any) -> Any:
        sizes.append(matrix.numel())
        return summed(matrix, *arguments)

    monkeypatch.setattr(_shards, "summed", watched)
    return sizes


def watch_linears() -> AbstractContextManager[Any]:
    """A mock that sees the calls that groups of layers make to the kernels."""
    return mock.patch.object(_group, "linears", wraps=_kernels.linears)


def never_plain() -> AbstractContextManager[Any]:
    """The kernels' own backward pass for every call."""
    return mock.patch.object(_kernels, "_is_plain", lambda *_: False)


def write_pair(
    path: str | Path, B: torch.Tensor, A: torch.Tensor, scale: float = 1.0, name: str = "default",
    trained: dict[str, torch.Tensor] | None = None, **config: Any,
) -> None:
    """Write an adapter of one site, '0', of any dtype, scale and shape, for no model."""
    settings = LoRAConfig(rank=A.shape[0], targets=["0"], trainable=list(trained or ()), **config)
    adapter = Adapter(name, settings, {"0": Pair(A, B, scale)}, trained or {})
    _formats.write(adapter, path, None, None)
