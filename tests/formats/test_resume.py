"""A run that is resumed goes on as one that never stopped, bit for bit."""

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.optim import lr_scheduler

import lorafx
from tests.support.adapter_files import Model, edit, edit_about, injected

CONFIG = {"rank": 2, "targets": "up", "dropout": 0.3, "trainable": "head", "adapter": "french"}
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


def steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any, count: int
) -> list[float]:
    """Train on random numbers of three sources: the losses."""
    losses = []
    for _ in range(count):
        x = torch.randn(4, 5) + random.gauss(0, 1) + float(numpy.random.standard_normal())
        optimizer.zero_grad()
        loss = model(x).square().mean()  # with dropout
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def scheduled(optimizer: torch.optim.Optimizer, step: int = 0) -> Any:
    """A rate that falls, from a step on."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.9**step, last_epoch=step - 1 if step else -1
    )


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    """All that a training run depends on."""
    state = optimizer.state_dict()
    numbers = numpy.random.get_state()
    return [
        *(p.detach().clone() for p in model.state_dict().values()), torch.get_rng_state(),
        random.getstate(), torch.from_numpy(numbers[1].copy()), numbers[2:], state["param_groups"],
        *(
            (n, k, v.clone() if isinstance(v, torch.Tensor) else v)
            for n, s in state["state"].items() for k, v in s.items()
        )
    ]


def same(one: Any, other: Any) -> bool:
    """Equality down to the bits of tensors."""
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


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
    for (
        group
    ) in (
        optimizer.param_groups
    ):  # an optimizer that keeps more precisely than torch's load_state_dict allows
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


REFUSED = {
    "pth": (
        "a.pth", {}, lorafx.FormatError,
        "MiniMind file, which keeps no optimizer and step: leave out optimizer="
    ),
    "no step": (
        "a.safetensors", {"step": None}, lorafx.ConfigError,
        "saved with both, optimizer=... and step=..."
    ),
    "no optimizer": (
        "a.safetensors", {"optimizer": None}, lorafx.ConfigError, "not with NoneType and 1"
    ),
    "step": ("a.safetensors", {"step": -1}, lorafx.ConfigError, "not with AdamW and -1"),
    "base": (
        "a.safetensors", {"optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters())},
        lorafx.ConfigError, "holds a parameter that is not of adapter 'default'"
    ),
}


@pytest.mark.parametrize("name, arguments, error, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_saved(
    tmp_path: Path, name: str, arguments: dict, error: type, message: str
) -> None:
    model = injected()
    given = {"optimizer": torch.optim.AdamW(lorafx.parameters(model)), "step": 1} | arguments
    with pytest.raises(error, match=message):
        lorafx.save(model, tmp_path / name, **given)
    assert not list(tmp_path.iterdir())


def test_state_that_cannot_be_saved(tmp_path: Path) -> None:
    model = injected()
    optimizer = torch.optim.SGD(lorafx.parameters(model))
    first = next(lorafx.parameters(model))
    for value, message in [
        ([torch.zeros(1)], r"the optimizer's 'x' of 'up.lora.A' is .*file keeps tensors, finite"),
        (torch.full((2, 5), torch.nan), "'lorafx:state:x:up.lora.A' has NaN or infinite values"),
        (torch.zeros(2, 5, dtype=torch.complex64), "has dtype torch.complex64"),
        (torch.zeros(1).expand(2, 5), "is expanded: its elements share memory"),
        (torch.zeros(7), r"keeps 'x' \(7,\) of 'up.lora.A' \(2, 5\)"),
        (float("inf"), "is inf, and a file keeps"),
    ]:
        optimizer.state[first] = {"x": value}
        with pytest.raises(lorafx.LorafxError, match=message):
            lorafx.save(model, tmp_path / "a.safetensors", optimizer=optimizer, step=1)
    assert not list(tmp_path.iterdir())


def training(**values: Any) -> Any:
    """A change of the training state in a file's header."""
    def change(tensors: dict, header: dict) -> None:
        import json
        about = json.loads(header["adapter"])
        edit_about(training=about["training"] | values)(tensors, header)
    return change


def damage(name: str, tensor: torch.Tensor | None) -> Any:
    """A change of one tensor in a file."""
    return lambda tensors, header: (
        tensors.pop(name) if tensor is None else tensors.update({name: tensor})
    )


