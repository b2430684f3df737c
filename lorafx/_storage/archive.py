"""What torch.save writes, one storage in memory at a time: torch lays the file out, and then its data is put in.

The file is a zip archive whose members `<name>/data/<number>` are the storages, each stored as it is, in the order in
which pickling meets them.
"""

import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from .streams import CHUNK, Moved, one_behind, tensor_bytes


Source = Callable[[], Iterator[Tensor]]  # gives the content of a storage in contiguous blocks


def storages_of(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """The storages of these tensors, each once, by what tells them apart, in the order of their members."""
    return {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}


def as_bytes(storage: torch.UntypedStorage) -> Tensor:
    """All of a storage, as a tensor of bytes on its memory."""
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def save(tensors: dict[str, Tensor], sources: Mapping[int, Source], file: io.BufferedWriter, moved: Moved) -> None:
    """Write a file that torch.load reads as these tensors; the storages that `sources` has are not read but filled."""
    with torch.serialization.skip_data():
        torch.save(tensors, file.name)
    storages = storages_of(tensors.values())
    with zipfile.ZipFile(file.name) as archive, open(file.name, "rb") as layout:
        members = archive.infolist()
        folder = members[0].filename.partition("/")[0]
        numbers = {f"{folder}/data/{number}": key for number, key in enumerate(storages)}
        sums = {}
        for member in members:
            if member.filename in numbers:
                key = numbers[member.filename]
                layout.seek(member.header_offset + 26)
                file.seek(member.header_offset + 30 + sum(struct.unpack("<HH", layout.read(4))))
                blocks = sources[key]() if key in sources else iter([as_bytes(storages[key])])
                sums[member.filename] = checksum = _fill(file, blocks, member.file_size, moved)
                if member.flag_bits & 8:  # the checksum follows the data, after a signature
                    file.write(struct.pack("<4sI", b"PK\x07\x08", checksum))
        _sign(file, layout, archive.start_dir, members, sums)


def _fill(file: io.BufferedWriter, blocks: Iterator[Tensor], size: int, moved: Moved) -> int:
    """Write the content of a member where the file stands; its checksum."""
    checksum = written = 0

    def write(content: memoryview) -> None:
        nonlocal checksum, written
        for start in range(0, len(content), CHUNK):
            checksum = zlib.crc32(content[start:start + CHUNK], checksum)
            file.write(content[start:start + CHUNK])
        written += len(content)
        moved(len(content))

    with one_behind() as behind:
        for block in blocks:
            behind(write, tensor_bytes(block))
    assert written == size
    return checksum


def _sign(file: io.BufferedWriter, layout: io.BufferedReader, start: int, members: Iterable[zipfile.ZipInfo],
          sums: Mapping[str, int]) -> None:
    """Put the checksums into the archive's directory."""
    for member in members:
        if member.filename in sums:
            file.seek(start + 16)
            file.write(struct.pack("<I", sums[member.filename]))
        layout.seek(start + 28)
        start += 46 + sum(struct.unpack("<HHH", layout.read(6)))
