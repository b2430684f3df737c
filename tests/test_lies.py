"""Files and models that claim what they do not have: refused with the reason, before anything is allocated for it."""

import io
import json
import os
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from test_formats import Model, edit, edit_about, injected
from torch import nn

import lorafx

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


def zipped(change: Callable[[str, bytes], bytes] = lambda name, data: data, packed: int = zipfile.ZIP_STORED,
           tensors: Any = None) -> bytes:
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
LIES = {
    "header": (lambda: (2**40).to_bytes(8, "little") + b"{}", "header claims 1099511627776 bytes, and the file has"),
    "shape": (lambda: native(x=entry([HUGE], 0, 0)), "claims more than the file's"),
    "offsets": (lambda: native(x=entry([HUGE], 0, 4 * HUGE)), "is not within the file"),
    "empty": (lambda: native(x=entry([HUGE, 0], 0, 0)), "a shape of 2 dimensions claims more than"),
    "overflow": (lambda: native(x=entry([2**32, 2**32], 0, 0)), "claims more than the file's"),
    "negative": (lambda: native(x=entry([-1, -4], 0, 0)), "a shape is not made of sizes"),
    "float": (lambda: native(x=entry([1.0], 0, 4)), "is not within the file"),
    "dtype": (lambda: native(x=entry([1], 0, 0, "C64")), "'x' has dtype 'C64', which is none of F64"),
    "overlap": (lambda: native(x=entry([1], 0, 4), y=entry([1], 0, 4)) + bytes(4), "'y' does not begin where the"),
    "hole": (lambda: native(x=entry([1], 4, 8)) + bytes(8), "'x' does not begin where the tensor before it ends"),
    "more": (lambda: native(x=entry([1], 0, 4)) + bytes(8), "its tensors end at byte"),
    "name": (lambda: native(**{"a\n": entry([1], 0, 4)}) + bytes(4), r"the name 'a\\n' has characters that cannot"),
    "long name": (lambda: native(**{"a" * 501: entry([1], 0, 4)}) + bytes(4), "a name of 501 characters"),
    "twice": (lambda: b"\x10" + bytes(7) + b'{"a": 1, "a": 2}', "'a' stands twice in one JSON object"),
    "metadata": (lambda: native(__metadata__={"a": 1}), "its metadata is not an object of strings"),
    "storage": (lambda: program(b"K\nt", BIG + b"t"), "does not match expected size"),
    "view": (lambda: program(SIZES, BIG + b"K\x05\x86"), "not resizable"),
    "offset": (lambda: program(b"QK\x00", b"QK\x01"), "not resizable"),
    "stride": (lambda: program(b"K\x05K\x01\x86", b"K\x06K\x01\x86"), "not resizable"),
    "expanded": (lambda: program(SIZES, b"K\x32K\x05\x86"), "not resizable"),
    "text": (lambda: program(b"X\x0d\x00\x00\x00", b"X\xff\xff\xff\x7f"), "is damaged or holds more than tensors"),
    "call": (lambda: program(b"torch._utils\n_rebuild_tensor_v2", b"os\nsystem"),
             "torch.load with weights_only=True does not let it in"),
    "packed": (lambda: zipped(packed=zipfile.ZIP_DEFLATED, tensors={"a": torch.zeros(10**6)}), "is compressed or"),
    "member": (lambda: directory(b"\x14\x00\x00\x00" * 2, b"\xff\xff\xff\x7f" * 2), "compressed or claims more"),
    "bits": (lambda: zipped().replace(torch.ones(10).half().numpy().tobytes(), bytes(20)),
             "the checksum of its member 'archive/data/0' is wrong"),
    "before zip": (lambda: bytes((0x80, 2)) + bytes(100), "it is no archive, as torch.save has written them"),
    "one for all": (lambda: program(SIZES + b"q\x08K\x05K\x01\x86", BIG + b"K\x05\x86q\x08K\x00K\x00\x86"),
                    "claims 5000000000000 elements"),
}


@pytest.mark.parametrize("make, message", LIES.values(), ids=LIES)
def test_a_lie_is_found_before_it_costs_memory(
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


def test_nothing_in_a_pickle_runs(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"up.lora.A.weight": Bomb()}, tmp_path / "a.pth")
    with pytest.raises(lorafx.FormatError, match="holds more than tensors: torch.load with .* does not let it in"):
        lorafx.load(Model(), tmp_path / "a.pth")
    assert os.listdir(tmp_path) == ["a.pth"]


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # of any but 2
def test_what_torch_writes_is_read(tmp_path: Path, protocol: int) -> None:
    model, path = injected(), tmp_path / "a.pth"
    lorafx.save(model, path)
    tensors = torch.load(path, weights_only=True)
    whole = torch.stack([tensors["up.lora.A.weight"]] * 3)
    state = OrderedDict(tensors, **{"up.lora.A.weight": whole[1], "up.lora.B.weight": nn.Parameter(
        tensors["up.lora.B.weight"].t().contiguous().t())})
    state._metadata = OrderedDict({"": {"version": 1}})
    torch.save(state, path, pickle_protocol=protocol)
    loaded = lorafx.load(Model(), path)
    for name, tensor in lorafx.named_parameters(loaded):
        assert torch.equal(tensor, state[name.replace("default.", "") + ".weight"].float())


