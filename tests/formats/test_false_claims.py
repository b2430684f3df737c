"""Files that claim what they do not have: refused before anything is allocated."""

import io
import json
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lorafx
from tests.support.adapter_files import Model, injected

HUGE = 10**12


def native(**entries: Any) -> bytes:
    """A native file with these entries in its header in place of its own, and no data."""
    lorafx.save(injected(), "a.safetensors")
    data = Path("a.safetensors").read_bytes()
    header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
    text = json.dumps({"__metadata__": header["__metadata__"]} | entries).encode()
    return len(text).to_bytes(8, "little") + text


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    """What a header says of a tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def zipped(
    change: Callable[[str, bytes], bytes] = lambda name, data: data,
    packed: int = zipfile.ZIP_STORED,
    tensors: Any = None,
) -> bytes:
    """A MiniMind file with its members passed through a function."""
    source, made = io.BytesIO(), io.BytesIO()
    torch.save({"lora.A.weight": torch.ones(2, 5).half()} if tensors is None else tensors, source)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(made, "w", packed) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return made.getvalue()


def program(old: bytes, new: bytes) -> bytes:
    """A MiniMind file with a part of its pickle replaced."""
    def change(name: str, data: bytes) -> bytes:
        assert not name.endswith("pkl") or data.count(old)
        return data.replace(old, new) if name.endswith("pkl") else data
    return zipped(change)


def directory(old: bytes, new: bytes) -> bytes:
    """A MiniMind file with a size replaced in the archive's directory."""
    data = zipped()
    at = data.index(b"PK\x01\x02")
    assert data.count(old, at)
    return data[:at] + data[at:].replace(old, new)


SIZES = b"K\x02K\x05\x86"
BIG = b"\x8a\x06" + HUGE.to_bytes(6, "little")  # in a pickle
FALSE_CLAIMS = {
    "header": (
        lambda: (2**40).to_bytes(8, "little") + b"{}",
        "header claims 1099511627776 bytes, and the file has"
    ),
    "shape": (lambda: native(x=entry([HUGE], 0, 0)), "claims more than the file's"),
    "offsets": (lambda: native(x=entry([HUGE], 0, 4 * HUGE)), "is not within the file"),
    "empty": (lambda: native(x=entry([HUGE, 0], 0, 0)), "a shape of 2 dimensions claims more than"),
    "overflow": (lambda: native(x=entry([2**32, 2**32], 0, 0)), "claims more than the file's"),
    "negative": (lambda: native(x=entry([-1, -4], 0, 0)), "a shape is not made of sizes"),
    "float": (lambda: native(x=entry([1.0], 0, 4)), "is not within the file"),
    "dtype": (
        lambda: native(x=entry([1], 0, 0, "C64")), "'x' has dtype 'C64', which is none of I64, F64"
    ),
    "overlap": (
        lambda: native(x=entry([1], 0, 4), y=entry([1], 0, 4)) + bytes(4),
        "'y' does not begin where the"
    ),
    "hole": (
        lambda: native(x=entry([1], 4, 8)) + bytes(8),
        "'x' does not begin where the tensor before it ends"
    ),
    "more": (lambda: native(x=entry([1], 0, 4)) + bytes(8), "its tensors end at byte"),
    "name": (
        lambda: native(**{"a\n": entry([1], 0, 4)}) + bytes(4),
        r"the name 'a\\n' has characters that cannot"
    ),
    "long name": (
        lambda: native(**{"a" * 501: entry([1], 0, 4)}) + bytes(4), "a name of 501 characters"
    ),
    "twice": (
        lambda: b"\x10" + bytes(7) + b'{"a": 1, "a": 2}', "'a' stands twice in one JSON object"
    ),
    "metadata": (lambda: native(__metadata__={"a": 1}), "its metadata is not an object of strings"),
    "storage": (lambda: program(b"K\nt", BIG + b"t"), "does not match expected size"),
    "view": (lambda: program(SIZES, BIG + b"K\x05\x86"), "not resizable"),
    "offset": (lambda: program(b"QK\x00", b"QK\x01"), "not resizable"),
    "stride": (lambda: program(b"K\x05K\x01\x86", b"K\x06K\x01\x86"), "not resizable"),
    "expanded": (lambda: program(SIZES, b"K\x32K\x05\x86"), "not resizable"),
    "text": (
        lambda: program(b"X\x0d\x00\x00\x00", b"X\xff\xff\xff\x7f"),
        "is damaged or holds more than tensors"
    ),
    "call": (
        lambda: program(b"torch._utils\n_rebuild_tensor_v2", b"os\nsystem"),
        "torch.load with weights_only=True does not let it in"
    ),
    "packed": (
        lambda: zipped(packed=zipfile.ZIP_DEFLATED, tensors={"a": torch.zeros(10**6)}),
        "is compressed or"
    ),
    "member": (
        lambda: directory(b"\x14\x00\x00\x00" * 2, b"\xff\xff\xff\x7f" * 2),
        "compressed or claims more"
    ),
    "bits": (
        lambda: zipped().replace(torch.ones(10).half().numpy().tobytes(), bytes(20)),
        "the checksum of its member 'archive/data/0' is wrong"
    ),
    "before zip": (
        lambda: bytes((0x80, 2)) + bytes(100),
        "it is not an archive, as torch.save has written them"
    ),
    "one for all": (
        lambda: program(SIZES + b"q\x08K\x05K\x01\x86", BIG + b"K\x05\x86q\x08K\x00K\x00\x86"),
        "claims 5000000000000 elements"
    ),
}


@pytest.mark.parametrize("make, message", FALSE_CLAIMS.values(), ids=FALSE_CLAIMS)
def test_a_false_claim_is_found_before_it_costs_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], bytes], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    data = make()
    path = tmp_path / f"b{'.pth' if data[:2] in (b'PK', bytes((0x80, 2))) else '.safetensors'}"
    path.write_bytes(data)
    model = Model()
    tracemalloc.start()
    try:
        with pytest.raises(lorafx.FormatError, match=message):
            lorafx.load(model, path)
        assert tracemalloc.get_traced_memory()[1] < 500_000 + len(data)
    finally:
        tracemalloc.stop()
    assert path.read_bytes() == data
