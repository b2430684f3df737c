"""A base that torch.save wrote: mapped from the disk, and summed some rows at a time."""

import copy
import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._adapter.config import FLOATS
from .._errors import TiedWeightError
from .._kernels.private import storage_key
from .._kernels.scratch import Scratch
from .._storage.archive import Source, save_archive, storages_of
from .._storage.pickles import load_pickle
from .checkpoint import Checkpoint, Readable, TensorInfo, Ties
from .find import read_config
from .fold import summed_rows
from .jobs import Job, PreparedMerge, Sum
from .plan import Change, MergePlan, MergeRequest
from .safetensors_base import plan_file


def prepare_torch_file(path: Path, request: MergeRequest) -> PreparedMerge:
    """Return how a file of torch.save is merged; tied tensors stay so unless they are untied."""
    tensors = load_pickle(path, mapped=True)
    plan = plan_file(path, request, _checkpoint_of(path, tensors))
    _plan_shared_memory(path, tensors, plan, request.untie)
    new, sources, sums = _new_tensors(tensors, plan, request.dtype)
    size = sum(storage.nbytes() for storage in storages_of(new.values()).values())
    job = Job(path.name, size, functools.partial(save_archive, new, sources), path)
    return PreparedMerge([job], plan, len(tensors), sums)


def open_torch_file(path: Path) -> Readable:
    """Return what a file of torch.save holds."""
    tensors = load_pickle(path, mapped=True)

    def rows(name: str, shape: Sequence[int], start: int, length: int) -> Tensor:
        return tensors[name].detach().reshape(shape)[start:start + length]

    return Readable(_checkpoint_of(path, tensors), rows)


def _checkpoint_of(path: Path, tensors: Mapping[str, Tensor]) -> Checkpoint:
    def equal(first: str, second: str) -> bool:
        one, other = tensors[first], tensors[second]
        return one.dtype == other.dtype and torch.equal(one, other)

    known = {}
    for name, tensor in tensors.items():
        known[name] = TensorInfo(tuple(tensor.shape), tensor.dtype)
    config = read_config(path.parent)
    ties = None if config is None else Ties.of(config)
    return Checkpoint(f"'{path}'", known, equal, ties, config)


def _new_tensors(
    tensors: dict[str, Tensor], plan: MergePlan, dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], dict[int, Source], list[Sum]]:
    """The content of the new file, what fills the storages of tensors that change, and its sums."""
    new = copy.copy(tensors)  # with the versions of modules that a state_dict has
    sources: dict[int, Source] = {}
    sums: list[Sum] = []
    scratches = itertools.cycle((Scratch(), Scratch()))
    # by the old tensor and what becomes of it, so that what was tied stays so
    results: dict[Any, Tensor] = {}
    for name, tensor in tensors.items():
        change = plan.changes.get(name)
        to = dtype if dtype is not None and tensor.dtype in FLOATS else tensor.dtype
        if change is None and to == tensor.dtype:
            continue
        key = *_bytes_of(tensor), tensor.shape, tensor.stride(), id(change)
        if key not in results:
            results[key] = torch.empty(tensor.shape, dtype=to)  # memory that is never touched
            read = functools.partial(_rows, tensor.detach())
            rows = functools.partial(
                summed_rows, read, tensor.shape, change or Change(), to, name, scratches)
            sources[storage_key(results[key].untyped_storage())] = rows
            if change is not None and change.losses is not None:
                sums.append(Sum(change.losses, rows))
        new[name] = results[key]
    return new, sources, sums


def _rows(
    tensor: Tensor, scratch: Scratch, shape: Sequence[int], start: int, length: int
) -> Tensor:
    """Rows of a tensor that is in memory or mapped there, which needs no scratch."""
    return tensor.view(shape).narrow(0, start, min(length, shape[0] - start))


def _plan_shared_memory(
    path: Path, tensors: Mapping[str, Tensor], plan: MergePlan, untie: bool
) -> None:
    """Let what was trained replace a tensor under all of its names; refuse other shared memory."""
    for key, change in list(plan.changes.items()):
        storage, first, last = _bytes_of(tensors[key])
        for name, tensor in tensors.items():
            other, begin, end = _bytes_of(tensor)
            if name == key or other != storage or begin >= last or first >= end:
                continue
            whole = (begin, end, tensor.shape) == (first, last, tensors[key].shape)
            if whole and not change.addends and not change.untied:
                plan.changes[name] = change
            elif not untie:
                raise TiedWeightError(
                    f"'{key}' of '{path}' is tied to '{name}', so that folding an adapter into it "
                    "would change that too: --untie gives it a tensor of its own.")


def _bytes_of(tensor: Tensor) -> tuple[Any, int, int]:
    """A tensor's storage, and where its bytes in it begin and end."""
    size = tensor.element_size()
    first = int(tensor.storage_offset()) * size
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride()))
    end = first + (last + 1) * size if tensor.numel() else first
    return storage_key(tensor.untyped_storage()), first, end
