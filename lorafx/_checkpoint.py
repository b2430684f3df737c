"""Checkpoints on a disk: which tensors a safetensors file holds, and where, so that one at a time is read and written.

A safetensors file is eight bytes with the length of its header, little-endian, the header, JSON, and the data.
"""

import contextlib
import ctypes
import dataclasses
import io
import json
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from . import _header
from ._adapter import check_plain
from ._errors import ConfigError, FormatError
from ._header import parse_json
from ._pickled import check_archive, load_tensors
from ._scratch import Scratch

INDEX, SINGLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
DTYPES = {**_header.DTYPES, "BOOL": torch.bool}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Files of a folder that hold its weights once more, or make programs look for them or for an adapter.
OTHER_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.gguf", "*.onnx", "pytorch_model*.bin",
                 "pytorch_model*.bin.index.json", "consolidated*.pth", "tf_model*.h5", "flax_model*.msgpack",
                 "rust_model.ot", "adapter_config.json", "adapter_model*.bin")
CHUNK = 1 << 18  # bytes that are copied at a time
_DEEPEST = 100  # objects and lists in each other, in JSON

Moved = Callable[[int], object]  # told how many bytes have been written


@dataclasses.dataclass(frozen=True)
class Entry:
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
    entries: Mapping[str, Entry]
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
    entries = {name: Entry(value["dtype"], tuple(value["shape"]), *value["data_offsets"])
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


def octets(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU; the view keeps the tensor."""
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    size = tensor.numel() * tensor.element_size()
    if not size:
        return memoryview(bytearray())
    held: Any = (ctypes.c_ubyte * size).from_address(tensor.data_ptr())
    held.tensor = tensor
    return memoryview(held).cast("B")


def read_rows(file: io.BufferedReader, shard: Shard, entry: Entry, scratch: Scratch, shape: Sequence[int], start: int,
              length: int) -> Tensor:
    """Rows of one tensor of a shard that is open as `file`, the tensor seen with this shape."""
    rows = scratch.empty("rows", (min(length, shape[0] - start), *shape[1:]), DTYPES[entry.dtype])
    file.seek(shard.start + entry.begin + start * (entry.size // shape[0]) if entry.size else 0)
    if file.readinto(octets(rows)) != rows.nbytes:
        raise FormatError(f"'{shard.path}' became shorter while it was read.")
    return rows


@contextlib.contextmanager
def one_behind() -> Iterator[Callable[..., None]]:
    """A function that lets another thread make a call, once the one before is done: one is written, one computed."""
    with ThreadPoolExecutor(1) as pool:
        under_way: list[Future[Any]] = [pool.submit(int)]

        def behind(call: Callable[..., None], *arguments: Any) -> None:
            under_way.pop().result()
            under_way.append(pool.submit(call, *arguments))

        yield behind
        under_way.pop().result()


def write_all(file: io.BufferedWriter, content: memoryview, moved: Moved) -> None:
    """Write bytes, and say how many."""
    for start in range(0, len(content), CHUNK):
        file.write(content[start:start + CHUNK])
    moved(len(content))


def copy_bytes(source: io.BufferedReader, target: io.BufferedWriter, begin: int, count: int, moved: Moved) -> None:
    """Append bytes of one file, from `begin` on, to another."""
    source.seek(begin)
    buffer = memoryview(bytearray(min(CHUNK, count)))
    while count:
        read = source.readinto(buffer[:count])
        if not read:
            raise FormatError(f"'{source.name}' became shorter while it was read.")
        target.write(buffer[:read])
        moved(read)
        count -= read


def are_equal(shards: Iterable[Shard], first: str, second: str) -> bool:
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


def shards_of(folder: Path) -> list[Shard]:
    """The shards of a Hugging Face folder that holds no other weights: those that its index names, or its only one."""
    shards = _listed_shards(folder)
    used = {folder / INDEX, *(shard.path for shard in shards)}
    named = read_json(folder / CONFIG).get("transformers_weights") if (folder / CONFIG).is_file() else None
    others = [path.name for path in folder.iterdir() if any(fnmatchcase(path.name, row) for row in OTHER_WEIGHTS)]
    others += [named] if isinstance(named, str) else []
    names = sorted({f"'{name}'" for name in others if (folder / name).is_file() and folder / name not in used})
    if names:
        raise FormatError(f"'{folder}' also holds {', '.join(names)}: weights that would stay as they are, and that "
                          "programs may load in place of the merged ones or add to them: move them away first.")
    return shards


def _listed_shards(folder: Path) -> list[Shard]:
    index = folder / INDEX
    if not index.is_file():
        if not (folder / SINGLE).is_file():
            raise FormatError(f"The folder '{folder}' holds neither {INDEX} nor {SINGLE}: name a checkpoint in "
                              "safetensors format, or a single .safetensors, .pth or .pt file.")
        return [open_shard(folder / SINGLE)]
    listed = read_json(index).get("weight_map")
    if not (isinstance(listed, dict) and listed and all(isinstance(name, str) for name in listed.values())):
        raise FormatError(f"'{index}' has no weight_map of tensors to files.")
    for name in listed.values():
        parts = PurePosixPath(name).parts
        if not parts or "\\" in name or PurePosixPath(name).is_absolute() or ".." in parts:
            raise FormatError(f"'{index}' names a shard '{name}', which is no file in its folder.")
    shards = [open_shard(folder / name) for name in dict.fromkeys(listed.values())]
    held: dict[str, Path] = {}
    for shard in shards:
        for name in shard.entries:
            if name in held:
                raise FormatError(f"'{held[name]}' and '{shard.path}' both hold '{name}'.")
            held[name] = shard.path
    wrong = [name for name in {**listed, **held} if name not in listed or held.get(name) != folder / listed[name]]
    if wrong:
        place = listed.get(wrong[0], "no shard")
        raise FormatError(f"'{index}' says that '{wrong[0]}' is in {place}, but it is in "
                          f"{held[wrong[0]].name if wrong[0] in held else 'none'}: the index is of other shards.")
    return shards


def read_json(path: Path) -> dict[str, Any]:
    """The dict in a JSON file, of which every text can be written again, and which recursion can walk."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        _check_depth(value)
        json.dumps(value, ensure_ascii=False).encode()  # halves of surrogate pairs, which no text may have, raise
    except (ValueError, RecursionError) as error:
        raise FormatError(f"'{path}' is no JSON that can be read: {error}.") from error
    if not isinstance(value, dict):
        raise FormatError(f"'{path}' does not hold a JSON object.")
    return value


def _check_depth(value: Any) -> None:
    """ValueError if objects and lists are nested deeper than any config is."""
    level = [value]
    for _ in range(_DEEPEST):
        level = [inner for outer in level if isinstance(outer, (dict, list))
                 for inner in (outer.values() if isinstance(outer, dict) else outer)]
        if not level:
            return
    raise ValueError(f"it is nested more than {_DEEPEST} deep")


def open_pickle(path: Path) -> dict[str, Tensor]:
    """The plain tensors of a file that torch.save wrote, mapped from the disk where its format allows that.

    Its archive is held against its size, but not against its checksums, as that would read all of it.
    """
    try:
        with open(path, "rb") as file:
            mapped = zipfile.is_zipfile(file)
            if mapped:
                check_archive(file)
        held = load_tensors(path, mmap=mapped)
    except OSError:
        raise
    except Exception as error:  # damaged bytes make torch's unpickler raise anything
        reason = str(error).partition("\n")[0]
        raise FormatError(f"'{path}' is damaged or holds more than tensors: {reason}.") from error
    if not isinstance(held, dict):
        raise FormatError(f"'{path}' holds a {type(held).__name__}, not a dict of named tensors.")
    for name, value in held.items():
        if not (isinstance(name, str) and isinstance(value, Tensor) and not isinstance(value, nn.Parameter)):
            raise FormatError(f"'{path}' holds {name!r}, a {type(value).__name__}, where only named tensors are read: "
                              "save the state_dict by itself.")
        try:
            check_plain(name, value)
        except ConfigError as error:
            raise FormatError(f"'{path}' cannot be merged: {error}") from error
    return held


def nbytes(shape: Iterable[int], dtype: torch.dtype) -> int:
    """The bytes of a tensor."""
    return math.prod(shape) * dtype.itemsize
