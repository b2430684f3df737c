"""The layout of a .safetensors file, read before its data: every claim of the header is held against the file's size.

The file is a header's length (8 bytes, little-endian), the header as JSON, and the tensors' bytes one after the other.
Damage is a ValueError; the caller, who knows the path, gives it a name.
"""

import json
import math
import os
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
LONGEST = 100_000_000  # bytes of a header, as in safetensors itself
LONGEST_NAME = 500  # characters of a tensor's name


class Entry(NamedTuple):
    """Where one tensor's bytes are in the file, [start, end), and what they mean."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(file: BinaryIO) -> tuple[dict[str, Entry], dict[str, str]]:
    """{name: Entry} in the order of the data, and the metadata; ValueError unless they account for every byte."""
    size = os.fstat(file.fileno()).st_size
    first = file.read(8)
    length = int.from_bytes(first, "little")
    if len(first) < 8 or not 2 <= length <= min(size - 8, LONGEST):
        raise ValueError(f"its header claims {length} bytes, and the file has {size}")
    header = parse_json(file.read(length).decode())
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is not an object of strings")
    "".join((*metadata, *metadata.values())).encode()  # halves of surrogate pairs, which no text may have, raise
    entries = {name: _entry(name, fields, 8 + length, size) for name, fields in header.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
    position = 8 + length
    for name, entry in ordered.items():
        if entry.start != position:
            raise ValueError(f"the data of '{name}' does not begin where the tensor before it ends")
        position = entry.end
    if position != size:
        raise ValueError(f"its tensors end at byte {position}, and the file has {size}")
    return ordered, metadata


def read_tensor(file: BinaryIO, entry: Entry) -> Tensor:
    """One tensor of an open file, on the CPU, in memory of its own."""
    data = bytearray(entry.end - entry.start)
    file.seek(entry.start)
    if file.readinto(data) != len(data):  # type: ignore[attr-defined]
        raise ValueError("it became shorter while it was read")
    return from_bytes(data, entry.dtype).view(entry.shape)


def from_bytes(data: bytearray, dtype: torch.dtype) -> Tensor:
    """The numbers in these bytes, which they share: 1-D."""
    return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


def parse_json(text: str) -> Any:
    """JSON in which no object has one key twice, of which a parser would silently drop one."""
    return json.loads(text, object_pairs_hook=_distinct)


def elements(shape: tuple[int, ...], itemsize: int, limit: int) -> int:
    """The number of elements of a shape; ValueError if one claims more than `limit` bytes, or would but for a 0."""
    if not all(type(length) is int and length >= 0 for length in shape):
        raise ValueError("a shape is not made of sizes")
    if math.prod(length or 1 for length in shape) * itemsize > limit:
        raise ValueError(f"a shape of {len(shape)} dimensions claims more than the file's {limit} bytes")
    return math.prod(shape)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key[:80]!r} stands twice in one JSON object")
        found[key] = value
    return found


def check_tensor_name(name: str) -> None:
    """ValueError unless a name is one that can be shown in a line."""
    if len(name) > LONGEST_NAME:
        raise ValueError(f"a tensor has a name of {len(name)} characters")
    if not name.isprintable():
        raise ValueError(f"the name {name!r} has characters that cannot be printed")


def _entry(name: str, fields: Any, begin: int, size: int) -> Entry:
    check_tensor_name(name)
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"'{name}' is not described by dtype, shape and data_offsets")
    code, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"'{name}' has dtype {str(code)[:40]!r}, which is none of {', '.join(DTYPES)}")
    if not (isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
            and all(type(offset) is int and 0 <= offset <= size - begin for offset in offsets)):
        raise ValueError(f"the shape or the place of '{name}' is not within the file")
    dtype = DTYPES[code]
    start, end = offsets
    if elements(tuple(shape), dtype.itemsize, size) * dtype.itemsize != end - start:
        raise ValueError(f"'{name}' has {end - start} bytes, which is not what its shape and dtype need")
    return Entry(dtype, tuple(shape), begin + start, begin + end)