STATE = "lorafx:state:exp_avg:up.lora.A"
DAMAGE = {
    "kind": (
        training(kind="torch.optim.sgd.SGD"), lorafx.MismatchError,
        "the state of a 'torch.optim.sgd.SGD', not"
    ),
    "groups": (
        training(groups=[]), lorafx.FormatError, "names are not those of the adapter's tensors"
    ),
    "step": (training(step=1.5), lorafx.FormatError, "1.5 is not a number of steps"),
    "part": (training(more=1), lorafx.FormatError, "does not have the parts of one"),
    "no tensor": (damage(STATE, None), lorafx.FormatError, f"damaged: KeyError: '{STATE}'"),
    "more tensors": (
        damage("lorafx:x", torch.zeros(1)), lorafx.FormatError,
        "'lorafx:x' is not in the training state"
    ),
    "shape": (
        damage(STATE, torch.zeros(3, 5)), lorafx.MismatchError,
        r"'exp_avg' \(3, 5\) for 'up.lora.A' \(2, 5\)"
    ),
    "nan": (
        damage(STATE, torch.full((2, 5), torch.nan)), lorafx.FormatError,
        f"'{STATE}' has NaN or infinite"
    ),
    "short": (
        damage("lorafx:random:cpu", torch.zeros(9).byte()), lorafx.FormatError,
        "does not take the state"
    ),
    "zeros": (
        damage("lorafx:random:cpu", torch.zeros(5056).byte()), lorafx.FormatError,
        "does not take the state"
    ),
    "python": (
        damage("lorafx:random:python", torch.zeros(9).byte()), lorafx.FormatError,
        "does not take the state"
    ),
    "floats": (
        damage("lorafx:random:python", torch.zeros(9)), lorafx.FormatError, "is not made of bytes"
    ),
    "dropout": (
        lambda t, h: h.update(adapter=h["adapter"].replace('"dropout": 0.3', '"dropout": 0.5')),
        lorafx.MismatchError, "was trained with dropout=0.5, and adapter 'french' has 0.3"
    ),
    "none": (
        lambda t, h: (
            [t.pop(name) for name in list(t) if name.startswith("lorafx:")],
            h.update(adapter=h["adapter"].partition(', "training"')[0] + "}")
        ),
        lorafx.FormatError, "has no training state: it was saved without optimizer="
    ),
}


def run_of(base: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A run that has begun."""
    model = lorafx.inject(base, **CONFIG).train()
    optimizer = torch.optim.AdamW(lorafx.parameters(model))
    steps(model, optimizer, scheduled(optimizer), 2)
    return model, optimizer


@pytest.mark.parametrize("change, error, message", DAMAGE.values(), ids=DAMAGE)
def test_nothing_is_half_resumed(tmp_path: Path, change: Any, error: type, message: str) -> None:
    base, path = Model(), tmp_path / "a.safetensors"
    model, optimizer = run_of(base)
    lorafx.save(model, path, optimizer=optimizer, step=2)
    model, optimizer = run_of(base)
    edit(path, change)
    before = everything(model, optimizer)
    with pytest.raises(error, match=message):
        lorafx.resume(model, optimizer, path)
    assert same(everything(model, optimizer), before)


def test_another_optimizer(tmp_path: Path) -> None:
    base, path = Model(), tmp_path / "a.safetensors"
    model, optimizer = run_of(base)
    lorafx.save(model, path, optimizer=optimizer, step=2)
    first, *rest = lorafx.parameters(model)
    before = everything(model, optimizer)
    for other, message in [
        (
            torch.optim.Adam([first, *rest]),
            "the state of a 'torch.optim.adamw.AdamW', not of a torch",
        ),
        (
            torch.optim.AdamW(rest),
            "with 4 tensors, such as 'up.lora.A', and the optimizer holds others",
        ),
        (
            torch.optim.AdamW([{"params": [first]}, {"params": rest}]),
            "has 1 parameter groups, and the optimizer 2",
        ),
        (None, "not of a builtins.NoneType"),
    ]:
        with pytest.raises(lorafx.MismatchError, match=message):
            lorafx.resume(model, other, path)
    assert same(everything(model, optimizer), before)


@pytest.mark.parametrize("settings, message", [
    ({"rank": 3}, r"'up.lora.A' as \(\(2, 5\), .*as \(\(3, 5\)"), ({"alpha": 9}, "has scale 1.0"),
    ({"trainable": ()}, "'head.bias' as .* as nothing")])
def test_another_adapter(tmp_path: Path, settings: dict, message: str) -> None:
    base, path = Model(), tmp_path / "a.safetensors"
    model, optimizer = run_of(base)
    lorafx.save(model, path, optimizer=optimizer, step=2)
    other = lorafx.inject(base, **CONFIG | settings)
    optimizer = torch.optim.AdamW(lorafx.parameters(other))
    before = everything(other, optimizer)
    with pytest.raises(lorafx.MismatchError, match=message):
        lorafx.resume(other, optimizer, path)
    assert same(everything(other, optimizer), before)


class Product(nn.Module):
    """A linear layer that keeps its weight as (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def test_a_weight_that_is_stored_in_another_way(tmp_path: Path) -> None:
    other, path = Model(), tmp_path / "a.safetensors"
    other.up = Product()
    model = injected()
    optimizer = torch.optim.AdamW(lorafx.parameters(model))
    model(torch.randn(2, 5)).sum().backward()
    optimizer.step()
    lorafx.save(model, path, optimizer=optimizer, step=1)
    loaded = lorafx.load(other, path)
    optimizer = torch.optim.AdamW(lorafx.parameters(loaded))
    before = everything(loaded, optimizer)
    with pytest.raises(
        lorafx.MismatchError,
        match="stores its weights in another way: lorafx.load takes the adapter",
    ):
        lorafx.resume(loaded, optimizer, path)
    assert same(everything(loaded, optimizer), before)


def test_a_format_without_a_place_for_training(tmp_path: Path) -> None:
    model = injected()
    optimizer = torch.optim.AdamW(lorafx.parameters(model))
    with pytest.raises(
        lorafx.FormatError, match="is a PEFT file, which keeps no optimizer and step"
    ):
        lorafx.save(model, tmp_path / "folder", optimizer=optimizer, step=1)
    for name in ("folder", "a.pth"):
        lorafx.save(model, tmp_path / name)
        with pytest.raises(lorafx.FormatError, match="has no training state: it was saved without"):
            lorafx.resume(model, optimizer, tmp_path / name)


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
