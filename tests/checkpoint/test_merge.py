"""Merging on a disk: the same bits as lorafx.merge, and a refusal for all that is unclear."""

import copy
import json
import os
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import lorafx
from tests.support.checkpoints import Turned, files, read_folder, same, save_sharded
from tests.support.command_line import main
from tests.support.internals import INDEX, LARGEST_SUM, watch_sums
from tests.support.oracle import randomise


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)
        self.turned, self.square = Turned(6, 10), Turned(10, 10)
        self.experts = nn.Parameter(torch.randn(3, 7, 10))
        self.back = nn.Linear(7, 6)
        self.attention = nn.MultiheadAttention(6, 2)
        self.head = nn.Linear(6, 5)
        self.register_buffer("count", torch.arange(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        x = self.square(self.turned(q * k + v))
        x = torch.bmm(x, self.experts.mT)
        x = self.back(torch.tanh(x))
        return self.head(self.attention(x, x, x)[0])


ADAPTERS = {
    "a": dict(
        rank=2, alpha=3.0,
        targets=["qkv[q]", "qkv[0:4]", "turned", "*square", "experts", "back", "in_proj_weight[v]"]
    ),
    "b": dict(
        rank=3, alpha=1.0, targets=["qkv[5:12]", "turned", "back", "attention.out_proj"],
        trainable="head"
    ),
    "t": dict(rank=2, targets=["turned", "*square"]),
    "r": dict(
        rank=2, targets=["turned", "head"],
        trainable=["head.weight[1,2]", "square.weight[0,4:7]", "qkv.bias[3:5]"]
    ),
}
SELECTIONS = {
    "a": (["a"], {}),
    "b": (["b"], {}),
    "r": (["r"], {}),
    "rows and a": (["--adapter", "r", "--adapter", "a=2"], {"r": 1.0, "a": 2.0}),
    "both": (["--adapter", "a=0.7", "--adapter", "b"], {"a": 0.7, "b": 1.0}),
    "negative": (["--adapter", "a=-0.3", "--adapter", "t=2"], {"a": -0.3, "t": 2.0}),
}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def made(request, tmp_path, monkeypatch):
    """A base, and adapters for it in files a, b, t beside the checkpoints."""
    monkeypatch.chdir(tmp_path)
    base = Model().to(request.param)
    for name, config in ADAPTERS.items():
        lorafx.save(
            randomise(lorafx.inject(base, **config, adapter=name), ord(name)), f"{name}.safetensors"
        )
    return base


def named(arguments: list[str]) -> list[str]:
    """The arguments with the adapters' files in the place of their names."""
    return [
        a if a.startswith("-") else a.replace(a[0], f"{a[0]}.safetensors", 1) for a in arguments
    ]


def merged(base: nn.Module, weights: dict[str, float]) -> dict[str, torch.Tensor]:
    model = base
    for name in weights:
        model = lorafx.load(model, f"{name}.safetensors")
    return dict(lorafx.merge(model, weights).state_dict())


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_same_bits_as_in_memory(made, selection):
    arguments, weights = SELECTIONS[selection]
    arguments, state = named(arguments), dict(made.state_dict())
    wanted = merged(made, weights or {selection: 1.0})
    assert not same(wanted, state)
    safetensors.torch.save_file(state, "base.safetensors", {"made": "by hand"})
    assert main(["merge", "base.safetensors", *arguments, "-o", "out.safetensors"]) == 0
    assert same(safetensors.torch.load_file("out.safetensors"), wanted)
    with safetensors.safe_open("out.safetensors", "pt") as file:
        assert file.metadata() == {"made": "by hand"}
    torch.save(state, "base.pth")
    assert main(["merge", "base.pth", *arguments, "-o", "new/out.pth"]) == 0
    assert same(torch.load("new/out.pth", weights_only=True), wanted)
    folder = save_sharded(state, Path("base"), 4)
    before = files(folder)
    assert main(["merge", "base", *arguments, "-o", "out"]) == 0
    assert same(read_folder(Path("out")), wanted)
    after = files(Path("out"))
    assert files(folder) == before and after.keys() == before.keys()
    assert all(after[name] == before[name] for name in before if not name.endswith(".safetensors"))
    assert not [name for name in os.listdir() if "partial" in name or name.startswith(".")]


def test_matrices_of_several_blocks(tmp_path, monkeypatch):
    """More rows than are summed or read at a time, the last fewer; an adapter of some rows only."""
    monkeypatch.chdir(tmp_path)
    base = nn.Sequential(nn.Linear(1009, 5003), nn.Linear(5003, 1511)).bfloat16()
    lorafx.save(
        randomise(lorafx.inject(base, rank=5, targets=["0[700:4900]", "1"])), "a.safetensors"
    )
    safetensors.torch.save_file(dict(base.state_dict()), "base.safetensors")
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        wanted = dict(lorafx.merge(lorafx.load(base, "a.safetensors")).state_dict())
        torch.set_num_threads(before)
        merge = ["merge", "base.safetensors", "a.safetensors", "--threads", str(threads)]
        assert main([*merge, "-o", f"{threads}.safetensors"]) == 0
        assert same(safetensors.torch.load_file(f"{threads}.safetensors"), wanted)
        assert torch.get_num_threads() == before
        assert main([*merge, "-o", f"{threads}w.safetensors", "--dtype", "float32"]) == 0
        wide = dict(
            lorafx.merge(lorafx.load(copy.deepcopy(base).float(), "a.safetensors")).state_dict()
        )
        assert same(safetensors.torch.load_file(f"{threads}w.safetensors"), wide)


def test_what_no_adapter_touches_is_copied_byte_for_byte(made):
    folder = save_sharded(dict(made.state_dict()), Path("base"), 14)
    assert main(["merge", "base", "t.safetensors", "-o", "out"]) == 0
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    changed = {places["turned.weight"], places["square.weight"]}
    before, after = files(folder), files(Path("out"))
    assert {name for name in before if before[name] != after[name]} == changed


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_another_dtype_is_rounded_to_once(made, dtype):
    state, to = dict(made.state_dict()), getattr(torch, dtype)
    more = {
        "scalar": torch.tensor(1.2345678),
        "none": torch.empty(0, 5),
        "double": torch.rand(3).double(),
        "flags": torch.tensor([True, False]),
    }
    wanted, state = merged(made.float(), {"a": 1.0}) | more, state | more
    folder = save_sharded(state, Path("base"), 2)
    torch.save(state, "base.pth")
    assert main(["merge", "base", "a.safetensors", "-o", "out", "--dtype", dtype]) == 0
    assert main(["merge", "base.pth", "a.safetensors", "-o", "out.pth", "--dtype", dtype]) == 0
    wanted = {
        name: tensor.to(to) if tensor.is_floating_point() else tensor
        for name, tensor in wanted.items()
    }
    assert same(read_folder(Path("out")), wanted) and same(torch.load("out.pth"), wanted)
    index = json.loads(Path("out", INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in wanted.values())
    assert json.loads(Path("out", "config.json").read_text()) == {
        "tie_word_embeddings": False,
        "dtype": dtype,
    }
    assert json.loads(Path(folder, "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize(
    "theirs, ours",
    [("module.", ""), ("", "_orig_mod.module."), ("module.", "model."), ("", "model.")],
)
def test_prefixes_of_wrappers(made, theirs, ours):
    wanted, adapter = merged(made, {"t": 1.0}), safetensors.torch.load_file("t.safetensors")
    header = safetensors.safe_open("t.safetensors", "pt").metadata()
    for site in ("turned", "square"):
        header["adapter"] = header["adapter"].replace(f'"{site}"', f'"{theirs}{site}"')
    safetensors.torch.save_file(
        {theirs + name: tensor for name, tensor in adapter.items()}, "p.safetensors", header
    )
    safetensors.torch.save_file(
        {ours + name: tensor for name, tensor in made.state_dict().items()}, "base.safetensors"
    )
    assert main(["merge", "base.safetensors", "p.safetensors", "-o", "out.safetensors"]) == 0
    assert same(
        safetensors.torch.load_file("out.safetensors"),
        {ours + name: t for name, t in wanted.items()},
    )


def test_a_folder_of_peft(tmp_path, capsys):
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6))
    model = randomise(lorafx.inject(net, 2, alpha=3, targets=["0", "2[1:4]"]))
    safetensors.torch.save_file(net.state_dict(), tmp_path / "base.safetensors")
    lorafx.save(model, tmp_path / "peft")
    assert main(["merge", *(str(tmp_path / name) for name in ("base.safetensors", "peft")),
                 "-o", str(tmp_path / "out.safetensors")]) == 0
    assert same(safetensors.torch.load_file(tmp_path / "out.safetensors"),
                lorafx.merge(lorafx.load(net, tmp_path / "peft")).state_dict())
    assert main(["show", str(tmp_path / "peft")]) == 0
    assert "'default' (PEFT), 2 sites" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "peft"), str(tmp_path / "a.safetensors")]) == 0
    assert main(["diff", str(tmp_path / "peft"), str(tmp_path / "a.safetensors")]) == 0
    assert main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "new")]) == 2
    assert "PEFT's format depends on the model" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_torch_save_wrote_is_summed_some_rows_at_a_time(here, monkeypatch, dtype):
    """And the archive is whole: checksums are right, storages where a mapping wants them."""
    base = nn.Sequential(
        nn.Linear(1009, 5003), nn.Linear(5003, 1511), nn.Embedding(3, 1009)
    ).bfloat16()
    lorafx.save(
        randomise(lorafx.inject(base, rank=5, targets=["0[700:4900]", "1"])), "a.safetensors"
    )
    state = base.state_dict()
    state.update(
        {
            "part": state["0.weight"].view(-1)[5:9],
            "turned": state["1.weight"].T,
            "none": torch.empty(0, 3),
        }
    )
    torch.save(state, "base.pth")
    sums = watch_sums(monkeypatch)
    assert (
        main(["merge", "base.pth", "a.safetensors", "-o", "out.pth", "--dtype", dtype, "--untie"])
        == 0
    )
    assert 0 < max(sums) <= LARGEST_SUM < state["0.weight"].numel()
    wanted = lorafx.load(base.to(getattr(torch, dtype)), "a.safetensors")
    wanted = {**{name: tensor.to(getattr(torch, dtype)) for name, tensor in state.items()},
              **lorafx.merge(wanted).state_dict()}
    assert torch.load("out.pth")._metadata == state._metadata
    assert same(torch.load("out.pth"), wanted) and same(torch.load("out.pth", mmap=True), wanted)
    with zipfile.ZipFile("out.pth") as archive:
        assert archive.testzip() is None
