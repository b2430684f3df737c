"""The reader of safetensors files: what its headers may claim, for a base and for an adapter."""

import json
from collections import Counter
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

import lorafx
from lorafx._storage.safetensors_files import load_safetensors, open_safetensors
from tests.support.mutations import Dice, twice

BITS = {"U64": 64, "C64": 64, "I64": 64, "F64": 64, "F32": 32, "U32": 32, "I32": 32, "BF16": 16,
        "F16": 16, "U16": 16, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E5M2FNUZ": 8,
        "F8_E4M3FNUZ": 8, "F8_E8M0": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F6_E2M3": 6, "F6_E3M2": 6,
        "F4": 4}
LOADED = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "I8", "U8", "BOOL")


def write(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, str) else json.dumps(header)
    path.write_bytes(len(text.encode()).to_bytes(8, "little") + text.encode() + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("dtype", BITS)
def test_every_dtype_is_carried_along_and_those_of_torch_are_loaded(tmp_path, dtype):
    size = 4 * 7 * BITS[dtype] // 8
    path = write(tmp_path / "a.safetensors", {"x": entry(dtype, [4, 7], 0, size)}, bytes(size))
    safetensors.deserialize(path.read_bytes())  # which takes it too
    found = open_safetensors(path).entries["x"]
    assert (found.dtype, found.shape, found.size) == (dtype, (4, 7), size)
    assert path.read_bytes()[found.begin:found.end] == bytes(size)
    if dtype in LOADED:
        assert load_safetensors(path)[0]["x"].shape == (4, 7)
    else:
        message = f"'x' has dtype '{dtype}', which is none of I64, F64"
        with pytest.raises(lorafx.FormatError, match=message):
            load_safetensors(path)


FALSE = {
    "a dtype": ({"x": entry("F7", [1], 0, 1)}, 1, "has dtype 'F7', which is none of"),
    "a size": ({"x": entry("U8", [3], 0, 4)}, 4, "has 4 bytes, which is not what its shape"),
    "a hole": ({"x": entry("U8", [1], 1, 2)}, 2, "does not begin where the tensor before it ends"),
    "more": ({"x": entry("U8", [1], 0, 1)}, 2, "its tensors end at byte"),
    "a float": ({"x": entry("U8", [1.0], 0, 1)}, 1, "a shape is not made of sizes"),
    "a field": ({"x": {**entry("U8", [1], 0, 1), "more": 1}}, 1, "is not described by dtype"),
    "an overflow": ({"x": entry("U8", [2**40, 2**40, 0], 0, 0)}, 0, "claims more than the file's"),
    "a list": ([], 0, "its header is not a JSON object"),
    "a space": (' {"x": 1}', 0, "its header is not a JSON object"),
    "metadata": ({"__metadata__": {"a": 1}}, 0, "its metadata is not an object of strings"),
    "no metadata": ({"__metadata__": 0}, 0, "its metadata is not an object of strings"),
    "a surrogate": ({"__metadata__": {"a": "\ud800"}}, 0, "surrogates not allowed"),
    "a key twice": ('{"x": 1, "x": 2}', 0, "'x' stands twice in one JSON object"),
    "a field twice": ('{"x": {"dtype": "U8", "dtype": "I8"}}', 0, "'dtype' stands twice"),
    "depth": ("{" + '"a":{' * 10**5, 0, "RecursionError|recursion"),
}


@pytest.mark.parametrize("header, size, message", FALSE.values(), ids=FALSE)
@pytest.mark.parametrize("read", [open_safetensors, load_safetensors])
def test_what_is_not_true_is_refused(tmp_path, read, header, size, message):
    path = write(tmp_path / "a.safetensors", header, bytes(size))
    with pytest.raises(lorafx.FormatError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"'{path}' is damaged or not a safetensors file: ")


def test_a_bool_is_one_of_two_bytes(tmp_path):
    header = {"x": entry("BOOL", [3], 0, 3)}
    good = load_safetensors(write(tmp_path / "a.safetensors", header, b"\1\0\1"))[0]["x"]
    assert good.tolist() == [True, False, True]
    with pytest.raises(lorafx.FormatError, match="bytes that are neither 0 nor 1"):
        load_safetensors(write(tmp_path / "b.safetensors", header, b"\1\2\0"))


@pytest.mark.parametrize("dtype, size", [("F4", 1), ("F4", 2), ("F8_E4M3", 4)])
def test_sizes_of_dtypes_that_are_only_carried_along_are_checked(tmp_path, dtype, size):
    path = write(tmp_path / "a.safetensors", {"x": entry(dtype, [3], 0, size)}, bytes(size))
    with pytest.raises(lorafx.FormatError, match=f"has {size} bytes, which is not what its shape"):
        open_safetensors(path)


def test_an_empty_tensor_of_a_base_may_be_wide(tmp_path):
    path = write(tmp_path / "a.safetensors", {"x": entry("F32", [0, 10**6], 0, 0)})
    assert open_safetensors(path).entries["x"].shape == (0, 10**6)
    with pytest.raises(lorafx.FormatError, match="claims more than the file's"):
        load_safetensors(path)  # what is loaded may be multiplied


def test_names_of_a_base_may_be_any(tmp_path):
    path = write(tmp_path / "a.safetensors", {"a\nb": entry("U8", [1], 0, 1)}, b"x")
    assert list(open_safetensors(path).entries) == ["a\nb"]
    with pytest.raises(lorafx.FormatError, match="has characters that cannot be printed"):
        load_safetensors(path)


def test_damaged_headers_are_read_as_safetensors_reads_them(tmp_path):
    """What is refused is what it refuses, a key that stands twice, or an unknown field."""
    tensors = {"a": torch.ones(2, 3), "b": torch.ones(5).half(), "c": torch.zeros(0, 7),
               "d": torch.tensor(3)}
    whole = safetensors.torch.save(tensors, {"format": "pt"})
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8:8 + length]), whole[8 + length:]
    path, outcomes = tmp_path / "a.safetensors", Counter()
    for index in range(1500):
        dice = Dice(f"header {index}")
        text = json.dumps(dice.json(header))
        if index % 10 == 0:
            text = twice(text, dice)
        content = text.encode() if index % 4 else dice.bytes_of(text.encode())
        path.write_bytes(len(content).to_bytes(8, "little") + content + data)
        try:
            theirs = dict(safetensors.deserialize(path.read_bytes()))
        except safetensors.SafetensorError:
            theirs = None
        try:
            ours = open_safetensors(path)
        except lorafx.FormatError as error:
            outcomes["refused"] += 1
            more = "stands twice", "is not described by"
            assert theirs is None or any(part in str(error) for part in more), (content, error)
            continue
        outcomes["read"] += 1
        assert theirs is not None, content
        assert ours.entries.keys() == theirs.keys(), content
        for name, found in ours.entries.items():
            assert found.dtype == theirs[name]["dtype"]
            assert list(found.shape) == theirs[name]["shape"]
            assert path.read_bytes()[found.begin:found.end] == bytes(theirs[name]["data"])
    assert outcomes["read"] > 100 and outcomes["refused"] > 500