class Odd(torch.Tensor):
    """A class of somebody's own."""


NO_TENSORS = {
    "sparse": (lambda t: t.to_sparse(), "has dtype torch.float32 and layout torch.sparse_coo"),
    "meta": (lambda t: t.to("meta"), "on the meta device and has no values"),
    "complex": (lambda t: t.to(torch.complex64), "has dtype torch.complex64"),
    "quantized": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "has dtype torch.qint8"),
    "expanded": (lambda t: torch.ones(1).expand(t.shape), "is expanded: its elements share memory"),
    "subclass": (lambda t: t.as_subclass(Odd), "is a Odd, of which a file keeps no more than a plain tensor"),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*quantiz")
@pytest.mark.parametrize("make, message", NO_TENSORS.values(), ids=NO_TENSORS)
@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_odd_tensors_are_not_saved(tmp_path: Path, make: Any, message: str, name: str) -> None:
    model = injected()
    factors = model.up.lora.default
    factors._parameters["A"] = nn.Parameter(make(factors.A.detach()), requires_grad=False)
    with pytest.raises(lorafx.FormatError, match=f"'up.lora.A'.*{message}"):
        lorafx.save(model, tmp_path / name)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_not_a_number_only_if_allowed(tmp_path: Path, value: float) -> None:
    lorafx.save(injected(), tmp_path / "a.safetensors")
    edit(tmp_path / "a.safetensors", lambda tensors, header: tensors["up.lora.A"].fill_(value))
    with pytest.raises(lorafx.FormatError, match="'up.lora.A' has NaN or infinite values"):
        lorafx.load(Model(), tmp_path / "a.safetensors")
    loaded = lorafx.load(Model(), tmp_path / "a.safetensors", allow_nonfinite=True)
    assert not loaded.up.lora.default.A.isfinite().any()


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", "c:", "a\nb", "a\x00", "x" * 300, "", ".", "_x", "train"])
def test_names_that_lead_elsewhere(tmp_path: Path, name: str) -> None:
    lorafx.save(injected(), tmp_path / "a.safetensors")
    for call in (lambda: lorafx.inject(Model(), adapter=name),
                 lambda: lorafx.load(Model(), tmp_path / "a.safetensors", name)):
        with pytest.raises(lorafx.ConfigError, match="cannot name an adapter"):
            call()
    edit(tmp_path / "a.safetensors", edit_about(name=name))
    with pytest.raises(lorafx.FormatError, match="cannot name an adapter"):
        lorafx.load(Model(), tmp_path / "a.safetensors")


def test_one_weight_under_two_names(tmp_path: Path) -> None:
    class Tied(Model):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(5, 5)
            self.other.weight = self.up.weight

    path = tmp_path / "a.safetensors"
    tensors = {"up.weight": torch.ones(5, 5), "other.weight": torch.zeros(5, 5)}
    lorafx.save(lorafx.inject(Tied(), targets="head"), path)
    edit(path, lambda t, h: (t.update(tensors), edit_about(trained=list(tensors))(t, h)))
    with pytest.raises(lorafx.MismatchError, match="trained 'other.weight', which in this model is the weight of 'up"):
        lorafx.load(Tied(), path)
    lorafx.save(lorafx.inject(Model(), targets="up"), path)
    edit(path, lambda t, h: (t.update({"up.weight": torch.ones(5, 5)}), edit_about(trained=["up.weight"])(t, h)))
    with pytest.raises(lorafx.MismatchError, match="a trained 'up.weight', which in this model is the weight of 'up'"):
        lorafx.load(Model(), path)


def test_a_reserved_name(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("lorafx:x", nn.Linear(3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self._modules["lorafx:x"](x)

    with pytest.raises(lorafx.FormatError, match="the name 'lorafx:x.lora.A' begins with 'lorafx:', as only"):
        lorafx.save(lorafx.inject(Named()), tmp_path / "a.safetensors")


def test_settings_out_of_range() -> None:
    for settings, message in [({"rank": 2**31}, "rank must be below 2"), ({"alpha": 10**400}, "alpha must be a finite"),
                              ({"rank_pattern": {"a{99999999999}": 2}}, "is not a regular expression"),
                              ({"rslora": 1, "alpha": 1}, "rslora must be True or False, not 1")]:
        with pytest.raises(lorafx.ConfigError, match=message):
            lorafx.inject(Model(), **settings)


def test_safetensors_reads_what_lorafx_writes(tmp_path: Path) -> None:
    model = injected()
    lorafx.save(model, tmp_path / "a.safetensors")
    stored = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert torch.equal(stored["up.lora.A"], model.up.lora.default.A)


def test_a_pickle_that_names_a_tensor_twice(tmp_path: Path) -> None:
    path, buffer = tmp_path / "a.pth", io.BytesIO()
    lorafx.save(injected(), path)
    torch.save(torch.load(path) | {"no.lora.B.weight": torch.ones(5, 2), "no.lora.A.weight": torch.ones(2, 5)}, path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(buffer, "w") as made:
        for name in source.namelist():
            made.writestr(name, source.read(name).replace(b"no.lora", b"up.lora"))
    path.write_bytes(buffer.getvalue())
    assert len(torch.load(path)) == 4
    with pytest.raises(lorafx.FormatError, match="it names a tensor twice, or holds more data than its tensors have"):
        lorafx.load(Model(), path)
