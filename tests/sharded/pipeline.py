"""Set-ups of pipeline stages, cut from an injected model by hand and by torch.export."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import (
    PipelineStage, Schedule1F1B, ScheduleGPipe, SplitPoint, pipeline
)

import lorafx
from tests.support.sharded import (
    Decoder, adapted, assert_same_file, batches, largest_difference, loss_of, one_process,
    shared_folder, train as train_whole
)
from tests.support.torchrun import setup


class Cuttable(Decoder):
    """A decoder that leaves out what was cut from it, as those made for pipelines do."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = tokens if self.embedding is None else self.embedding(tokens)
        for layer in self.layers:
            x = x if layer is None else layer(x)
        return x if self.head is None else self.head(self.norm(x))


def base() -> Cuttable:
    """The same weights in every process, and a layer for each of four stages."""
    torch.manual_seed(1)
    return Cuttable(layers=4)


def cut(model: Any) -> Any:
    """This process's part of the layers; the first has the embedding, and the last the head."""
    stage, stages = dist.get_rank(), dist.get_world_size()
    for number in range(len(model.layers)):
        if number * stages // len(model.layers) != stage:
            model.layers[number] = None
    if stage > 0:
        model.embedding = None
    if stage < stages - 1:
        model.norm = model.head = None
    return model


def train(stage: PipelineStage, schedule: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    """Losses of the five steps of AdamW, a batch in four parts, in every process."""
    found = []
    running = schedule(stage, 4, loss_fn=loss_of)
    for tokens in batches():
        losses: list[Tensor] = []
        optimizer.zero_grad()
        inputs = (tokens,) if stage.is_first else ()
        last = {"target": tokens, "losses": losses} if stage.is_last else {}
        running.step(*inputs, **last)
        optimizer.step()
        mean = torch.stack(losses).mean() if stage.is_last else torch.zeros(())
        dist.broadcast(mean, dist.get_world_size() - 1)
        found.append(float(mean.detach()))
    return found


def staged(model: Any) -> PipelineStage:
    return PipelineStage(model, dist.get_rank(), dist.get_world_size(), torch.device("cpu"))


@setup
def stages_cut_by_hand() -> dict[str, float]:
    """Losses, the file of what was trained, and the same from a file loaded before the cut."""
    alone = adapted(base(), trainable="head")
    found = {}
    with shared_folder() as folder:
        lorafx.save(alone, folder / f"{dist.get_rank()}.safetensors")
        expected = one_process(alone)
        lorafx.save(alone, folder / f"{dist.get_rank()}_trained.safetensors")
        for schedule in (ScheduleGPipe, Schedule1F1B):
            for model in (adapted(base(), trainable="head"),
                          lorafx.load(base(), folder / "0.safetensors")):
                found[schedule.__name__] = _one_run(cut(model), schedule, expected, folder)
    return found


def _one_run(model: Any, schedule: Any, expected: list[float], folder: Path) -> float:
    lorafx.save(model, folder / "stages.safetensors")
    assert_same_file(folder / "stages.safetensors", folder / "0.safetensors")
    optimizer = torch.optim.AdamW(lorafx.parameters(model), lr=1e-2)
    found = largest_difference(train(staged(model), schedule, optimizer), expected)
    assert found < 1e-5
    lorafx.save(model, folder / "stages.safetensors")
    assert_same_file(folder / "stages.safetensors", folder / "0_trained.safetensors",
                     rtol=1e-4, atol=1e-5)
    return found


@setup
def an_adapter_of_one_stage() -> None:
    """All processes save, also that which has all of the adapter, and that which has nothing."""
    whole = adapted(base(), targets="layers.0.*")
    model = cut(adapted(base(), targets="layers.0.*"))
    with shared_folder() as folder:
        lorafx.save(whole, folder / f"{dist.get_rank()}.safetensors")
        lorafx.save(model, folder / "stages.safetensors")
        assert_same_file(folder / "stages.safetensors", folder / "0.safetensors")
        dist.barrier()
        with pytest.raises(OSError):
            lorafx.save(model, folder / "0.safetensors" / "below.safetensors")


@setup
def layers_that_changed_their_names() -> None:
    """del moves those that follow to other numbers, which a file would have them under."""
    model = adapted(base())
    del model.layers[:2]
    with shared_folder() as folder:
        with pytest.raises(lorafx.AdapterError, match="no longer at 'layers.2"):
            lorafx.save(model, folder / "stages.safetensors")
        assert not any(folder.iterdir())


@setup
def adapters_after_the_cut() -> None:
    """Each stage is given its part; what they save together is whole."""
    whole = adapted(base())
    model = cut(adapted(base()))
    for one in (whole, model):
        lorafx.compose(one, {"default": 2.0}, "twice")
    with shared_folder() as folder:
        lorafx.save(whole, folder / f"{dist.get_rank()}.safetensors", "twice")
        lorafx.save(model, folder / "stages.safetensors", "twice")
        assert_same_file(folder / "stages.safetensors", folder / "0.safetensors")


@setup
def stages_that_are_exported() -> float:
    """Their parameters are the model's own, which saves them once it holds no others."""
    alone, model, stages = adapted(base()), adapted(base()), dist.get_world_size()
    ends = range(4 // stages, 4, 4 // stages)
    pipe = pipeline(model, mb_args=(batches()[0][:2],),
                    split_spec={f"layers.{number}": SplitPoint.BEGINNING for number in ends})
    own = pipe.get_stage_module(dist.get_rank())
    trained = [parameter for parameter in own.parameters() if parameter.requires_grad]
    stage = pipe.build_stage(dist.get_rank(), torch.device("cpu"))
    losses = train(stage, ScheduleGPipe, torch.optim.AdamW(trained, lr=1e-2))
    found = largest_difference(losses, one_process(alone))
    assert found < 1e-5
    with shared_folder() as folder:
        with pytest.raises(lorafx.NotInjectedError, match="all other stages set to None"):
            lorafx.save(own, folder / "stages.safetensors")
        lorafx.save(alone, folder / f"{dist.get_rank()}.safetensors")
        lorafx.save(cut(model), folder / "stages.safetensors")
        assert_same_file(folder / "stages.safetensors", folder / "0.safetensors",
                         rtol=1e-4, atol=1e-5)
    return found


@setup
def training_goes_on() -> float:
    """From a file of optimizer and adapter that all stages wrote, each with its part of it."""
    with shared_folder() as folder:
        path = folder / "stages.safetensors"
        model = cut(adapted(base(), trainable="head"))
        stage = staged(model)
        optimizer = torch.optim.AdamW(lorafx.parameters(model), lr=1e-2)
        train(stage, ScheduleGPipe, optimizer)
        lorafx.save(model, path, optimizer=optimizer, step=5)
        alone = adapted(base(), trainable="head")
        whole = torch.optim.AdamW(lorafx.parameters(alone), lr=1e-2)
        train_whole(alone, (), split=False, optimizer=whole)
        lorafx.save(alone, folder / f"{dist.get_rank()}.safetensors", optimizer=whole, step=5)
        if dist.get_rank() == 0:  # whose random generators the file has the states of
            assert_same_file(path, folder / "0.safetensors", rtol=1e-3, atol=1e-5)
        expected = train(stage, ScheduleGPipe, optimizer)
        again = cut(lorafx.load(base(), path))
        optimizer = torch.optim.AdamW(lorafx.parameters(again), lr=1e-2)
        assert lorafx.resume(again, optimizer, path) == 5
        found = largest_difference(train(staged(again), ScheduleGPipe, optimizer), expected)
    assert found < 1e-5
    return found
