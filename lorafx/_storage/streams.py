"""Bytes of tensors and files, moved a chunk at a time."""

import contextlib
import ctypes
import io
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from .._errors import FormatError


CHUNK = 1 << 18  # bytes that are copied at a time
Moved = Callable[[int], object]  # told how many bytes have been written


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU; the view keeps the tensor."""
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    size = tensor.numel() * tensor.element_size()
    if not size:
        return memoryview(bytearray())
    held: Any = (ctypes.c_ubyte * size).from_address(tensor.data_ptr())
    held.tensor = tensor
    return memoryview(held).cast("B")


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


def nbytes(shape: Iterable[int], dtype: torch.dtype) -> int:
    """The bytes of a tensor."""
    return math.prod(shape) * dtype.itemsize
