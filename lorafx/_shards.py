"""The new file of a shard of safetensors: read, summed and written some rows at a time, the rest of it copied."""

import contextlib
import dataclasses
import functools
import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ._checkpoint import (DTYPES, NAMES, Entry, Moved, Shard, copy_bytes, header_bytes, nbytes, octets, read_rows,
                          write_all)
from ._errors import ConfigError
from ._jobs import Job, copy_job
from ._locate import Change, Plan
from ._merge import folded, rows_at_a_time
from ._weight import rows_of, wide_dtype

_BLOCKS = 2  # of those that `folded` sums at a time, this many are read and written at a time


def summed(matrix: Tensor, change: Change, dtype: torch.dtype, name: str) -> Tensor:
    """W + sum s L R in this dtype, rounded once; W is `matrix`, (..., m, n), or what was trained in its place."""
    source = matrix if change.trained is None else change.trained.cpu()
    if dtype == matrix.dtype:
        source = source.to(dtype)  # as when an adapter is loaded
        total = folded(source, change.parts) if change.parts else source.contiguous()
    elif not change.parts:
        total = source.to(dtype).contiguous()
    else:
        total = torch.empty(source.shape, dtype=dtype)
        wide, length = wide_dtype(source, change.parts), rows_at_a_time(source.shape)
        for start in range(0, source.shape[-2], length):
            rows, target = (tensor[..., start:start + length, :] for tensor in (source, total))
            target.copy_(folded(rows.to(wide), rows_of(change.parts, start, rows.shape[-2])))
    if dtype == torch.float16 and not total.isfinite().all() and source.isfinite().all():
        raise ConfigError(f"'{name}' exceeds float16's 65504: write another --dtype, such as bfloat16.")
    return total


@dataclasses.dataclass(frozen=True)
class Output:
    """One tensor of a new file: from which it is made, and what becomes of that."""

    name: str
    entry: Entry
    dtype: str
    change: Change | None

    @property
    def as_it_is(self) -> bool:
        return self.change is None and self.dtype == self.entry.dtype

    @property
    def size(self) -> int:
        return self.entry.size if self.as_it_is else nbytes(self.entry.shape, DTYPES[self.dtype])


def outputs_of(shard: Shard, made: Plan, dtype: torch.dtype | None) -> list[Output]:
    """The tensors of a shard's new file, in the order of the old one's."""
    def output(name: str, entry: Entry) -> Output:
        cast = dtype is not None and entry.dtype in ("F64", "F32", "F16", "BF16")
        return Output(name, entry, NAMES[dtype] if cast and dtype is not None else entry.dtype, made.changes.get(name))

    found = [output(name, entry) for name, entry in shard.entries.items()]
    added = [output(name, shard.entries[source]) for name, source in made.new.items() if source in shard.entries]
    if added or any(one.dtype != one.entry.dtype for one in found):  # readers want tensors aligned to their elements
        return sorted(found + added, key=lambda one: -DTYPES[one.dtype].itemsize if one.dtype in DTYPES else 0)
    return found


def _write_shard(
    shard: Shard, header: bytes, outputs: Sequence[Output], file: io.BufferedWriter, moved: Moved
) -> None:
    """The new file of a shard; some rows and their sum are in memory at a time, and what does not change is copied."""
    write_all(file, memoryview(header), moved)
    with open(shard.path, "rb") as source, open(shard.path, "rb") as copied, _behind() as behind:
        for one in outputs:
            if one.as_it_is:
                behind(copy_bytes, copied, file, shard.start + one.entry.begin, one.size, moved)
                continue
            for rows, change in _blocks(source, shard, one.entry, one.change or Change()):
                behind(write_all, file, octets(summed(rows, change, DTYPES[one.dtype], one.name)), moved)


@contextlib.contextmanager
def _behind() -> Iterator[Callable[..., None]]:
    """Calls are made in another thread, in their order, and each is waited for before the next is given."""
    with ThreadPoolExecutor(1) as pool:
        under_way: list[Future[Any]] = [pool.submit(int)]

        def behind(call: Callable[..., None], *arguments: Any) -> None:
            under_way.pop().result()
            under_way.append(pool.submit(call, *arguments))

        yield behind
        under_way.pop().result()


def _blocks(file: io.BufferedReader, shard: Shard, entry: Entry, change: Change) -> Iterator[tuple[Tensor, Change]]:
    """Some rows of a matrix at a time, and what becomes of them: those that lorafx.merge sums at a time, or multiples.

    So the bits are the same. Any other tensor is read as a whole, as the rows of a stack lie apart in the file.
    """
    if len(entry.shape) != 2:
        yield read_rows(file, shard, entry, (1, *entry.shape), 0, 1)[0], change
        return
    height, length = entry.shape[0], _BLOCKS * rows_at_a_time(entry.shape)
    for start in range(0, height, length):
        yield (read_rows(file, shard, entry, entry.shape, start, length),
               change.rows(start, min(length, height - start)))


def shard_job(shard: Shard, name: str, made: Plan, dtype: torch.dtype | None) -> Job:
    """The new file of a shard, with this name in its folder; a copy where nothing changes."""
    outputs = outputs_of(shard, made, dtype)
    if all(one.as_it_is for one in outputs):
        return copy_job(shard.path, name)
    header = header_bytes(((one.name, one.dtype, one.entry.shape, one.size) for one in outputs), shard.metadata)
    size = len(header) + sum(one.size for one in outputs)
    return Job(name, size, functools.partial(_write_shard, shard, header, outputs), shard.path)
