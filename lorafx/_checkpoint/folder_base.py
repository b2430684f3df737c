"""A base that is a Hugging Face folder: its shards are merged, and its config and index follow."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from .._errors import FormatError
from .._storage.json_files import read_json
from .._storage.safetensors_files import SafetensorsFile
from .checkpoint import Readable
from .find import INDEX, MODEL_CONFIG, read_config, shards_of
from .fold import outputs_of, safetensors_job, sums_of
from .jobs import PreparedMerge, copy_job, files_in, json_job
from .plan import MergePlan, MergeRequest, plan_merge
from .safetensors_base import checkpoint_of, readable


def prepare_folder(base: Path, request: MergeRequest) -> PreparedMerge:
    """Return how a folder is merged, shards first; other files are carried along."""
    shards, config, dtype = shards_of(base), read_config(base), request.dtype
    _check_dense(base, config)
    plan = plan_merge(request, checkpoint_of(base, shards, config))
    jobs = {}
    for shard in shards:
        name = shard.path.relative_to(base).as_posix()
        jobs[name] = safetensors_job(shard, name, plan, dtype)
    if config is not None and (plan.unties or dtype is not None):
        content = _new_config(config, plan.unties, dtype)
        jobs[MODEL_CONFIG] = json_job(base / MODEL_CONFIG, MODEL_CONFIG, content)
    if (base / INDEX).is_file() and (plan.new or dtype is not None):
        jobs[INDEX] = json_job(base / INDEX, INDEX, _new_index(base, shards, plan, dtype))
    for name, path in files_in(base):
        if name not in jobs:
            jobs[name] = copy_job(path, name)
    tensors = sum(len(shard.entries) for shard in shards)
    sums = [each for shard in shards for each in sums_of(shard, plan, dtype)]
    return PreparedMerge(list(jobs.values()), plan, tensors, sums)


def open_folder(base: Path) -> Readable:
    """Return what a folder holds."""
    shards, config = shards_of(base), read_config(base)
    _check_dense(base, config)
    return readable(base, shards, config)


def _check_dense(base: Path, config: Mapping[str, Any] | None) -> None:
    """Raise if the weights of a folder are quantised, as its config says."""
    configs = [config, *config.values()] if config else []
    for found in configs:
        if isinstance(found, dict) and found.get("quantization_config"):
            way = dict(found["quantization_config"]).get("quant_method", "quantised")
            raise FormatError(
                f"The weights in '{base}' are stored quantised ({way}, says its {MODEL_CONFIG}), "
                "and nothing can be folded into them on a disk: name the checkpoint that they were "
                "made from, or load the model and use lorafx.merge.")


def _new_config(
    config: Mapping[str, Any], unties: bool, dtype: torch.dtype | None
) -> dict[str, Any]:
    """The content of config.json, with weights no longer tied and the new dtype."""
    new = _changed_values(config, unties, dtype)
    if unties:
        new["tie_word_embeddings"] = False
    return new


def _changed_values(
    config: Mapping[str, Any], unties: bool, dtype: torch.dtype | None
) -> dict[str, Any]:
    """The values of a config, and of those nested in it."""
    new: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            value = _changed_values(value, unties, dtype)
        elif key == "tie_word_embeddings" and unties:
            value = False
        elif key in ("dtype", "torch_dtype") and dtype is not None and isinstance(value, str):
            value = str(dtype).removeprefix("torch.")
        new[key] = value
    return new


def _new_index(
    base: Path, shards: Iterable[SafetensorsFile], plan: MergePlan, dtype: torch.dtype | None
) -> dict[str, Any]:
    """The content of the index, with new tensors and sizes."""
    index = read_json(base / INDEX)
    weight_map = dict(index["weight_map"])
    for name, source in plan.new.items():
        weight_map[name] = weight_map[source]
    size = added = 0
    for shard in shards:
        size += sum(output.size for output in outputs_of(shard, plan, dtype))
        for source in plan.new.values():
            if source in shard.entries:
                added += math.prod(shard.entries[source].shape)
    metadata = index.get("metadata")
    if isinstance(metadata, dict):
        metadata = dict(metadata)
        if "total_size" in metadata:
            metadata["total_size"] = size
        if type(metadata.get("total_parameters")) is int:
            metadata["total_parameters"] += added
        index["metadata"] = metadata
    return {**index, "weight_map": weight_map}
