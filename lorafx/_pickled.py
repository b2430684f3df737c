"""Reads what torch.save wrote, tensors only, without unpickling: no name in the file is ever looked up or called.

A file is a pickle program and the bytes of the storages. The program runs on a machine that knows the few steps which
make a dict of tensors, and gives *claims* of tensors; each is held against the bytes that are there before a tensor is
made. (torch.load with weights_only=True runs no foreign code either, but allocates what an old file claims to hold.)
Damage is a ValueError; the caller, who knows the path, gives it a name.
"""

import io
import os
import pickletools
import sys
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ._header import elements, from_bytes

STORAGES = {"torch DoubleStorage": torch.float64, "torch FloatStorage": torch.float32, "torch HalfStorage": torch.half,
            "torch BFloat16Storage": torch.bfloat16, "torch LongStorage": torch.int64, "torch IntStorage": torch.int32,
            "torch ShortStorage": torch.int16, "torch CharStorage": torch.int8, "torch ByteStorage": torch.uint8}
MAGIC = 0x1950A86A20F9469CFC6C  # what torch.save wrote first before it wrote zip files
PROTOCOL = 1001  # and second
MARK = object()


class Name(NamedTuple):
    """A global that the program refers to, "module name": data here."""

    text: str


class Storage(NamedTuple):
    """The claim that a record of the file holds so many elements."""

    dtype: torch.dtype
    key: str
    numel: int


class Claim(NamedTuple):
    """A tensor that the program describes."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


Records = Callable[[str], bytearray]


def read_tensors(file: BinaryIO) -> Any:
    """What the file holds, with every claim of a tensor at the top level of a dict made a tensor on the CPU."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(4)
    file.seek(0)
    content, records = _read_zip(file, size) if start == b"PK\x03\x04" else _read_before_zip(file.read())
    if not isinstance(content, dict):
        return content
    made: dict[str, Tensor] = {}
    return {name: _tensor(value, records, made, size) if isinstance(value, Claim) else value
            for name, value in content.items()}


def _read_zip(file: BinaryIO, size: int) -> tuple[Any, Records]:
    archive = zipfile.ZipFile(file)
    members = {info.filename: info for info in archive.infolist()}
    roots = {name.partition("/")[0] for name in members}
    if len(members) != len(archive.infolist()) or len(roots) != 1:
        raise ValueError("its archive has two members of one name, or not one folder")
    if any(info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size
           for info in members.values()) or sum(info.file_size for info in members.values()) > size:
        raise ValueError("its archive is compressed or claims more than the file holds")
    [root] = roots

    def record(key: str) -> bytearray:
        return bytearray(archive.read(members[f"{root}/{key}"]))  # checks the CRC

    order = f"{root}/byteorder"
    if order in members and record("byteorder") != sys.byteorder.encode():
        raise ValueError(f"its numbers are not {sys.byteorder}-endian, as this computer's are")
    return _run(io.BytesIO(record("data.pkl")), {}), lambda key: record(f"data/{key}")


def _read_before_zip(content: bytes) -> tuple[Any, Records]:
    """Five programs (magic, version, system, what was saved, the keys of its storages), then the storages."""
    file, claimed = io.BytesIO(content), dict[str, Storage]()
    if _run(file, claimed) != MAGIC or _run(file, claimed) != PROTOCOL:
        raise ValueError("it does not begin as a file of torch.save does")
    system, found, keys = (_run(file, claimed) for _ in range(3))
    if system.get("little_endian") is not (sys.byteorder == "little"):
        raise ValueError(f"its numbers are not {sys.byteorder}-endian, as this computer's are")
    places: dict[str, tuple[int, int]] = {}
    for key in keys:
        begin = file.tell() + 8
        end = begin + int.from_bytes(file.read(8), "little") * claimed[key].dtype.itemsize
        if end > len(content):
            raise ValueError(f"a storage claims bytes up to {end}, and the file has {len(content)}")
        places[key] = begin, end
        file.seek(end)
    if file.tell() != len(content):
        raise ValueError(f"its storages end at byte {file.tell()}, and the file has {len(content)}")
    return found, lambda key: bytearray(content[slice(*places[key])])


def _tensor(claim: Claim, records: Records, made: dict[str, Tensor], size: int) -> Tensor:
    """The tensor of a claim that the file's bytes bear out."""
    dtype, key, count = claim.storage
    if key not in made:
        data = records(key)
        if len(data) != count * dtype.itemsize:
            raise ValueError(f"a storage claims {count} elements of {dtype}, and has {len(data)} bytes")
        made[key] = from_bytes(data, dtype)
    steps = (*claim.stride, claim.offset)
    if len(claim.shape) != len(claim.stride) or not all(type(n) is int and n >= 0 for n in steps):
        raise ValueError("a tensor's strides are not strides")
    total = elements(claim.shape, dtype.itemsize, size)
    if not total:
        return torch.empty(claim.shape, dtype=dtype)
    last = claim.offset + sum((n - 1) * step for n, step in zip(claim.shape, claim.stride))
    if total > count or last >= count:
        raise ValueError(f"a tensor claims {total} elements, up to number {last}, of a storage that has {count}")
    return made[key].as_strided(claim.shape, claim.stride, claim.offset)


