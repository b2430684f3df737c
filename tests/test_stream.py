"""Merging on a disk: the same bits as lorafx.merge, and a refusal for all that is unclear."""

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from oracle import randomise
from stream_files import error, files, read_folder, same, save_sharded, small_files
from torch import nn

import lorafx
from lorafx import _checkpoint
from lorafx.__main__ import main


class Turned(nn.Module):
    """y = x W, W stored as (in, out)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


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
    "a": dict(rank=2, alpha=3.0, targets=["qkv[q]", "qkv[0:4]", "turned", "*square", "experts", "back",
                                          "in_proj_weight[v]"]),
    "b": dict(rank=3, alpha=1.0, targets=["qkv[5:12]", "turned", "back", "attention.out_proj"], trainable="head"),
    "t": dict(rank=2, targets=["turned", "*square"]),
}
WAYS = {"a": (["a"], {}), "b": (["b"], {}), "both": (["--adapter", "a=0.7", "--adapter", "b"], {"a": 0.7, "b": 1.0}),
        "negative": (["--adapter", "a=-0.3", "--adapter", "t=2"], {"a": -0.3, "t": 2.0})}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def made(request, tmp_path, monkeypatch):
    """A base, and adapters for it in files a, b, t beside the checkpoints."""
    monkeypatch.chdir(tmp_path)
    base = Model().to(request.param)
    for name, config in ADAPTERS.items():
        lorafx.save(randomise(lorafx.inject(base, **config, adapter=name), ord(name)), f"{name}.safetensors")
    return base


def named(arguments: list[str]) -> list[str]:
    """The arguments with the adapters' files in the place of their names."""
    return [a if a.startswith("-") else a.replace(a[0], f"{a[0]}.safetensors", 1) for a in arguments]


def merged(base: nn.Module, weights: dict[str, float]) -> dict[str, torch.Tensor]:
    model = base
    for name in weights:
        model = lorafx.load(model, f"{name}.safetensors")
    return dict(lorafx.merge(model, weights).state_dict())


@pytest.mark.parametrize("way", WAYS)
def test_the_same_bits_as_in_memory(made, way):
    arguments, weights = WAYS[way]
    arguments, state = named(arguments), dict(made.state_dict())
    wanted = merged(made, weights or {way: 1.0})
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
    """More rows than are summed, or read, at a time, the last of them fewer; and an adapter of some rows only."""
    monkeypatch.chdir(tmp_path)
    base = nn.Sequential(nn.Linear(1009, 5003), nn.Linear(5003, 1511)).bfloat16()
    lorafx.save(randomise(lorafx.inject(base, rank=5, targets=["0[700:4900]", "1"])), "a.safetensors")
    safetensors.torch.save_file(dict(base.state_dict()), "base.safetensors")
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        wanted = dict(lorafx.merge(lorafx.load(base, "a.safetensors")).state_dict())
        torch.set_num_threads(before)
        assert main(["merge", "base.safetensors", "a.safetensors", "-o", f"{threads}.safetensors", "--threads",
                     str(threads)]) == 0
        assert same(safetensors.torch.load_file(f"{threads}.safetensors"), wanted)
        assert torch.get_num_threads() == before
        assert main(["merge", "base.safetensors", "a.safetensors", "-o", f"{threads}w.safetensors", "--threads",
                     str(threads), "--dtype", "float32"]) == 0
        wide = dict(lorafx.merge(lorafx.load(copy.deepcopy(base).float(), "a.safetensors")).state_dict())
        assert same(safetensors.torch.load_file(f"{threads}w.safetensors"), wide)


