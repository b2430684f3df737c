"""Folds adapters into a checkpoint on a disk, W + sum w s B A, one tensor in memory at a time, as lorafx.merge would.

A file is written as it is read, and a folder file by file.
"""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._adapter.config import FLOATS
from .._errors import FormatError, TiedWeightError
from .._kernels.scratch import Scratch
from .._storage.archive import storages_of
from .._storage.archive import save as save_archive
from .._storage.json_files import read_json
from .._storage.pickles import open_pickle
from .._storage.safetensors_files import DTYPES, Shard, open_shard, same_bytes
from .._storage.streams import tensor_bytes
from .find import CONFIG, INDEX, shards_of
from .fold import outputs_of, shard_job, summed_rows
from .jobs import Job, copy_job, files_in, json_job
from .layout import TensorInfo, WeightedAdapter
from .plan import Change, Checkpoint, MergePlan, Ties, plan_merge
from .write import check_kept, check_paths, run


OUT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Merged:
    """What a merge wrote: files and bytes, in seconds, and how many of how many tensors the adapters changed."""

    files: int
    bytes: int
    seconds: float
    changed: int
    tensors: int


def merge_checkpoint(base: Path, adapters: Sequence[WeightedAdapter], out: Path, *, dtype: torch.dtype | None = None, untie: bool = False,
          force: bool = False, inputs: Sequence[Path] = (), threads: int = 1, progress: bool = False) -> Merged:
    """Write to `out` what the checkpoint `base` is with the adapters folded in, whole or not at all.

    Each sum is computed in float32 or wider and rounded once, to `dtype` if given; it then applies to all tensors of
    float64, float32, float16 and bfloat16. Other files of a folder are carried along; one that holds its weights a
    second time is an error. Files have the permissions of those that they are made from.

    Args:
        base: a .safetensors, .pth or .pt file, or a folder with model.safetensors or its shards and their index.
        untie: give an adapted weight that another name shares a tensor of its own.
        force: replace a checkpoint that is at `out`, unless `out` is a link or something that is read is in it.
        inputs: the adapters' paths, which `out` must not replace.
        threads: how many compute. The bits are those of lorafx.merge with as many (torch.set_num_threads): of some very
            wide matrices torch's products differ in the last bit of a few entries with their number.
        progress: whether to show a bar on stderr.

    Raises:
        FormatError, MismatchError, TiedWeightError, ConfigError: `out` is as it was. OSError: as the system says.
    """
    began = time.monotonic()
    check_paths(base, out, inputs, force)
    before = _states(base)
    with _threads(threads):
        jobs, made, total = _jobs(base, adapters, dtype, untie)
        check_kept([job.source for job in jobs], out)
        check_kept([file for path in inputs if path.is_dir() for file in path.iterdir() if file.is_file()], out)
        run(jobs, out, _merge_identity(base, jobs, before, adapters, dtype, untie), functools.partial(
            _check_unchanged, base, before), base.is_dir(), force, progress)
    return Merged(len(jobs), sum(job.size for job in jobs), time.monotonic() - began, len(made.changes), total)


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    """This many threads compute; more than one wait, spinning, where others read and write."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _jobs(base: Path, adapters: Sequence[WeightedAdapter], dtype: torch.dtype | None,
          untie: bool) -> tuple[list[Job], MergePlan, int]:
    """The files to write, what changes in them, and how many tensors there are."""
    if base.is_dir():
        return _folder(base, adapters, dtype, untie)
    way = {".safetensors": _safetensors, ".pth": _pickle, ".pt": _pickle}[base.suffix.lower()]
    job, made, total = way(base, adapters, dtype, untie)
    return [job], made, total


# Files.

def _config(folder: Path) -> dict[str, Any] | None:
    """What the config in a folder says, if there is one."""
    return read_json(folder / CONFIG) if (folder / CONFIG).is_file() else None


def _ties(config: Mapping[str, Any] | None) -> Ties | None:
    return None if config is None else Ties.of(config)


def _checkpoint(path: Path, shards: Sequence[Shard], config: Mapping[str, Any] | None) -> Checkpoint:
    """What shards hold, of a path with this config."""
    held = {name: TensorInfo(entry.shape, DTYPES.get(entry.dtype))
            for shard in shards for name, entry in shard.entries.items()}
    return Checkpoint(f"'{path}'", held, functools.partial(same_bytes, shards), _ties(config))


def _safetensors(path: Path, adapters: Sequence[WeightedAdapter], dtype: torch.dtype | None,
                 untie: bool) -> tuple[Job, MergePlan, int]:
    shard = open_shard(path)
    made = _plan_file(path, adapters, _checkpoint(path, [shard], _config(path.parent)), untie)
    return shard_job(shard, path.name, made, dtype), made, len(shard.entries)


def _plan_file(path: Path, adapters: Sequence[WeightedAdapter], checkpoint: Checkpoint, untie: bool) -> MergePlan:
    """The plan for a file by itself; of what the config beside it says is tied, nothing can be untied."""
    made = plan_merge(adapters, checkpoint, untie)
    if made.unties:
        raise TiedWeightError(f"'{path.parent / CONFIG}' says that an adapted weight of '{path}' is tied, and would "
                              f"tie it again: merge the folder '{path.parent}', so that its config can say otherwise.")
    return made


# What torch.save wrote.

def _pickle(path: Path, adapters: Sequence[WeightedAdapter], dtype: torch.dtype | None, untie: bool) -> tuple[Job, MergePlan, int]:
    """What torch.save wrote is read from the disk where it is needed, and summed some rows at a time."""
    tensors = open_pickle(path)
    held = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    equal = functools.partial(_same_values, tensors)
    made = _plan_file(path, adapters, Checkpoint(f"'{path}'", held, equal, _ties(_config(path.parent))), untie)
    _plan_ties(path, tensors, made, untie)
    new, sources = copy.copy(tensors), {}  # with the versions of modules that a state_dict has
    turns = itertools.cycle((Scratch(), Scratch()))
    fresh: dict[Any, Tensor] = {}  # by the old tensor and what becomes of it, so that what was tied stays so
    for name, tensor in tensors.items():
        change = made.changes.get(name)
        to = dtype if dtype is not None and tensor.dtype in FLOATS else tensor.dtype
        if change is not None or to != tensor.dtype:
            key = *_bytes_of(tensor), tensor.shape, tensor.stride(), id(change)
            if key not in fresh:
                fresh[key] = torch.empty(tensor.shape, dtype=to)  # memory that is never touched
                sources[fresh[key].untyped_storage()._cdata] = functools.partial(
                    summed_rows, functools.partial(_rows, tensor.detach()), tensor.shape, change or Change(), to, name,
                    turns)
            new[name] = fresh[key]
    size = sum(storage.nbytes() for storage in storages_of(new.values()).values())
    return Job(path.name, size, functools.partial(save_archive, new, sources), path), made, len(tensors)


def _same_values(tensors: Mapping[str, Tensor], first: str, second: str) -> bool:
    one, other = tensors[first], tensors[second]
    return one.dtype == other.dtype and torch.equal(one, other)


def _rows(tensor: Tensor, scratch: Scratch, shape: Sequence[int], start: int, length: int) -> Tensor:
    """Rows of a tensor in memory, or that is mapped there from a file, which takes no other memory."""
    return tensor.view(shape).narrow(0, start, min(length, shape[0] - start))


def _plan_ties(path: Path, tensors: Mapping[str, Tensor], made: MergePlan, untie: bool) -> None:
    """Let what was trained whole replace a tensor under all of its names; refuse other changes of shared memory."""
    for key, change in list(made.changes.items()):
        storage, first, last = _bytes_of(tensors[key])
        for name, tensor in tensors.items():
            other, begin, end = _bytes_of(tensor)
            if name == key or other != storage or begin >= last or first >= end:
                continue
            whole = (begin, end, tensor.shape) == (first, last, tensors[key].shape)
            if whole and not change.parts and not change.untied:
                made.changes[name] = change
            elif not untie:
                raise TiedWeightError(f"'{key}' of '{path}' is tied to '{name}', so that folding an adapter into it "
                                      "would change that too: --untie gives it a tensor of its own.")


def _bytes_of(tensor: Tensor) -> tuple[Any, int, int]:
    """A tensor's storage, and where its bytes in it begin and end."""
    size = tensor.element_size()
    first = int(tensor.storage_offset()) * size
    length = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride())) + 1
    return tensor.untyped_storage()._cdata, first, first + (length * size if tensor.numel() else 0)


