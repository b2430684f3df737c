"""Set-ups of FSDP2 (fully_shard): adapters saved from a sharded model, and runs resumed."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, set_model_state_dict
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import lorafx
from lorafx import _save as save_module
from tests.support.communication import Communication
from tests.support.sharded import (
    adapted, batches, decoder, largest_difference, one_process, train)
from tests.support.torchrun import setup


def shard(model: Any, **policy: Any) -> Any:
    """Each layer, then the root, as everybody does it."""
    for layer in model.layers:
        fully_shard(layer, **policy)
    return fully_shard(model, **policy)


@contextmanager
def shared_folder() -> Iterator[Path]:
    """A new folder that all processes see."""
    made = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(made)
    yield Path(made[0])
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(made[0])


def whole_values(model: Any) -> dict[str, Tensor]:
    """All of an adapter's tensors, gathered by torch alone."""
    found = {}
    for name, parameter in lorafx.named_parameters(model):
        assert isinstance(parameter, DTensor), name
        found[name] = parameter.detach().full_tensor()
    return found


def with_values(model: Any, values: dict[str, Tensor]) -> Any:
    """A model of one process with these values in its adapter."""
    with torch.no_grad():
        for name, parameter in lorafx.named_parameters(model):
            parameter.copy_(values[name])
    return model


@setup
def saved_files_are_the_same_bytes() -> dict[str, int]:
    """Before training, after training, after an eval pass, to each format, without the base."""
    model = shard(adapted())
    with shared_folder() as folder:
        for moment in ("fresh", "trained", "evaluated"):
            if moment == "trained":
                train(model, lorafx.parameters(model))
            if moment == "evaluated":
                with torch.no_grad():
                    model.eval()(batches()[0])
            for ending in (".safetensors", ".pth", ""):
                path = folder / f"{moment}{ending}"
                with Communication() as communication:
                    lorafx.save(model, path)
                assert path.exists()  # for every process, as soon as it is back
                values = whole_values(model)
                assert communication.gathered == sum(value.nbytes for value in values.values())
                if dist.get_rank() == 0:
                    alone = folder / "alone" / path.name
                    lorafx.save(with_values(adapted(), values), alone)
                    _same_files(path, alone)
    return {"gathered": communication.gathered}


def _same_files(ours: Path, theirs: Path) -> None:
    if ours.is_dir():
        assert {file.name for file in ours.iterdir()} == {file.name for file in theirs.iterdir()}
        for file in ours.iterdir():
            assert file.read_bytes() == (theirs / file.name).read_bytes(), file
    else:
        assert ours.read_bytes() == theirs.read_bytes(), ours


@setup
def mixed_precision_saves_float32() -> None:
    model = shard(adapted(), mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    with torch.no_grad():
        model(batches()[0])
    with shared_folder() as folder:
        lorafx.save(model, folder / "adapter.safetensors")
        kept = adapted()
        loaded = lorafx.load(decoder(), folder / "adapter.safetensors")
        values = dict(lorafx.named_parameters(loaded))
        for name, parameter in lorafx.named_parameters(kept):
            assert torch.equal(values[name], parameter)


@setup
def an_error_of_the_first_process_is_raised_in_all() -> list[str]:
    model, found = shard(adapted()), []
    with shared_folder() as folder:
        if dist.get_rank() == 0:
            (folder / "taken.pth").mkdir()
        dist.barrier()
        with pytest.raises(lorafx.FormatError, match="is a folder: name a file in it") as caught:
            lorafx.save(model, folder / "taken.pth")
        found.append(str(caught.value))
        with pytest.MonkeyPatch.context() as patch:
            if dist.get_rank() == 0:
                patch.setattr(save_module, "write_adapter", _full_disk)
            with pytest.raises(OSError, match="No space left on device"):
                lorafx.save(model, folder / "adapter.safetensors")
        lorafx.save(model, folder / "adapter.safetensors")  # and all are in step again
    return found


def _full_disk(*_: Any) -> None:
    raise OSError(28, "No space left on device")


@setup
def what_each_process_has_whole_each_saves() -> None:
    """Whoever calls save on a model that is not spread waits for nobody."""
    model = adapted()
    with tempfile.TemporaryDirectory() as folder:
        if dist.get_rank() == 1:
            lorafx.save(model, Path(folder) / "adapter.safetensors")
            assert (Path(folder) / "adapter.safetensors").exists()


@setup
def a_run_is_resumed() -> float:
    alone = one_process(adapted())
    with shared_folder() as folder:
        path = folder / "run.safetensors"
        model = shard(adapted())
        optimizer = torch.optim.AdamW(lorafx.parameters(model), lr=1e-2)
        losses = train(model, (), optimizer=optimizer, steps=slice(2))
        lorafx.save(model, path, optimizer=optimizer, step=2)
        model = shard(lorafx.load(decoder(), path))
        with torch.no_grad():
            model(batches()[0])  # its parameters are whole now
        optimizer = torch.optim.AdamW(lorafx.parameters(model), lr=1e-2)
        assert lorafx.resume(model, optimizer, path) == 2
        losses += train(model, (), optimizer=optimizer, steps=slice(2, None))
        dist.barrier()
        one = lorafx.load(decoder(), path)  # and a run of many goes on in one
        optimizer = torch.optim.AdamW(lorafx.parameters(one), lr=1e-2)
        lorafx.resume(one, optimizer, path)
        rest = train(one, (), split=False, optimizer=optimizer, steps=slice(2, None))
    found = max(largest_difference(losses, alone), largest_difference(rest, alone[2:]))
    assert found < 1e-5
    return found


@setup
def a_state_dict_that_torch_gathers_is_an_adapter() -> None:
    """With its scale; and a state_dict in parts, or of the first process, fits the same adapter."""
    model, alone = shard(adapted(alpha=5)), adapted(alpha=5)
    values = whole_values(model)
    whole = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    parts = get_model_state_dict(model)
    scales = [name for name in parts if name.endswith(".s")]
    assert len(scales) == len(lorafx.summary(model).sites)
    assert all(isinstance(parts[name], DTensor) for name in scales)
    with shared_folder() as folder:
        if dist.get_rank() == 0:
            torch.save({"model": whole}, folder / "run.pt")
            loaded = lorafx.load(decoder(), folder / "run.pt")
            tokens = batches()[0]
            assert torch.equal(loaded(tokens), with_values(alone, values)(tokens))
        dcp.save({"model": parts}, checkpoint_id=folder / "parts")
        other = shard(lorafx.inject(decoder(), targets="linear", rank=4, alpha=5))
        found = get_model_state_dict(other)
        dcp.load({"model": found}, checkpoint_id=folder / "parts")
        set_model_state_dict(other, found)
        for name, tensor in whole_values(other).items():
            assert torch.equal(tensor, values[name])
    again = shard(lorafx.inject(decoder(), targets="linear", rank=4, alpha=5))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(again, whole if dist.get_rank() == 0 else {}, options=options)
    for name, tensor in whole_values(again).items():
        assert torch.equal(tensor, values[name])
    with pytest.raises(RuntimeError, match="the scale, is 1.25, and here it is 1:"):
        set_model_state_dict(shard(adapted()), parts)
