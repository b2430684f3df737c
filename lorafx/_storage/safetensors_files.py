"""Safetensors files: a header's length (8 bytes, little-endian), the header, JSON, and the data.

All that a header claims is held against the file's size before any data is read, by one function,
whether an adapter is loaded or a checkpoint is merged. What is written is a function of tensors and
metadata, to the byte.
"""

import io
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .._errors import ConfigError, FormatError
from .._kernels.scratch import Scratch
from .json_files import parse_json
from .streams import CHUNK, tensor_bytes
from .untrusted import check_tensor_name, open_untrusted


# In the order in which safetensors writes tensors.
DTYPES = {"I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32,
          "BF16": torch.bfloat16, "F16": torch.float16, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# What an optimizer may keep.
NUMBERS = {name: dtype for name, dtype in DTYPES.items() if dtype != torch.bool}

_BITS = {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()}
# Others are only carried along.
_BITS |= {"U64": 64, "C64": 64, "U32": 32, "U16": 16, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8,
          "F8_E8M0": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F6_E3M2": 6, "F6_E2M3": 6, "F4": 4}
_LONGEST_HEADER = 100_000_000  # bytes, as in safetensors itself


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its dtype as the file calls it, its shape, its bytes, file[begin:end]."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.end - self.begin


@dataclass(frozen=True)
class SafetensorsFile:
    """A header whose claims are true: tensors, in the order of their bytes, and metadata."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: dict[str, str]


# Reading.

def open_safetensors(path: Path) -> SafetensorsFile:
    """Return what a file's header says, once that accounts for every byte; torch may lack dtypes.

    Raises:
        FormatError: it does not. OSError: as the system says.
    """
    with open_untrusted(path, "not a safetensors file") as file:
        return read_header(path, file, lambda names, metadata: ())[0]


# Of the names and the metadata in a header, the tensors whose data is read.
Choose = Callable[[Collection[str], Mapping[str, str]], Collection[str]]


def load_safetensors(
    path: Path, choose: Choose = lambda names, metadata: names
) -> tuple[dict[str, Tensor], SafetensorsFile]:
    """Return the chosen tensors of a file, on the CPU, each in memory of its own, and its header.

    It raises as `open_safetensors`, and for chosen names that no line can show and dtypes but
    DTYPES.
    """
    with open_untrusted(path, "not a safetensors file") as file:
        header, chosen = read_header(path, file, choose)
        return {name: _read_tensor(file, header.entries[name])
                for name in header.entries if name in chosen}, header


def read_header(
    path: Path, file: BinaryIO, choose: Choose
) -> tuple[SafetensorsFile, Collection[str]]:
    """Return the header of an open file, and which of its tensors are to be loaded.

    ValueError if it is not true, or these are not loadable.
    """
    size = os.fstat(file.fileno()).st_size
    first = file.read(8)
    length = int.from_bytes(first, "little")
    if len(first) < 8 or not 2 <= length <= min(size - 8, _LONGEST_HEADER):
        raise ValueError(f"its header claims {length} bytes, and the file has {size}")
    text = file.read(length).decode()
    header = parse_json(text)
    if not isinstance(header, dict) or text[0] != "{":
        raise ValueError("its header is not a JSON object")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    strings = isinstance(metadata, dict) and all(isinstance(x, str) for x in metadata.values())
    if not strings:
        raise ValueError("its metadata is not an object of strings")
    "".join((*header, *metadata, *metadata.values())).encode()  # halves of surrogate pairs raise
    chosen, entries = set(choose(header.keys(), metadata)), []
    for name, fields in header.items():
        entries.append((name, _entry(name, fields, 8 + length, size, name in chosen)))
    entries.sort(key=lambda item: (item[1].begin, item[1].end))
    position = 8 + length
    for name, entry in entries:
        if entry.begin != position:
            raise ValueError(f"the data of '{name}' does not begin where the tensor before it ends")
        position = entry.end
    if position != size:
        raise ValueError(f"its tensors end at byte {position}, and the file has {size}")
    return SafetensorsFile(path, dict(entries), metadata), chosen


def _entry(name: str, fields: Any, begin: int, size: int, loading: bool) -> Entry:
    if loading:
        check_tensor_name(name)
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"'{name}' is not described by dtype, shape and data_offsets")
    code, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    known = [*(DTYPES if loading else _BITS)]
    if not isinstance(code, str) or code not in known:
        raise ValueError(
            f"'{name}' has dtype {str(code)[:40]!r}, which is none of {', '.join(known)}")
    if not (isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
            and all(type(offset) is int and 0 <= offset <= size - begin for offset in offsets)):
        raise ValueError(f"the shape or the place of '{name}' is not within the file")
    if not all(type(length) is int and length >= 0 for length in shape):
        raise ValueError("a shape is not made of sizes")
    # what is loaded may be multiplied: no other length of an empty tensor may be huge
    limit = 8 * size if loading else 1 << 63
    if math.prod(length or 1 for length in shape) * _BITS[code] > limit:
        raise ValueError(
            f"a shape of {len(shape)} dimensions claims more than the file's {size} bytes")
    start, end = offsets
    if math.prod(shape) * _BITS[code] != 8 * (end - start):
        raise ValueError(f"'{name}' has {end - start} bytes, which is not what its shape and dtype "
                         "need")
    return Entry(code, tuple(shape), begin + start, begin + end)


def _read_tensor(file: BinaryIO, entry: Entry) -> Tensor:
    data, dtype = bytearray(entry.size), DTYPES[entry.dtype]
    file.seek(entry.begin)
    if file.readinto(data) != len(data):  # type: ignore[attr-defined]
        raise ValueError("it became shorter while it was read")
    if dtype == torch.bool and data.translate(None, b"\0\1"):
        raise ValueError("a tensor of bools has bytes that are neither 0 nor 1")
    flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.view(entry.shape)


def read_rows(
    file: io.BufferedReader, entry: Entry, scratch: Scratch, shape: Sequence[int], start: int,
    length: int,
) -> Tensor:
    """Return `length` rows of a tensor of an open file, seen with a shape, from `start` on."""
    rows = scratch.empty("rows", (min(length, shape[0] - start), *shape[1:]), DTYPES[entry.dtype])
    if rows.nbytes:
        file.seek(entry.begin + start * (entry.size // shape[0]))
        if file.readinto(tensor_bytes(rows)) != rows.nbytes:
            raise FormatError(f"'{file.name}' became shorter while it was read.")
    return rows


def same_bytes(files: Iterable[SafetensorsFile], first: str, second: str) -> bool:
    """True if two tensors of these files hold the same bytes of one dtype."""
    places = {}
    for file in files:
        for name in {first, second} & file.entries.keys():
            places[name] = file.path, file.entries[name]
    (path, entry), (other_path, other) = places[first], places[second]
    if (entry.dtype, entry.size) != (other.dtype, other.size):
        return False
    with open(path, "rb") as left, open(other_path, "rb") as right:
        left.seek(entry.begin)
        right.seek(other.begin)
        for start in range(0, entry.size, CHUNK):
            size = min(CHUNK, entry.size - start)
            if left.read(size) != right.read(size):
                return False
    return True


# Writing.

def header_bytes(
    entries: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str]
) -> bytes:
    """Return what a file begins with, for tensors in this order: name, dtype, shape, bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape, size in entries:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the content of a file of these tensors, a function of only them and the metadata.

    The layout is that of safetensors.torch.save, wide dtypes first and then by name, but for the
    metadata, which keeps its order; there a hash that differs from process to process orders it.
    Tensors may have any device and strides, and share memory.

    Raises:
        ConfigError: a dtype is none of DTYPES. UnicodeEncodeError: a text has half of a surrogate
            pair.
    """
    order = {dtype: place for place, dtype in enumerate(NAMES)}
    for name, tensor in tensors.items():
        if tensor.dtype not in order:
            raise ConfigError(f"'{name}' has dtype {tensor.dtype}, and a file keeps "
                              f"{', '.join(DTYPES)}: convert it first.")
    entries, contents = [], []
    for name in sorted(tensors, key=lambda name: (order[tensors[name].dtype], name.encode())):
        tensor = tensors[name].detach().cpu().contiguous()
        entries.append((name, NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes))
        contents.append(tensor_bytes(tensor))
    return b"".join([header_bytes(entries, metadata), *contents])
