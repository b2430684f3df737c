"""What torch.save writes, one storage in memory at a time: torch lays it out, data is put in.

The file is a zip archive whose members `<name>/data/<number>` are the storages, each stored as it
is, in the order in which pickling meets them.
"""

import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from .._kernels.private import storage_key
from .streams import CHUNK, Advance, one_behind, tensor_bytes


Source = Callable[[], Iterator[Tensor]]  # gives the content of a storage in contiguous blocks


def storages_of(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """Return the storages of these tensors, each once, by address, in the order of members."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage_key(storage)] = storage
    return storages


def save_archive(
    tensors: dict[str, Tensor], sources: Mapping[int, Source], file: io.BufferedWriter,
    advance: Advance,
) -> None:
    """Write a file that torch.load reads as these tensors; `sources` fill storages in it."""
    with torch.serialization.skip_data():
        torch.save(tensors, file.name)
    storages = storages_of(tensors.values())
    with zipfile.ZipFile(file.name) as archive, open(file.name, "rb") as layout:
        members = archive.infolist()
        folder = members[0].filename.partition("/")[0]
        keys = {f"{folder}/data/{number}": key for number, key in enumerate(storages)}
        checksums = {}
        for member in members:
            if member.filename not in keys:
                continue
            key = keys[member.filename]
            layout.seek(member.header_offset + 26)
            name_and_extra = sum(struct.unpack("<HH", layout.read(4)))
            file.seek(member.header_offset + 30 + name_and_extra)
            blocks = sources[key]() if key in sources else iter([_as_bytes(storages[key])])
            checksum = checksums[member.filename] = _fill(file, blocks, member.file_size, advance)
            if member.flag_bits & 8:  # the checksum follows the data, after a signature
                file.write(struct.pack("<4sI", b"PK\x07\x08", checksum))
        _write_checksums(file, layout, archive.start_dir, members, checksums)


def _as_bytes(storage: torch.UntypedStorage) -> Tensor:
    """All of a storage, as a tensor of bytes on its memory."""
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _fill(
    file: io.BufferedWriter, blocks: Iterator[Tensor], size: int, advance: Advance
) -> int:
    """Write the content of a member where the file stands, and return its checksum."""
    checksum = written = 0

    def write(content: memoryview) -> None:
        nonlocal checksum, written
        for start in range(0, len(content), CHUNK):
            checksum = zlib.crc32(content[start:start + CHUNK], checksum)
            file.write(content[start:start + CHUNK])
        written += len(content)
        advance(len(content))

    with one_behind() as behind:
        for block in blocks:
            behind(write, tensor_bytes(block))
    assert written == size
    return checksum


def _write_checksums(
    file: io.BufferedWriter, layout: io.BufferedReader, start: int,
    members: Iterable[zipfile.ZipInfo], checksums: Mapping[str, int],
) -> None:
    """Put the checksums into the archive's directory, which begins at `start`."""
    for member in members:
        if member.filename in checksums:
            file.seek(start + 16)
            file.write(struct.pack("<I", checksums[member.filename]))
        layout.seek(start + 28)
        start += 46 + sum(struct.unpack("<HHH", layout.read(6)))
