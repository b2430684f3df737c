"""Checkpoints on a disk: which tensors a safetensors file holds, and where, so that one at a time is read and written.

A safetensors file is eight bytes with the length of its header, little-endian, the header, JSON, and the data.
"""

import dataclasses
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from .._errors import FormatError
from .._kernels.scratch import Scratch
from .header import DTYPES as HEADER_DTYPES
from .header import parse_json
from .streams import CHUNK, tensor_bytes


DTYPES = {**HEADER_DTYPES, "BOOL": torch.bool}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class ShardEntry:
    """One tensor of a safetensors file: its dtype as the file calls it, its shape, and its bytes in the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.end - self.begin


@dataclasses.dataclass(frozen=True)
class Shard:
    """One safetensors file: its tensors in the order of their bytes, its metadata, and where its data begins."""

    path: Path
    entries: Mapping[str, ShardEntry]
    metadata: Mapping[str, str]
    start: int


def open_shard(path: Path) -> Shard:
    """The header of a safetensors file, checked against the file."""
    if path.exists() and not path.is_file():  # opening a pipe would wait for who writes into it
        raise FormatError(f"'{path}' is no file.")
    try:
        with open(path, "rb") as file, safetensors.safe_open(path, framework="pt"):  # which checks the header's claims
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = parse_json(file.read(length).decode())
    except OSError:
        raise
    except (safetensors.SafetensorError, ValueError) as error:
        raise FormatError(f"'{path}' is damaged or no safetensors file: {error}.") from error
    metadata = header.pop("__metadata__", None) or {}
    entries = {name: ShardEntry(value["dtype"], tuple(value["shape"]), *value["data_offsets"])
               for name, value in header.items()}
    order = sorted(entries, key=lambda name: (entries[name].begin, entries[name].end))
    return Shard(path, {name: entries[name] for name in order}, metadata, 8 + length)


def header_bytes(entries: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str]) -> bytes:
    """What a safetensors file begins with, for tensors in this order: (name, dtype, shape, bytes) of each."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape, size in entries:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_rows(file: io.BufferedReader, shard: Shard, entry: ShardEntry, scratch: Scratch, shape: Sequence[int], start: int,
              length: int) -> Tensor:
    """Rows of one tensor of a shard that is open as `file`, the tensor seen with this shape."""
    rows = scratch.empty("rows", (min(length, shape[0] - start), *shape[1:]), DTYPES[entry.dtype])
    file.seek(shard.start + entry.begin + start * (entry.size // shape[0]) if entry.size else 0)
    if file.readinto(tensor_bytes(rows)) != rows.nbytes:
        raise FormatError(f"'{shard.path}' became shorter while it was read.")
    return rows


def same_bytes(shards: Iterable[Shard], first: str, second: str) -> bool:
    """Whether two tensors of these shards hold the same bytes of one dtype."""
    places = {name: (shard, shard.entries[name]) for shard in shards for name in (first, second)
              if name in shard.entries}
    (one, ours), (other, theirs) = places[first], places[second]
    if (ours.dtype, ours.size) != (theirs.dtype, theirs.size):
        return False
    with open(one.path, "rb") as left, open(other.path, "rb") as right:
        left.seek(one.start + ours.begin)
        right.seek(other.start + theirs.begin)
        sizes = (min(CHUNK, ours.size - start) for start in range(0, ours.size, CHUNK))
        return all(left.read(size) == right.read(size) for size in sizes)