def test_what_no_adapter_touches_is_copied_byte_for_byte(made):
    folder = save_sharded(dict(made.state_dict()), Path("base"), 14)
    assert main(["merge", "base", "t.safetensors", "-o", "out"]) == 0
    places = json.loads((folder / _checkpoint.INDEX).read_text())["weight_map"]
    changed = {places["turned.weight"], places["square.weight"]}
    before, after = files(folder), files(Path("out"))
    assert {name for name in before if before[name] != after[name]} == changed


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_another_dtype_is_rounded_to_once(made, dtype):
    state, to = dict(made.state_dict()), getattr(torch, dtype)
    more = {"scalar": torch.tensor(1.2345678), "none": torch.empty(0, 5), "double": torch.rand(3).double(),
            "flags": torch.tensor([True, False])}
    wanted, state = merged(made.float(), {"a": 1.0}) | more, state | more
    folder = save_sharded(state, Path("base"), 2)
    torch.save(state, "base.pth")
    assert main(["merge", "base", "a.safetensors", "-o", "out", "--dtype", dtype]) == 0
    assert main(["merge", "base.pth", "a.safetensors", "-o", "out.pth", "--dtype", dtype]) == 0
    wanted = {name: tensor.to(to) if tensor.is_floating_point() else tensor for name, tensor in wanted.items()}
    assert same(read_folder(Path("out")), wanted) and same(torch.load("out.pth"), wanted)
    index = json.loads(Path("out", _checkpoint.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in wanted.values())
    assert json.loads(Path("out", "config.json").read_text()) == {"tie_word_embeddings": False, "dtype": dtype}
    assert json.loads(Path(folder, "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("theirs, ours", [("module.", ""), ("", "_orig_mod.module."), ("module.", "model."),
                                          ("", "model.")])
def test_prefixes_of_wrappers(made, theirs, ours):
    wanted, adapter = merged(made, {"t": 1.0}), safetensors.torch.load_file("t.safetensors")
    header = safetensors.safe_open("t.safetensors", "pt").metadata()
    for site in ("turned", "square"):
        header["adapter"] = header["adapter"].replace(f'"{site}"', f'"{theirs}{site}"')
    safetensors.torch.save_file({theirs + name: tensor for name, tensor in adapter.items()}, "p.safetensors", header)
    safetensors.torch.save_file({ours + name: tensor for name, tensor in made.state_dict().items()}, "base.safetensors")
    assert main(["merge", "base.safetensors", "p.safetensors", "-o", "out.safetensors"]) == 0
    assert same(safetensors.torch.load_file("out.safetensors"), {ours + name: t for name, t in wanted.items()})


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return small_files(tmp_path)


# Ties.

def test_a_tied_head(tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    config = transformers.LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, vocab_size=31,
                                      num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True)
    base = transformers.LlamaForCausalLM(config).eval()
    base.save_pretrained("base")
    capsys.readouterr()
    model = randomise(lorafx.inject(base, rank=2, targets=["q_proj", "lm_head"]))
    lorafx.save(model, "a.safetensors")
    assert main(["merge", "base", "a.safetensors", "-o", "out"]) == 2
    assert "'lm_head' is tied to 'model.embed_tokens.weight'" in error(capsys)
    assert main(["merge", "base/model.safetensors", "a.safetensors", "-o", "o.safetensors", "--untie"]) == 2
    assert "merge the folder 'base'" in error(capsys)
    assert main(["merge", "base", "a.safetensors", "-o", "out", "--untie"]) == 0
    read = transformers.LlamaForCausalLM.from_pretrained("out")
    assert not read.config.tie_word_embeddings
    assert same(read.state_dict(), lorafx.merge(model, untie=True).state_dict())
    assert main(["merge", "out", "a.safetensors", "-o", "again"]) == 0


def test_config_says_tied(small, capsys):
    def says(config):
        Path("base/config.json").write_text(json.dumps(config))
        shutil.rmtree("out", ignore_errors=True)
        return [main(["merge", "base", "a.safetensors", "-o", "out", *untie]) for untie in ([], ["--untie"])]

    assert says({"tie_word_embeddings": True, "vocab_size": 6}) == [2, 2]  # which other is not known
    assert "is tied to another that 'base' does not hold" in capsys.readouterr().err
    assert says({"vocab_size": 6}) == [2, 2] and "may be tied to another" in capsys.readouterr().err
    assert says({"text": {"tie_word_embeddings": False}, "vocab_size": 6})[0] == 0
    assert says({"tie_word_embeddings": True, "vocab_size": 7})[0] == 0


@pytest.mark.parametrize("whole", [False, True])
def test_memory_that_tensors_of_torch_save_share(small, whole, capsys):
    flat = torch.randn(24 + 18 + 3)
    torch.save({"0.weight": flat[:24].view(6, 4), "0.bias": torch.ones(6), "1.weight": flat[24:42].view(3, 6),
                "1.bias": flat[42:], "tied": flat[24:42].view(3, 6)}, "tied.pth")
    arguments = ["merge", "tied.pth", "h.safetensors" if whole else "a.safetensors", "-o", "out.pth"]
    if not whole:
        assert main(arguments) == 2
        assert "'1.weight' of 'tied.pth' is tied to 'tied'" in error(capsys)
        arguments.append("--untie")
    assert main(arguments) == 0
    out = torch.load("out.pth")
    assert torch.equal(out["tied"], flat[24:42].view(3, 6)) is not whole
    assert (out["tied"].data_ptr() == out["1.weight"].data_ptr()) is whole
    assert main(["merge", "tied.pth", "t.safetensors", "-o", "cast.pth", "--dtype", "bfloat16"]) == 0
    out = torch.load("cast.pth")
    assert out["tied"].data_ptr() == out["1.weight"].data_ptr() and out["tied"].dtype == torch.bfloat16