class Machine:
    """What a pickle program works on: a stack, a memo, and the storages that it has claimed so far."""

    def __init__(self, storages: dict[str, Storage]) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages = storages

    def check(self, holds: bool, damage: str) -> None:
        """Go on, or stop at this damage."""
        if not holds:
            raise ValueError(damage)

    def above_mark(self) -> list[Any]:
        """Pop all that was pushed since the last mark, and the mark."""
        found: list[Any] = []
        while (top := self.stack.pop()) is not MARK:
            found.append(top)
        return found[::-1]

    def tuple_of(self, count: int) -> None:
        """Join the topmost values."""
        items = tuple(self.stack.pop() for _ in range(count))
        self.stack.append(items[::-1])

    def set_items(self, flat: list[Any]) -> None:
        """Put keys and values, in turn, into the dict on top."""
        target = self.stack[-1]
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            if type(target) is not dict or type(key) not in (str, int):
                raise ValueError(f"it holds a {type(target).__name__} with a {type(key).__name__} for a key")
            if key in target:
                raise ValueError(f"it holds {key!r} twice")
            target[key] = value

    def append(self, values: list[Any]) -> None:
        """Put values into the list on top."""
        self.check(type(self.stack[-1]) is list, "it appends to what is no list")
        self.stack[-1].extend(values)

    def name(self, text: str) -> None:
        """Refer to a global: one of those that dicts of tensors are made of."""
        self.check(text in STORAGES or text in CALLS, f"it holds {text.replace(' ', '.')[:80]!r}")
        self.stack.append(Name(text))

    def storage(self) -> None:
        """Take ("storage", type, key, device, count), and in old files a view of None, for a storage."""
        kind, name, key, _, count, *view = self.stack.pop()
        if kind != "storage" or type(name) is not Name or type(key) is not str or view not in ([], [None]):
            raise ValueError("it refers to something that is no storage")
        self.check(type(count) is int and count >= 0, "a storage's size is not a size")
        found = Storage(STORAGES[name.text], key, count)
        self.check(self.storages.setdefault(key, found) == found, f"it claims two things of storage {key[:80]!r}")
        self.stack.append(found)

    def call(self) -> None:
        """Do what stands here for calling a global with a tuple of arguments."""
        arguments, name = self.stack.pop(), self.stack.pop()
        self.check(type(name) is Name and type(arguments) is tuple, "it calls what is no function")
        self.stack.append(CALLS[name.text](*arguments))

    def build(self) -> None:
        """Ignore the attributes of a dict, where a module's state_dict keeps version numbers."""
        self.stack.pop()
        self.check(type(self.stack[-1]) is dict, "it sets attributes")


def _claim(storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any, hooks: Any) -> Claim:
    if type(storage) is not Storage or type(shape) is not tuple or type(stride) is not tuple or hooks != {}:
        raise ValueError("it describes a tensor in an unknown way")
    return Claim(storage, offset, shape, stride)


def _parameter(claim: Any, requires_grad: Any, hooks: Any) -> Claim:
    if type(claim) is not Claim or hooks != {}:
        raise ValueError("it describes a parameter in an unknown way")
    return claim


CALLS: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": lambda: {},
    "torch._utils _rebuild_tensor_v2": _claim,
    "torch._utils _rebuild_parameter": _parameter,
}

# What each opcode of the pickle language does, of those that a dict of tensors needs.
STEPS: dict[str, Callable[[Machine, Any], Any]] = {
    **dict.fromkeys(("FRAME", "STOP"), lambda machine, value: None),
    "PROTO": lambda machine, version: machine.check(version <= 5, f"its pickle is of version {version}"),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
                     "BINUNICODE8"), lambda machine, value: machine.stack.append(value)),
    "NONE": lambda machine, _: machine.stack.append(None),
    "NEWTRUE": lambda machine, _: machine.stack.append(True),
    "NEWFALSE": lambda machine, _: machine.stack.append(False),
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "EMPTY_TUPLE": lambda machine, _: machine.stack.append(()),
    "MARK": lambda machine, _: machine.stack.append(MARK),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.above_mark())),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "SETITEM": lambda machine, _: machine.set_items([machine.stack.pop(), machine.stack.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.above_mark()),
    "APPEND": lambda machine, _: machine.append([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.above_mark()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda machine, at: machine.memo.update({at: machine.stack[-1]})),
    "MEMOIZE": lambda machine, _: machine.memo.update({len(machine.memo): machine.stack[-1]}),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, at: machine.stack.append(machine.memo[at])),
    "GLOBAL": lambda machine, text: machine.name(text),
    "STACK_GLOBAL": lambda machine, _: machine.name(" ".join([machine.stack.pop(), machine.stack.pop()][::-1])),
    "BINPERSID": lambda machine, _: machine.storage(),
    "REDUCE": lambda machine, _: machine.call(),
    "BUILD": lambda machine, _: machine.build(),
}


def _run(program: BinaryIO, storages: dict[str, Storage]) -> Any:
    """The value of a pickle program; leaves the file after its end, and notes the storages that it claims."""
    machine = Machine(storages)
    for opcode, value, _ in pickletools.genops(program):
        if opcode.name not in STEPS:
            raise ValueError(f"its pickle has a step {opcode.name}, which no dict of tensors needs")
        STEPS[opcode.name](machine, value)
    [result] = machine.stack
    return result
