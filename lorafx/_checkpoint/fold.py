"""The new file of a shard of safetensors: read, summed and written some rows at a time, the rest of it copied."""

import dataclasses
import functools
import io
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .._adapter.adapter import all_finite
from .._errors import ConfigError
from .._kernels.scratch import Scratch
from .._kernels.weights import folded, rows_at_a_time
from .._storage.safetensors_files import DTYPES, NAMES, Shard, ShardEntry, header_bytes, read_rows
from .._storage.streams import Moved, copy_bytes, nbytes, one_behind, tensor_bytes, write_all
from .jobs import Job, copy_job
from .plan import Change, MergePlan


Read = Callable[[Scratch, Sequence[int], int, int], Tensor]  # of a tensor in a shape, so many rows from one on
_BLOCKS = 2  # of those that `folded` sums at a time, this many are read and written at a time


def summed(matrix: Tensor, change: Change, dtype: torch.dtype, name: str, scratch: Scratch) -> Tensor:
    """W + sum s L R in this dtype, rounded once, in scratch memory.

    W is `matrix`, (..., m, n), or what was trained in its place.
    """
    source = matrix if change.trained is None else change.trained.cpu()
    if dtype == matrix.dtype:
        source = source.to(dtype)  # as when an adapter is loaded
    total = scratch.empty("sum", matrix.shape, dtype)
    if change.parts:
        folded(source, change.parts, scratch, total)
    else:
        total.copy_(source)
    if dtype == torch.float16 and not all_finite(total) and all_finite(source):
        raise ConfigError(f"'{name}' exceeds float16's 65504: write another --dtype, such as bfloat16.")
    return total


@dataclasses.dataclass(frozen=True)
class Output:
    """One tensor of a new file: from which it is made, and what becomes of that."""

    name: str
    entry: ShardEntry
    dtype: str
    change: Change | None

    @property
    def as_it_is(self) -> bool:
        return self.change is None and self.dtype == self.entry.dtype

    @property
    def size(self) -> int:
        return self.entry.size if self.as_it_is else nbytes(self.entry.shape, DTYPES[self.dtype])


def outputs_of(shard: Shard, made: MergePlan, dtype: torch.dtype | None) -> list[Output]:
    """The tensors of a shard's new file, in the order of the old one's."""
    def output(name: str, entry: ShardEntry) -> Output:
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
    turns = itertools.cycle((Scratch(), Scratch()))  # of which one is written while the other is summed
    with open(shard.path, "rb") as source, open(shard.path, "rb") as copied, one_behind() as behind:
        for one in outputs:
            if one.as_it_is:
                behind(copy_bytes, copied, file, shard.start + one.entry.begin, one.size, moved)
                continue
            read = functools.partial(read_rows, source, shard, one.entry)
            change = one.change or Change()
            for rows in summed_rows(read, one.entry.shape, change, DTYPES[one.dtype], one.name, turns):
                behind(write_all, file, tensor_bytes(rows), moved)


def summed_rows(read: Read, shape: Sequence[int], change: Change, dtype: torch.dtype, name: str,
                turns: Iterator[Scratch]) -> Iterator[Tensor]:
    """What becomes of a tensor of this shape, some rows of a matrix at a time, each on memory that has its turn.

    They are those that lorafx.merge sums at a time, or multiples, so that the bits are the same. Any other tensor is
    read as a whole, as the rows of a stack lie apart in a file.
    """
    if len(shape) != 2:
        scratch = Scratch()
        yield summed(read(scratch, (1, *shape), 0, 1)[0], change, dtype, name, scratch)
        return
    height, length = shape[0], _BLOCKS * rows_at_a_time(shape)
    for start in range(0, height, length):
        scratch, some = next(turns), change.rows(start, min(length, height - start))
        yield summed(read(scratch, shape, start, length), some, dtype, name, scratch)


def shard_job(shard: Shard, name: str, made: MergePlan, dtype: torch.dtype | None) -> Job:
    """The new file of a shard, with this name in its folder; a copy where nothing changes."""
    outputs = outputs_of(shard, made, dtype)
    if all(one.as_it_is for one in outputs):
        return copy_job(shard.path, name)
    header = header_bytes(((one.name, one.dtype, one.entry.shape, one.size) for one in outputs), shard.metadata)
    size = len(header) + sum(one.size for one in outputs)
    return Job(name, size, functools.partial(_write_shard, shard, header, outputs), shard.path)