# Folders.

def _folder(base: Path, adapters: Sequence[WeightedAdapter], dtype: torch.dtype | None,
            untie: bool) -> tuple[list[Job], MergePlan, int]:
    """All files of the new folder, shards first."""
    shards = shards_of(base)
    config = _config(base)
    made = plan_merge(adapters, _checkpoint(base, shards, config), untie)
    jobs = {shard.path.relative_to(base).as_posix(): shard for shard in shards}
    found = [shard_job(shard, name, made, dtype) for name, shard in jobs.items()]
    if config is not None and (made.unties or dtype is not None):
        found.append(json_job(base / CONFIG, CONFIG, _new_config(config, made.unties, dtype)))
    if (base / INDEX).is_file() and (made.new or dtype is not None):
        found.append(json_job(base / INDEX, INDEX, _new_index(base, shards, made, dtype)))
    written = {job.name for job in found}
    found += [copy_job(path, name) for name, path in files_in(base) if name not in written]
    return found, made, sum(len(shard.entries) for shard in shards)


def _new_config(config: Mapping[str, Any], unties: bool, dtype: torch.dtype | None) -> dict[str, Any]:
    """The content of config.json, its nested configs too, with weights no longer tied and the new dtype."""
    def changed(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: changed(name, inner) for name, inner in value.items()}
        if key == "tie_word_embeddings" and unties:
            return False
        if key in ("dtype", "torch_dtype") and dtype is not None and isinstance(value, str):
            return str(dtype).removeprefix("torch.")
        return value

    new: dict[str, Any] = changed("", dict(config))
    return {**new, "tie_word_embeddings": False} if unties else new


