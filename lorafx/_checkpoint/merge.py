"""Folds adapters into a checkpoint on a disk, W + sum w s B A, to the bits of lorafx.merge.

One tensor is in memory at a time: a file is written as it is read, and a folder file by file.
"""

import contextlib
import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .._adapter.conversions import ConversionTable
from .._adapter.losses import check_errors
from .._errors import FormatError
from .._storage.streams import tensor_bytes
from .find import MODEL_CONFIG
from .jobs import Job, files_in
from .kinds import kind_of
from .layout import WeightedAdapter
from .paths import check_kept, check_paths
from .plan import MergeRequest
from .write import write_checkpoint


@dataclass(frozen=True)
class MergeReport:
    """What a merge wrote: files and bytes, in seconds; how many of its tensors are changed.

    `errors` is what rounding lost, {site: |written - (W + D)| / |D|}.
    """

    files: int
    bytes: int
    seconds: float
    changed: int
    tensors: int
    errors: Mapping[str, float]


def merge_checkpoint(
    base: Path, adapters: Sequence[WeightedAdapter], out: Path, *, dtype: torch.dtype | None = None,
    untie: bool = False, force: bool = False, inputs: Sequence[Path] = (), threads: int = 1,
    progress: bool = False, max_error: float | None = None,
    table: Callable[[Mapping[str, Any]], ConversionTable | None] | None = None,
) -> MergeReport:
    """Write to `out` the checkpoint `base` with the adapters folded in, whole or not at all.

    Each sum is computed in float32 or wider and rounded once, to `dtype` if given; it then applies
    to all tensors of float64, float32, float16 and bfloat16. Other files of a folder are carried
    along; one that holds its weights a second time is an error. Files have the permissions of those
    that they are made from.

    Args:
        base: a .safetensors, .pth or .pt file, or a folder with model.safetensors or its shards and
            their index.
        untie: give an adapted weight that another name shares a tensor of its own.
        force: replace a checkpoint that is at `out`, unless `out` is a link or something that is
            read is in it.
        inputs: the adapters' paths, which `out` must not replace.
        threads: how many compute. The bits are those of lorafx.merge with as many
            (torch.set_num_threads): of some very wide matrices torch's products differ in the last
            bit of a few entries with their number.
        progress: show on stderr how much is written.
        max_error: the largest error of a site that is accepted, as in `MergeReport`; None: any.
        table: gives transformers' conversions of the tensors of a model with this config.json, for
            adapters that name them as they are or were in the model.

    Raises:
        FormatError, MismatchError, TiedWeightError, ConfigError, AdaptedWeightError (an error
            exceeds `max_error`): `out` is as it was. OSError: as the system says.
    """
    began = time.monotonic()
    check_paths(base, out, inputs, force)
    before, request = _file_states(base), MergeRequest(adapters, dtype, untie, table)
    with _threads(threads):
        merge = kind_of(base).prepare(base, request)
        check_kept([job.source for job in merge.jobs], out)
        for path in inputs:
            if path.is_dir():
                check_kept([file for file in path.iterdir() if file.is_file()], out)
        if max_error is not None:
            check_errors(merge.errors(), max_error)
        write_checkpoint(
            merge.jobs, out, _identity(base, merge.jobs, before, request),
            functools.partial(_check_unchanged, base, before),
            folder=base.is_dir(), force=force, progress=progress)
        errors = merge.errors()
    size, seconds = sum(job.size for job in merge.jobs), time.monotonic() - began
    return MergeReport(
        len(merge.jobs), size, seconds, len(merge.plan.changes), merge.tensors, errors)


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    """This many threads compute; more than one wait, spinning, where others read and write."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _file_states(base: Path) -> dict[str, list[int]]:
    """What tells of each file of a checkpoint that it has changed: size, inode, times of changes.

    One of these times cannot be set. Files are not hashed, as that takes as long as merging.
    """
    if base.is_dir():
        paths = [path for _, path in files_in(base)]
    else:
        paths = [base, base.parent / MODEL_CONFIG]
    states = {}
    for path in paths:
        if path.is_file():
            stat = path.stat()
            times = [stat.st_mtime_ns, stat.st_ctime_ns]
            states[str(path.resolve())] = [stat.st_size, stat.st_ino, *times]
    return states


def _check_unchanged(base: Path, before: Mapping[str, list[int]]) -> None:
    """Raise FormatError if a file of a checkpoint is not what it was."""
    now = _file_states(base)
    for path in sorted(before.keys() | now.keys()):
        if before.get(path) != now.get(path):
            raise FormatError(
                f"'{path}' changed while '{base}' was merged: run the same command again.")


def _identity(
    base: Path, jobs: Sequence[Job], files: Mapping[str, list[int]], request: MergeRequest
) -> dict[str, Any]:
    """What a merge depends on: if an interrupted one depended on anything else, it starts over."""
    adapters = [[_adapter_digest(weighted), weighted.weight] for weighted in request.adapters]
    return {"version": 3, "torch": torch.__version__, "threads": torch.get_num_threads(),
            "base": str(base.resolve()), "jobs": [[job.name, job.size] for job in jobs],
            "files": files, "adapters": adapters, "dtype": str(request.dtype),
            "untie": request.untie}


def _adapter_digest(weighted: WeightedAdapter) -> str:
    """A hash of all that an adapter adds."""
    adapter = weighted.adapter
    scales = {site: pair.scale for site, pair in adapter.pairs.items()}
    digest = hashlib.sha256(repr(sorted(adapter.stored.items())).encode())
    digest.update(f"{adapter.config.dtype} {scales}".encode())
    for name, tensor in adapter.tensors():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor_bytes(tensor.detach().cpu().contiguous()))
    return digest.hexdigest()
