"""Checkpoints of injected models, as torch and transformers write them, load as adapters."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import lorafx
from tests.support.adapter_files import Model
from tests.support.oracle import randomise


class Net(nn.Module):
    """A layer under two names, a weight by itself, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.again = self.layers[0]
        self.w = nn.Parameter(torch.randn(6, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.layers, self.again):
            x = x + layer(x)
        return self.head(nn.functional.linear(x, self.w))


X = torch.randn(4, 6)


def injected(net: nn.Module, adapter: str = "default", **config: Any) -> nn.Module:
    config = {"rank": 2, "targets": "square", "trainable": "head", "alpha": 3} | config
    return randomise(lorafx.inject(net, adapter=adapter, **config))


def without_copies(model: nn.Module) -> dict[str, Tensor]:
    """As safetensors needs it: no tensor under two names."""
    return {name: tensor for name, tensor in model.state_dict().items() if "again" not in name}


def sharded(model: nn.Module, folder: Path, ending: str, index: str) -> Path:
    folder.mkdir()
    places = {}
    names = [*without_copies(model)]
    for number, part in enumerate((names[::2], names[1::2])):
        shard = f"shard-{number}{ending}"
        tensors = {name: model.state_dict()[name].clone() for name in part}
        if ending == ".bin":
            torch.save(tensors, folder / shard)
        else:
            safetensors.torch.save_file(tensors, folder / shard)
        places |= dict.fromkeys(part, shard)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def alone(name: str) -> Callable[[nn.Module, Path], Path]:
    def write(model: nn.Module, folder: Path) -> Path:
        (folder / name).parent.mkdir(exist_ok=True)
        if name.endswith(".safetensors"):
            safetensors.torch.save_file(without_copies(model), folder / name)
        else:
            torch.save(model.state_dict(), folder / name)
        return folder / name
    return write


def nested(model: nn.Module, folder: Path) -> Path:
    optimizer = {"state": {0: {"exp_avg": torch.zeros(2, 6), "step": torch.tensor(1.0)}},
                 "param_groups": [{"betas": (0.9, 0.999), "params": [0]}]}
    torch.save({"epoch": 3, "model": model.state_dict(), "optimizer": optimizer,
                "ema": {"head.weight": torch.zeros(3, 6)}}, folder / "run.pt")
    return folder / "run.pt"


WAYS: dict[str, Callable[[nn.Module, Path], Path]] = {
    "safetensors": alone("m.safetensors"), "pth": alone("m.pth"), "bin": alone("m.bin"),
    "folder": lambda model, folder: alone("run/model.safetensors")(model, folder).parent,
    "folder with bin": lambda model, folder: alone("r/pytorch_model.bin")(model, folder).parent,
    "shards": lambda model, folder: sharded(
        model, folder / "run", ".safetensors", "model.safetensors.index.json"),
    "shards of bin": lambda model, folder: sharded(
        model, folder / "run", ".bin", "pytorch_model.bin.index.json"),
    "nested": nested,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_state_dict_is_an_adapter(tmp_path: Path, way: str) -> None:
    """Its scale, its trained head, a layer's two names, and the base's tensors left where they are.
    """
    net = Net()
    model = injected(net)
    path = WAYS[way](model, tmp_path)
    loaded = lorafx.load(net, path)
    assert torch.equal(loaded(X), model(X)) and not torch.equal(loaded(X), net(X))
    assert [row.scales for row in lorafx.summary(loaded).sites] == [{"default": 1.5}] * 3
    lorafx.save(loaded, tmp_path / "again.safetensors")
    assert torch.equal(lorafx.load(net, tmp_path / "again.safetensors")(X), model(X))


def test_one_of_several_adapters(tmp_path: Path) -> None:
    net, path = Net(), tmp_path / "m.pth"
    model = injected(net, "french", trainable=())
    lorafx.add(model, "german", 3)
    randomise(model)
    torch.save(model.state_dict(), path)
    with pytest.raises(lorafx.FormatError, match="has 'french', 'german': name one with adapter="):
        lorafx.load(net, path)
    with pytest.raises(lorafx.FormatError, match="has 'french', 'german'"):
        lorafx.load(net, path, adapter="other")
    lorafx.activate(model, "german")
    assert torch.equal(lorafx.load(net, path, adapter="german")(X), model(X))


def test_a_state_dict_keeps_the_scale_apart_from_casts() -> None:
    """`s` is written where it is not 1, and what is loaded must have the same."""
    net = Net()
    assert not any(name.endswith(".s") for name in injected(net, alpha=2).state_dict())
    model, other = injected(net, alpha=0.2), injected(net, alpha=0.2)
    for state in (model.state_dict(), copy.deepcopy(model).half().state_dict()):
        assert state["w"].dtype in (torch.float32, torch.float16)
        assert state["layers.0.lora.default.s"].dtype == torch.float64
        for assign in (False, True):
            assert not any(other.load_state_dict(state, assign=assign))
    halves = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    assert not any(other.load_state_dict(halves))
    old = {name: tensor for name, tensor in model.state_dict().items() if name[-2:] != ".s"}
    assert not any(other.load_state_dict(old))
    with pytest.raises(RuntimeError, match="the scale, is 0.1, and here it is 1: make this adap"):
        injected(net, alpha=2).load_state_dict(model.state_dict())
    moved = injected(net, alpha=0.2).to_empty(device="meta")
    assert not any(moved.load_state_dict(model.state_dict(), assign=True))
    assert torch.equal(moved(X), model(X))


class Attends(nn.Module):
    """Sites that are blocks of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


def test_blocks_of_rows(tmp_path: Path) -> None:
    net, x = Attends(), torch.randn(2, 3, 6)
    model = injected(net, trainable=(), targets="linear")
    torch.save(model.state_dict(), tmp_path / "m.pth")
    assert torch.equal(lorafx.load(net, tmp_path / "m.pth")(x), model(x))


def test_functional_calls_take_a_state_dict() -> None:
    net, x = Attends(), torch.randn(2, 3, 6)
    model = injected(net, trainable=(), targets="linear")
    other = lorafx.inject(net, rank=2, alpha=3, targets="linear")
    found = torch.func.functional_call(other, model.state_dict(), (x,))
    torch.testing.assert_close(found, model(x))
    assert not torch.allclose(found, net(x), atol=0.1)
    wrong = model.state_dict() | {"attention.out_proj.lora.default.s": torch.tensor(2.0)}
    with pytest.raises(lorafx.AdapterError, match="The scale is 2.0, and here it is 1.5"):
        torch.func.functional_call(other, wrong, (x,))


def test_only_the_adapter_is_read(tmp_path: Path) -> None:
    """Not the base's data, which may be large, nor its dtypes, which torch may lack."""
    net, path = Net(), tmp_path / "m.safetensors"
    model = injected(net)
    safetensors.torch.save_file(
        without_copies(model) | {"mask": torch.ones(2, dtype=torch.bool),
                                 "eighth": torch.ones(2).to(torch.float8_e4m3fn)}, path)
    assert torch.equal(lorafx.load(net, path)(X), model(X))


def _lacks(model: nn.Module, path: Path) -> None:
    state = without_copies(model)
    del state["w"], state["layers.0.lora.default.B"]
    safetensors.torch.save_file(state, path)


def _has_a_long_scale(model: nn.Module, path: Path) -> None:
    safetensors.torch.save_file(without_copies(model) | {
        "layers.0.lora.default.s": torch.ones(2)}, path)


def _has_a_number_beyond_float32(model: nn.Module, path: Path) -> None:
    safetensors.torch.save_file(without_copies(model) | {
        "layers.0.lora.default.s": torch.tensor(1e300, dtype=torch.float64)}, path)


def _has_no_number(model: nn.Module, path: Path) -> None:
    safetensors.torch.save_file(without_copies(model) | {
        "layers.0.lora.default.s": torch.tensor(torch.inf)}, path)


@pytest.mark.parametrize("write, message", [
    (_lacks, "has only A, s of 'layers.0'"), (_has_a_long_scale, "a scale of shape"),
    (_has_a_number_beyond_float32, "the scale is 1e.300"), (_has_no_number, "the scale is inf")])
def test_damaged_state_dicts(
    tmp_path: Path, write: Callable[[nn.Module, Path], None], message: str
) -> None:
    write(injected(Net()), tmp_path / "m.safetensors")
    with pytest.raises(lorafx.FormatError, match=message):
        lorafx.load(Net(), tmp_path / "m.safetensors")


def test_damaged_folders(tmp_path: Path) -> None:
    index = "model.safetensors.index.json"
    folder = sharded(injected(Net()), tmp_path / "run", ".safetensors", index)
    content = json.loads((folder / index).read_text())
    for change, message in (
        ({"x.lora.default.A": "shard-0.safetensors"}, "do not both have 'x.lora.default.A'"),
        ({"w.lora.default.A": "../m.safetensors"}, "which is not a file in its folder"),
        ({"w.lora.default.A": "no.safetensors"}, "cannot be read"), (None, "has no weight_map"),
    ):
        places = None if change is None else content["weight_map"] | change
        (folder / index).write_text(json.dumps({"weight_map": places}))
        with pytest.raises(lorafx.FormatError, match=message):
            lorafx.load(Net(), folder)


def test_a_model_s_folder_without_an_adapter_says_what_it_lacks(tmp_path: Path) -> None:
    safetensors.torch.save_file(Model().state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(lorafx.FormatError, match="has no adapter_config.json"):
        lorafx.load(Model(), tmp_path)


@pytest.mark.filterwarnings("ignore")  # torch's, of one process
def test_a_distributed_checkpoint_says_how_it_becomes_a_file(tmp_path: Path) -> None:
    """Of a Trainer with FSDP2; the file that torch makes of it loads."""
    net, run = Net(), tmp_path / "checkpoint-5"
    model = injected(net)
    dcp.save({"model": without_copies(model)}, checkpoint_id=run / "pytorch_model_fsdp_0")
    with pytest.raises(lorafx.FormatError, match=r"fsdp_0' is a checkpoint of .*dcp_to_torch_save"):
        lorafx.load(net, run)
    dcp_to_torch_save(run / "pytorch_model_fsdp_0", tmp_path / "model.pth")
    assert torch.equal(lorafx.load(net, tmp_path / "model.pth")(X), model(X))


def test_buffers_of_what_is_trained_whole_come_back(tmp_path: Path) -> None:
    """As BatchNorm's count of batches, which is an integer, and a mask that has infinities."""
    norm = nn.BatchNorm1d(6)
    norm.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    net = nn.Sequential(nn.Linear(6, 6), norm)
    model = injected(net, trainable="1")
    model(X)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    loaded = lorafx.load(net, tmp_path / "model.pt")
    assert int(loaded[1].trained.default.num_batches_tracked) == 1
    assert torch.equal(loaded.eval()(X), model.eval()(X))
