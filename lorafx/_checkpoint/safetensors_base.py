"""A base that is one safetensors file."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._errors import TiedWeightError
from .._storage.safetensors_files import DTYPES, SafetensorsFile, open_safetensors, same_bytes
from .checkpoint import Checkpoint, TensorInfo, Ties
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
