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


FLAT = {"up.lora.A.weight": torch.zeros(2, 5), "up.lora.B.weight": torch.zeros(5, 2)}
NESTED: dict[str, tuple[dict[str, Any], str]] = {
    "state_dict": (
        {"state_dict": FLAT, "hyper_parameters": {"lr": 0.1}},
        "under 'state_dict': save that part by itself, torch.save(content['state_dict'], ...).",
    ),
    "model": (
        {"epoch": 3, "model": FLAT},
        "under 'model': save that part by itself, torch.save(content['model'], ...).",
    ),
    "module": (
        {"module": OrderedDict(FLAT), "optimizer": {"state": {0: {"exp_avg": torch.zeros(2, 5)}}}},
        "under 'module': save that part by itself, torch.save(content['module'], ...).",
    ),
    "several": (
        {"model": FLAT, "ema": {"up.weight": torch.zeros(3)}, "step": torch.zeros(())},
        "under 'model', 'ema': save the part that is meant by itself, "
        "torch.save(content['model'], ...).",
    ),
    "deeper": (
        {"training": {"net": FLAT, "epoch": 1}},
        "under 'training.net': save that part by itself, "
        "torch.save(content['training']['net'], ...).",
    ),
}


@pytest.mark.parametrize("kind", NESTED)
def test_a_checkpoint_of_a_training_run_says_which_part_holds_the_tensors(
    tmp_path: Path, kind: str
) -> None:
    content, message = NESTED[kind]
    torch.save(content, tmp_path / "run.pth")
    with pytest.raises(lorafx.FormatError) as caught:
        lorafx.load(Model(), tmp_path / "run.pth")
    assert str(caught.value) == f"'{tmp_path / 'run.pth'}' holds tensors {message}"


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
