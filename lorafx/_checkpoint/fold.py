"""W + sum s L R in a safetensors file, some rows in memory at a time; the rest of it is copied."""

import functools
import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._adapter.adapter import all_finite
from .._errors import ConfigError
from .._kernels.scratch import Scratch
from .._kernels.weights import folded, rows_at_a_time
from .._storage.safetensors_files import (
    DTYPES, NAMES, Entry, SafetensorsFile, header_bytes, read_rows)
from .._storage.streams import Advance, copy_bytes, nbytes, one_behind, tensor_bytes, write_all
from .jobs import Job, Sum, copy_job
from .plan import Change, MergePlan


# Reads a tensor in a shape, so many rows from one on.
ReadRows = Callable[[Scratch, Sequence[int], int, int], Tensor]
_BLOCKS = 16  # of those that `folded` sums at a time, this many are read and written at a time
_CAST = ("F64", "F32", "F16", "BF16")  # what another dtype is written for


def summed(
    matrix: Tensor, change: Change, dtype: torch.dtype, name: str, scratch: Scratch
) -> Tensor:
    """Return W + sum s L R in this dtype, rounded once, in scratch memory.

    W is `matrix`, (..., m, n), or what was trained in its place or that of its rows.
    """
    source = matrix if change.trained is None else change.trained.cpu()
    for place, rows in change.pieces:
        source = source.to(torch.promote_types(source.dtype, rows.dtype), copy=True)
        source[place.start:place.stop] = rows
    if dtype == matrix.dtype:
        source = source.to(dtype)  # as when an adapter is loaded
    total = scratch.empty("sum", matrix.shape, dtype)
    if change.losses is not None:
        folded(source, change.addends, scratch, total, change.losses.note)
    else:
        total.copy_(source)
    if dtype == torch.float16 and not all_finite(total) and all_finite(source):
        raise ConfigError(
            f"'{name}' exceeds float16's 65504: write another --dtype, such as bfloat16.")
    return total


def summed_rows(
    read: ReadRows, shape: Sequence[int], change: Change, dtype: torch.dtype, name: str,
    scratches: Iterator[Scratch],
) -> Iterator[Tensor]:
    """Yield what becomes of a tensor, some rows of a matrix at a time, each in the next scratch.

    They are those that lorafx.merge sums at a time, or multiples, so that the bits are the same.
    Any other tensor is read as a whole, as the rows of a stack lie apart in a file. What is lost is
    noted in the change, the first time.
    """
    if len(shape) != 2:
        scratch = Scratch()
        yield summed(read(scratch, (1, *shape), 0, 1)[0], change, dtype, name, scratch)
        return
    height, length = shape[0], _BLOCKS * rows_at_a_time(shape)
    for start in range(0, height, length):
        scratch, rows_change = next(scratches), change.rows(start, min(length, height - start))
        yield summed(read(scratch, shape, start, length), rows_change, dtype, name, scratch)


@dataclass(frozen=True)
class Output:
    """One tensor of a new file: from which it is made, and what becomes of that."""

    name: str
    entry: Entry
    dtype: str
    change: Change | None

    @property
    def is_copy(self) -> bool:
        """True if its bytes are those that it is made from."""
        return self.change is None and self.dtype == self.entry.dtype

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.entry.size if self.is_copy else nbytes(self.entry.shape, DTYPES[self.dtype])


def outputs_of(file: SafetensorsFile, plan: MergePlan, dtype: torch.dtype | None) -> list[Output]:
    """Return the tensors of a new file, in the old order, or by alignment if one is new or cast."""
    sources = [(name, entry) for name, entry in file.entries.items()]
    for name, source in plan.new.items():
        if source in file.entries:
            sources.append((name, file.entries[source]))
    outputs, cast = [], False
    for name, entry in sources:
        to = NAMES[dtype] if dtype is not None and entry.dtype in _CAST else entry.dtype
        cast = cast or to != entry.dtype
        outputs.append(Output(name, entry, to, plan.changes.get(name)))
    if cast or len(outputs) > len(file.entries):  # readers want tensors aligned to their elements
        outputs.sort(key=_alignment, reverse=True)
    return outputs


def _alignment(output: Output) -> int:
    return DTYPES[output.dtype].itemsize if output.dtype in DTYPES else 0


def safetensors_job(
    file: SafetensorsFile, name: str, plan: MergePlan, dtype: torch.dtype | None
) -> Job:
    """Return the job of a file's new version, of this name; a copy if nothing changes."""
    outputs = outputs_of(file, plan, dtype)
    if all(output.is_copy for output in outputs):
        return copy_job(file.path, name)
    entries = [(output.name, output.dtype, output.entry.shape, output.size) for output in outputs]
    header = header_bytes(entries, file.metadata)
    size = len(header) + sum(output.size for output in outputs)
    return Job(name, size, functools.partial(_write_safetensors, file, header, outputs), file.path)


def _write_safetensors(
    old: SafetensorsFile, header: bytes, outputs: Sequence[Output], file: io.BufferedWriter,
    advance: Advance,
) -> None:
    """Write a new file; some rows and their sum are in memory at a time."""
    write_all(file, memoryview(header), advance)
    # of which one is written while the other is summed
    scratches = itertools.cycle((Scratch(), Scratch()))
    with open(old.path, "rb") as source, open(old.path, "rb") as copied, one_behind() as behind:
        for output in outputs:
            entry = output.entry
            if output.is_copy:
                behind(copy_bytes, copied, file, entry.begin, entry.size, advance)
                continue
            for rows in _output_rows(source, output, scratches):
                behind(write_all, file, tensor_bytes(rows), advance)


def _output_rows(
    source: io.BufferedReader, output: Output, scratches: Iterator[Scratch]
) -> Iterator[Tensor]:
    """Yield what becomes of a tensor of an open file."""
    read = functools.partial(read_rows, source, output.entry)
    change, dtype = output.change or Change(), DTYPES[output.dtype]
    yield from summed_rows(read, output.entry.shape, change, dtype, output.name, scratches)


def sums_of(
    file: SafetensorsFile, plan: MergePlan, dtype: torch.dtype | None
) -> Iterator[Sum]:
    """Yield those tensors of a file's new version to which something is added."""
    for output in outputs_of(file, plan, dtype):
        if output.change is not None and output.change.losses is not None:
            yield Sum(output.change.losses, functools.partial(_opened_rows, file, output))


def _opened_rows(file: SafetensorsFile, output: Output) -> Iterator[Tensor]:
    with open(file.path, "rb") as source:
        yield from _output_rows(source, output, itertools.repeat(Scratch()))
