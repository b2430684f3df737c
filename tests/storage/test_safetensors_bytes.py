"""The writer of safetensors files: what safetensors reads, and the same bytes everywhere."""

import json
import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch

import lorafx
from lorafx._storage.safetensors_files import DTYPES, safetensors_bytes


METADATA = {"format": "lorafx", "z": "", "a": '"\\\n\u2028 é', "version": "1", "é": "\x7f\x1f"}


def tensors_of_every_dtype() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for number, dtype in enumerate(DTYPES.values()):
        count = (5 + number) * 3
        raw = torch.randint(256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator)
        raw = raw % 2 if dtype == torch.bool else raw
        tensors[f"layers.{number}.b"] = raw.view(dtype).view(5 + number, 3)
        tensors[f"layers.{number}.a"] = raw.view(dtype).view(3, 5 + number).mT  # not contiguous
        tensors[f"empty.{number}.é"] = torch.empty(0, 7, dtype=dtype)
        tensors[f"scalar.{number}"] = raw.view(dtype)[1]
    return tensors


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("metadata", [{}, METADATA], ids=["no metadata", "metadata"])
def test_safetensors_reads_what_is_written(metadata, tmp_path):
    tensors = tensors_of_every_dtype()
    content = safetensors_bytes(tensors, metadata)
    found = safetensors.torch.load(content)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(bits(found[name]), bits(tensor)), name
    (tmp_path / "a.safetensors").write_bytes(content)
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert (file.metadata() or {}) == metadata


@pytest.mark.parametrize("metadata", [{}, {"a": METADATA["a"]}, {"é": METADATA["é"]}])
def test_the_layout_is_that_of_safetensors(metadata):
    """The bytes are those that safetensors writes where its metadata have one order only."""
    tensors = {}
    for name, tensor in tensors_of_every_dtype().items():
        tensors[name] = tensor.clone(memory_format=torch.contiguous_format)
    assert safetensors_bytes(tensors, metadata) == safetensors.torch.save(tensors, metadata or None)
    assert safetensors_bytes({}, metadata) == safetensors.torch.save({}, metadata or None)


def test_metadata_keeps_its_order_and_tensors_need_none():
    tensors = tensors_of_every_dtype()
    content = safetensors_bytes(tensors, METADATA)
    header = json.loads(content[8:8 + int.from_bytes(content[:8], "little")])
    assert list(header["__metadata__"].items()) == list(METADATA.items())
    assert safetensors_bytes(dict(reversed(tensors.items())), METADATA) == content


DIGEST = """
import hashlib
import torch
from lorafx._storage.safetensors_files import safetensors_bytes
names = sorted({f"layers.{n}.weight" for n in range(40)}, key=hash)
tensors = {name: torch.full((3, 5), float(name.split(".")[1])) for name in names}
metadata = {f"key {n}": str(n) for n in range(40)}
digest = hashlib.sha256(safetensors_bytes(tensors, metadata)).hexdigest()
"""


def test_every_process_writes_the_same_bytes():
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "2" else "2"
    there = subprocess.run(
        [sys.executable, "-c", DIGEST + "print(digest)"], check=True, capture_output=True,
        text=True, env={**os.environ, "PYTHONHASHSEED": seed})
    here: dict[str, str] = {}
    exec(DIGEST, here)
    assert there.stdout.strip() == here["digest"] and len(here["digest"]) == 64


def test_a_parameter_is_written_as_its_values():
    weight = torch.nn.Parameter(torch.randn(3, 5))
    content = safetensors_bytes({"w": weight}, {})
    assert torch.equal(safetensors.torch.load(content)["w"], weight.detach())


def test_a_dtype_that_no_file_keeps_is_an_error():
    message = "'w' has dtype torch.complex128, and a file keeps I64, F64"
    with pytest.raises(lorafx.ConfigError, match=message):
        safetensors_bytes({"w": torch.zeros(3, dtype=torch.complex128)}, {})


def test_half_of_a_surrogate_pair_is_an_error():
    with pytest.raises(UnicodeEncodeError):
        safetensors_bytes({}, {"a": "\ud800"})