def _new_index(base: Path, shards: Iterable[Shard], made: MergePlan, dtype: torch.dtype | None) -> dict[str, Any]:
    """The content of the index, with new tensors and sizes."""
    index = read_json(base / INDEX)
    places = dict(index["weight_map"])
    places |= {name: places[source] for name, source in made.new.items()}
    size = sum(one.size for shard in shards for one in outputs_of(shard, made, dtype))
    count = sum(math.prod(shard.entries[source].shape) for shard in shards for source in made.new.values()
                if source in shard.entries)
    metadata = index.get("metadata")
    if isinstance(metadata, dict):
        totals = {"total_size": size}
        if type(metadata.get("total_parameters")) is int:
            totals["total_parameters"] = metadata["total_parameters"] + count
        index["metadata"] = {key: totals.get(key, value) for key, value in metadata.items()}
    return {**index, "weight_map": places}


def _states(base: Path) -> dict[str, list[int]]:
    """What tells of each file of a checkpoint that it has changed: its size, its inode and the times of its changes.

    One of these times cannot be set. The files are not hashed, as that takes as long as merging.
    """
    paths = [path for _, path in files_in(base)] if base.is_dir() else [base, base.parent / CONFIG]
    return {str(path.resolve()): [(stat := path.stat()).st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
            for path in paths if path.is_file()}


def _check_unchanged(base: Path, before: Mapping[str, list[int]]) -> None:
    """Raise FormatError if a file of a checkpoint is not what it was."""
    now = _states(base)
    changed = sorted(path for path in before.keys() | now.keys() if before.get(path) != now.get(path))
    if changed:
        raise FormatError(f"'{changed[0]}' changed while '{base}' was merged: run the same command again.")


def _merge_identity(base: Path, jobs: Sequence[Job], files: Mapping[str, list[int]], adapters: Sequence[WeightedAdapter],
                 dtype: torch.dtype | None, untie: bool) -> dict[str, Any]:
    """What a merge depends on: if an interrupted one depended on anything else, it starts over."""
    return {"version": 3, "torch": torch.__version__, "threads": torch.get_num_threads(), "base": str(base.resolve()),
            "jobs": [[job.name, job.size] for job in jobs], "files": files,
            "adapters": [[adapter_digest(weighed), weighed.weight] for weighed in adapters], "dtype": str(dtype),
            "untie": untie}


def adapter_digest(weighed: WeightedAdapter) -> str:
    """A hash of all that an adapter adds."""
    found = hashlib.sha256(repr(sorted(weighed.adapter.stored.items())).encode())
    scales = {site: pair.scale for site, pair in weighed.adapter.pairs.items()}
    found.update(f"{weighed.adapter.config.dtype} {scales}".encode())
    for name, tensor in weighed.adapter.tensors():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor_bytes(tensor.detach().cpu().contiguous()))
    return found.hexdigest()
