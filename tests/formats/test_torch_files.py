"""Files of torch.save: what torch writes is read, and nothing in a pickle runs."""

import io
import os
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorafx
from tests.support.adapter_files import Model, injected


def test_nothing_in_a_pickle_runs(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"up.lora.A.weight": Bomb()}, tmp_path / "a.pth")
    with pytest.raises(
        lorafx.FormatError, match="holds more than tensors: torch.load with .* does not let it in"
    ):
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


def test_a_pickle_that_names_a_tensor_twice(tmp_path: Path) -> None:
    path, buffer = tmp_path / "a.pth", io.BytesIO()
    lorafx.save(injected(), path)
    torch.save(
        torch.load(path)
        | {"no.lora.B.weight": torch.ones(5, 2), "no.lora.A.weight": torch.ones(2, 5)},
        path,
    )
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(buffer, "w") as made:
        for name in source.namelist():
            made.writestr(name, source.read(name).replace(b"no.lora", b"up.lora"))
    path.write_bytes(buffer.getvalue())
    assert len(torch.load(path)) == 4
    with pytest.raises(
        lorafx.FormatError,
        match="it names a tensor twice, or holds more data than its tensors have",
    ):
        lorafx.load(Model(), path)


FLAT = {"up.lora.A.weight": torch.ones(2, 5), "up.lora.B.weight": torch.ones(5, 2)}
NESTED: dict[str, dict[str, Any]] = {
    "state_dict": {"state_dict": FLAT, "hyper_parameters": {"lr": 0.1}},
    "model": {"epoch": 3, "model": FLAT},
    "module": {"module": OrderedDict(FLAT),
               "optimizer": {"state": {0: {"exp_avg": torch.zeros(2, 5)}}, "a": [torch.zeros(1)]}},
    "several": {"model": FLAT, "ema": {"up.weight": torch.zeros(3)}, "step": torch.zeros(())},
    "deeper": {"training": {"net": FLAT, "epoch": 1}},
}


@pytest.mark.parametrize("kind", NESTED)
def test_an_adapter_in_a_checkpoint_of_a_training_run(tmp_path: Path, kind: str) -> None:
    torch.save(NESTED[kind], tmp_path / "run.pth")
    loaded = lorafx.load(Model(), tmp_path / "run.pth")
    assert all(tensor.eq(1).all() for tensor in lorafx.parameters(loaded))


HALF = {"up.lora.A.weight": torch.ones(2, 5)}
UNCLEAR: dict[str, tuple[dict[str, Any], str]] = {
    "two": (
        {"model": FLAT, "ema": FLAT},
        "'{path}' holds tensors under 'model', 'ema': save the part that is meant by itself, "
        "torch.save(content['model'], ...)."),
    "one and around it": (
        {**FLAT, "ema": FLAT},
        "'{path}' holds tensors under 'ema': save that part by itself, "
        "torch.save(content['ema'], ...)."),
    "none": (
        {"epoch": 1, "net": {"part": {"up.weight": torch.zeros(5, 5)}}},
        "'{path}' holds tensors under 'net.part': save that part by itself, "
        "torch.save(content['net']['part'], ...)."),
    "half": (
        {"epoch": 1, "net": HALF},
        "Under 'net', '{path}' has 'up.lora.A.weight' but not its other half."),
    "not finite": (
        {"net": FLAT | {"up.lora.B.weight": torch.full((5, 2), torch.inf)}},
        "'{path}', under 'net', cannot be loaded: 'up.lora.B' has NaN or infinite values, which "
        "lorafx.load lets in with allow_nonfinite=True."),
}


@pytest.mark.parametrize("kind", UNCLEAR)
def test_a_checkpoint_says_which_part_is_meant(tmp_path: Path, kind: str) -> None:
    content, message = UNCLEAR[kind]
    path = tmp_path / "run.pth"
    torch.save(content, path)
    with pytest.raises(lorafx.FormatError) as caught:
        lorafx.load(Model(), path)
    assert str(caught.value) == message.format(path=path)


def test_the_part_that_is_named_loads(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "model": FLAT}, tmp_path / "run.pth")
    torch.save(torch.load(tmp_path / "run.pth")["model"], tmp_path / "part.pth")
    assert [
        site.name for site in lorafx.summary(lorafx.load(Model(), tmp_path / "part.pth")).sites
    ] == ["up"]


def test_dicts_without_named_tensors_are_no_part(tmp_path: Path) -> None:
    itself: dict[str, Any] = {}
    itself["again"] = itself
    for content in ({"epoch": 3, "config": {"lr": 0.1}}, {"state": {0: torch.zeros(2)}}, itself):
        torch.save(content, tmp_path / "run.pth")
        with pytest.raises(
            lorafx.FormatError, match="save the state_dict by itself|names a tensor twice"
        ):
            lorafx.load(Model(), tmp_path / "run.pth")
