"""A run that is resumed goes on as one that never stopped, bit for bit."""

import copy
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.optim import lr_scheduler

import lorafx
from tests.support.adapter_files import Model, injected
from tests.support.training_runs import CONFIG, everything, same, scheduled, steps

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.05, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "plain SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "RMSprop": lambda p: torch.optim.RMSprop(p, centered=True),
    "Adagrad": torch.optim.Adagrad,
    "Adafactor": torch.optim.Adafactor,
    "NAdam": torch.optim.NAdam,
    "ASGD": torch.optim.ASGD,
    "Rprop": torch.optim.Rprop,
    "fused": lambda p: torch.optim.AdamW(p, fused=True),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_goes_on_bitwise(tmp_path: Path, make: Callable[..., torch.optim.Optimizer]) -> None:
    base, path = Model(), tmp_path / "a.safetensors"
    model = lorafx.inject(base, **CONFIG).train()
    optimizer = make(lorafx.parameters(model))
    schedule = scheduled(optimizer)
    steps(model, optimizer, schedule, 3)
    lorafx.save(model, path, optimizer=optimizer, step=3)
    losses = steps(model, optimizer, schedule, 4)
    expected = everything(model, optimizer)
    steps(model, optimizer, schedule, 1)  # draws random numbers that the resumed run must not see
    random.gauss(0, 1)
    resumed = lorafx.load(base, path).train()
    optimizer = make(lorafx.parameters(resumed))
    step = lorafx.resume(resumed, optimizer, path)
    assert step == 3
    assert steps(resumed, optimizer, scheduled(optimizer, step), 4) == losses
    assert same(everything(resumed, optimizer), expected)


def test_under_another_name_and_in_another_order(tmp_path: Path) -> None:
    base, path = Model(), tmp_path / "a.safetensors"
    model = lorafx.inject(base, **CONFIG).train()
    optimizer = torch.optim.AdamW(lorafx.parameters(model))
    steps(model, optimizer, scheduled(optimizer), 2)
    lorafx.save(model, path, optimizer=optimizer, step=2)
    losses = steps(model, optimizer, scheduled(optimizer, 2), 3)
    other = lorafx.inject(base, 3, adapter="other").train()
    lorafx.load(other, path, "german")
    lorafx.activate(other, "german")
    with torch.no_grad():
        other.up.lora.german.A.zero_()  # put back by resume
    optimizer = torch.optim.AdamW([*lorafx.named_parameters(other)][::-1])
    assert lorafx.resume(other, optimizer, path) == 2
    assert steps(other, optimizer, scheduled(optimizer, 2), 3) == losses
    assert optimizer.param_groups[0]["param_names"][-1] == "up.lora.german.A"


def test_two_groups_and_bfloat16(tmp_path: Path) -> None:
    def grouped(model: nn.Module) -> torch.optim.Optimizer:
        named = dict(lorafx.named_parameters(model))
        some, others = (
            [p for n, p in named.items() if n.endswith(".A") is wanted] for wanted in (True, False)
        )
        return torch.optim.AdamW(
            [{"params": some, "lr": 0.1}, {"params": others, "betas": (0.8, 0.9)}]
        )

    base, path = Model().bfloat16(), tmp_path / "a.safetensors"
    model = lorafx.inject(base, 2, targets="linear", dtype=torch.bfloat16)
    optimizer = grouped(model)
    # an optimizer that keeps more precisely than torch's load_state_dict allows
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.tensor(4.0),
                "exp_avg": torch.randn(parameter.shape),
                "exp_avg_sq": torch.rand(parameter.shape),
            }
    lorafx.save(model, path, optimizer=optimizer, step=4)
    resumed = lorafx.load(base, path)
    other = grouped(resumed)
    assert lorafx.resume(resumed, other, path) == 4
    assert same(everything(resumed, other), everything(model, optimizer))
    assert other.param_groups[1]["betas"] == (0.8, 0.9)


def test_loads_as_a_plain_adapter(tmp_path: Path) -> None:
    model, path, x = injected(), tmp_path / "a.safetensors", torch.randn(2, 5)
    optimizer = torch.optim.AdamW(lorafx.parameters(model))
    model(x).sum().backward()
    optimizer.step()
    lorafx.save(model, path, optimizer=optimizer, step=1)
    base = Model()
    base.load_state_dict(lorafx.eject(model).state_dict())
    assert torch.equal(lorafx.load(base, path)(x), model(x))
    names = set(safetensors.torch.load_file(path))
    assert {name for name in names if not name.startswith("lorafx:")} == {
        "up.lora.A", "up.lora.B", "head.lora.A", "head.lora.B"}
    assert "lorafx:state:exp_avg:up.lora.A" in names and "lorafx:random:cpu" in names


@pytest.mark.parametrize(
    "targets", ["linear", ["linear1[0:8]", "linear1[8:20]", "in_proj_weight[v]", "out_proj"]]
)
def test_attention_goes_on_bitwise(tmp_path: Path, targets: object) -> None:
    """Gradients are summed in the same order, as the sites of a file are in that of the model."""
    base = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 20, batch_first=True), 2, enable_nested_tensor=False
    )
    model = lorafx.inject(base, 2, targets=targets).train()
    optimizer = torch.optim.AdamW(lorafx.parameters(model), lr=0.05)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(3, 5, 8)).pow(4).mean().backward()
            optimizer.step()

    train(model, optimizer, 3)
    lorafx.save(model, tmp_path / "a.safetensors", optimizer=optimizer, step=3)
    train(model, optimizer, 8)
    resumed = lorafx.load(base, tmp_path / "a.safetensors").train()
    other = torch.optim.AdamW(lorafx.parameters(resumed))
    lorafx.resume(resumed, other, tmp_path / "a.safetensors")
    train(resumed, other, 8)
    assert [n for n, _ in lorafx.named_parameters(resumed)] == [
        n for n, _ in lorafx.named_parameters(model)
    ]
    assert all(map(torch.equal, lorafx.parameters(resumed), lorafx.parameters(model)))


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [4, 6], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, 4),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1, 20),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.3, 1, 2), lr_scheduler.ExponentialLR(o, 0.9)], [3])}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_by_their_own_state(tmp_path: Path, name: str) -> None:
    """As the README says: made anew, with its own state, before lorafx.resume."""
    base, make = nn.Linear(3, 3), SCHEDULERS[name]
    model = lorafx.inject(base)
    optimizer = torch.optim.AdamW(lorafx.parameters(model), lr=0.1)
    schedule = make(optimizer)

    def rates(
        optimizer: torch.optim.Optimizer, schedule: lr_scheduler.LRScheduler, steps: int
    ) -> list[float]:
        found = []
        for _ in range(steps):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return found

    model(torch.ones(1, 3)).sum().backward()
    rates(optimizer, schedule, 4)
    lorafx.save(model, tmp_path / "a.safetensors", optimizer=optimizer, step=4)
    state = schedule.state_dict()
    resumed = lorafx.load(base, tmp_path / "a.safetensors")
    other = torch.optim.AdamW(lorafx.parameters(resumed), lr=0.1)
    again = make(other)
    again.load_state_dict(copy.deepcopy(state))
    lorafx.resume(resumed, other, tmp_path / "a.safetensors")
    assert rates(other, again, 5) == rates(optimizer, schedule, 5)
