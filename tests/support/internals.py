"""The private names of lorafx that tests of behaviour use: the one file to follow when they move.

Unit tests of a private unit import that unit themselves.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from lorafx._adapter.adapter import Adapter, Pair
from lorafx._adapter.config import LoRAConfig
from lorafx._checkpoint import find, fold, jobs, paths, progress, write
from lorafx._cli import commands
from lorafx._cli import main as program
from lorafx._formats import peft_folder, table
from lorafx._kernels import again, linears, products, scratch, weights
from lorafx._model import adapted_weight, lower
from lorafx._storage import locks

INDEX, SINGLE = find.INDEX, find.SINGLE  # files of a checkpoint
STATE = paths.STATE  # the file in which an interrupted merge keeps what it was doing
WHOLE, DIGEST = peft_folder.WHOLE, peft_folder.DIGEST  # in the header of a PEFT folder's tensors
LARGEST_SUM = fold._BLOCKS * weights._BLOCK  # elements that a merge on disk sums at a time

_PLACES: dict[str, tuple[Any, str]] = {
    "merge_from": (linears, "MERGE_FROM"),
    "small_below": (linears, "SMALL_BELOW"),
    "in_cache": (products, "IN_CACHE"),
    "kept_below": (again, "KEPT_BELOW"),
    "whole": (adapted_weight, "whole"),
    "read_adapter": (commands, "read_adapter"),
    "read_safetensors": (peft_folder, "read_safetensors"),
    "patience": (locks, "PATIENCE"),
    "put": (write, "_put"),
    "sync_folder": (write, "sync_folder"),
    "progress": (progress, "tqdm"),
    "summed_at_a_time": (weights, "_BLOCK"),
    "open": (jobs, "open"),
    "merge": (commands, "merge_checkpoint"),
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
    summed: Callable[..., Any] = fold.summed

    def watched(matrix: torch.Tensor, *arguments: Any) -> Any:
        sizes.append(matrix.numel())
        return summed(matrix, *arguments)

    monkeypatch.setattr(fold, "summed", watched)
    return sizes


def watch_memory(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list to which each use of memory that is kept adds its number of elements."""
    sizes: list[int] = []
    empty = scratch.Scratch.empty

    def watched(self: Any, use: str, shape: Any, *more: Any) -> torch.Tensor:
        sizes.append(math.prod(shape))
        return empty(self, use, shape, *more)

    monkeypatch.setattr(scratch.Scratch, "empty", watched)
    return sizes


def watch_linears() -> AbstractContextManager[Any]:
    """A mock that sees the calls that groups of layers make to the kernels."""
    return mock.patch.object(lower, "linears", wraps=linears.linears)


def never_plain() -> AbstractContextManager[Any]:
    """The kernels' own backward pass for every call."""
    return mock.patch.object(linears, "_is_plain", lambda *_: False)


def write_pair(
    path: str | Path, B: torch.Tensor, A: torch.Tensor, scale: float = 1.0, name: str = "default",
    trained: dict[str, torch.Tensor] | None = None, **config: Any,
) -> None:
    """Write an adapter of one site, '0', of any dtype, scale and shape, for no model."""
    settings = LoRAConfig(rank=A.shape[0], targets=["0"], trainable=list(trained or ()), **config)
    adapter = Adapter(name, settings, {"0": Pair(A, B, scale)}, trained or {})
    table.write_adapter(adapter, path, None, None)
