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
Advance = Callable[[int], object]  # is called with the number of bytes that have been written


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU; the view keeps the tensor."""
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    size = tensor.numel() * tensor.element_size()
    if not size:
        return memoryview(bytearray())
    memory: Any = (ctypes.c_ubyte * size).from_address(tensor.data_ptr())
    memory.tensor = tensor
    return memoryview(memory).cast("B")


@contextlib.contextmanager
def one_behind() -> Iterator[Callable[..., None]]:
    """Yield a function by which another thread makes a call, once the one before is done.

    So one tensor is written while the next is computed.
    """
    with ThreadPoolExecutor(1) as pool:
        under_way: list[Future[Any]] = [pool.submit(int)]

        def behind(call: Callable[..., None], *arguments: Any) -> None:
            under_way.pop().result()
            under_way.append(pool.submit(call, *arguments))

        yield behind
        under_way.pop().result()


def write_all(file: io.BufferedWriter, content: memoryview, advance: Advance) -> None:
    """Write bytes, and call `advance` with their number."""
    for start in range(0, len(content), CHUNK):
        file.write(content[start:start + CHUNK])
    advance(len(content))


def copy_bytes(
    source: io.BufferedReader, target: io.BufferedWriter, begin: int, count: int, advance: Advance
) -> None:
    """Append bytes of one file, from `begin` on, to another."""
    source.seek(begin)
    buffer = memoryview(bytearray(min(CHUNK, count)))
    while count:
        read = source.readinto(buffer[:count])
        if not read:
            raise FormatError(f"'{source.name}' became shorter while it was read.")
        target.write(buffer[:read])
        advance(read)
        count -= read


def nbytes(shape: Iterable[int], dtype: torch.dtype) -> int:
    """Return the number of bytes of a tensor."""
    return math.prod(shape) * dtype.itemsize
