"""A base that is one safetensors file."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .._errors import TiedWeightError
from .._kernels.scratch import Scratch
from .._storage.safetensors_files import (
    DTYPES, SafetensorsFile, open_safetensors, read_rows, same_bytes)
from .checkpoint import Checkpoint, Readable, TensorInfo, Ties
from .find import MODEL_CONFIG, read_config
from .fold import safetensors_job, sums_of
from .jobs import PreparedMerge
from .plan import MergePlan, MergeRequest, plan_merge


def prepare_safetensors(path: Path, request: MergeRequest) -> PreparedMerge:
    """Return how a safetensors file is merged; the config beside it, if any, says what is tied."""
    file = open_safetensors(path)
    plan = plan_file(path, request, checkpoint_of(path, [file], read_config(path.parent)))
    job = safetensors_job(file, path.name, plan, request.dtype)
    sums = list(sums_of(file, plan, request.dtype))
    return PreparedMerge([job], plan, len(file.entries), sums)


def open_base(path: Path) -> Readable:
    """Return what a safetensors file holds."""
    file = open_safetensors(path)
    return readable(path, [file], read_config(path.parent))


def readable(
    path: Path, files: Sequence[SafetensorsFile], config: Mapping[str, Any] | None
) -> Readable:
    """Return what files hold, of a path with this config, and how it is read."""
    places = {name: file for file in files for name in file.entries}
    scratch = Scratch()

    def rows(name: str, shape: Sequence[int], start: int, length: int) -> Tensor:
        file = places[name]
        with open(file.path, "rb") as opened:
            return read_rows(opened, file.entries[name], scratch, shape, start, length)

    return Readable(checkpoint_of(path, files, config), rows)


def checkpoint_of(
    path: Path, files: Sequence[SafetensorsFile], config: Mapping[str, Any] | None
) -> Checkpoint:
    """Return what files hold, of a path with this config."""
    tensors = {}
    for file in files:
        for name, entry in file.entries.items():
            tensors[name] = TensorInfo(entry.shape, DTYPES.get(entry.dtype))
    ties = None if config is None else Ties.of(config)
    return Checkpoint(f"'{path}'", tensors, functools.partial(same_bytes, files), ties, config)


def plan_file(path: Path, request: MergeRequest, checkpoint: Checkpoint) -> MergePlan:
    """Return the plan for a file by itself, beside which no config can change to untie a weight."""
    plan = plan_merge(request, checkpoint)
    if plan.unties:
        raise TiedWeightError(
            f"'{path.parent / MODEL_CONFIG}' says that an adapted weight of '{path}' is tied, and "
            f"would tie it again: merge the folder '{path.parent}', so that its config can say "
            "otherwise.")
    return plan
