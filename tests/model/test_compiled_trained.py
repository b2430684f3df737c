"""A compiled model reads what adapters train whole anew at each call."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import lorafx
from tests.support.oracle import randomise

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 2]])


@pytest.fixture(autouse=True)
def none_compiled_before():
    """What is compiled counts against the limit of a forward, which the models here share."""
    torch.compiler.reset()


class Net(nn.Module):
    """A norm with statistics, a scale, a head that is tied to the embedding, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.up = nn.Embedding(7, 6), nn.Linear(6, 6)
        self.norm, self.scale = nn.BatchNorm1d(6), nn.Parameter(torch.ones(6))
        self.head, self.classifier = nn.Linear(6, 7), nn.Linear(7, 3)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.up(self.embedding(ids)).tanh() * self.scale
        return self.classifier(self.head(self.norm(x.mT).mT))


def made(count, trainable, dtype=torch.float32):
    torch.manual_seed(0)
    return adapted(Net().to(dtype), count, targets="up", trainable=trainable)


def adapted(base, count, **config):
    model = lorafx.inject(base, rank=2, adapter="a0", **config)
    for number in range(1, count):
        lorafx.add(model, f"a{number}", rank=2 + number, trainable=config["trainable"])
    return randomise(model)


def eager(model, x=IDS):
    with torch.compiler.set_stance("force_eager"):
        return model(x)


def check_training(model, call, x=IDS, **tolerances):
    """Output and gradients are those of eager, and no other adapter gets any."""
    found, wanted = [], []
    for forward, results in ((call, found), (lambda x: eager(model, x), wanted)):
        model.zero_grad()
        y = forward(x)
        y.float().square().sum().backward()
        results.append(y)
        for adapter in lorafx.adapters(model):
            results.append([p.grad for p in lorafx.parameters(model, adapter)])
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    torch.testing.assert_close(found, wanted, **tolerances)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_switching(dtype):
    """Beside a narrow base, what adapters train is wide."""
    model = made(10, ["classifier", "scale", "head", "norm"], dtype).eval()
    counter = CompileCounter()
    call = torch.compile(model, backend=counter, fullgraph=True)
    tolerances = {} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.1}
    for number in range(10):
        lorafx.activate(model, f"a{number}")
        check_training(model, call, **tolerances)
    assert counter.frame_count == 1
    for change in (lambda: lorafx.activate(model, []), lambda: lorafx.remove(model, "a9"),
                   lambda: lorafx.activate(model, "a3")):
        change()
        torch.testing.assert_close(call(IDS), eager(model), **tolerances)
        with lorafx.using(model, "a2"):
            torch.testing.assert_close(call(IDS), eager(model), **tolerances)
        model.zero_grad()
        with lorafx.using(model, None):
            y = call(IDS)
            torch.testing.assert_close(y, eager(model), **tolerances)
        y.sum().backward()  # what the base does is no gradient of an adapter
        assert all(p.grad is None for p in lorafx.parameters(model))
    assert counter.frame_count == 1


def test_statistics_are_an_adapters_own():
    model, again = (made(3, ["norm"]) for _ in range(2))
    counter = CompileCounter()
    call = torch.compile(model, backend=counter, fullgraph=True)
    for number in (0, 1, 0, 2):
        for one, forward in ((model, call), (again, again)):
            lorafx.activate(one, f"a{number}")
            forward(IDS)
    for name, buffer in again.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], buffer)
    assert model.norm.trained.a0.num_batches_tracked == 2
    assert counter.frame_count == 1


def test_with_the_compiler_itself():
    model = adapted(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), 10, trainable="1")
    call, x = torch.compile(model, fullgraph=True), torch.randn(2, 6)
    check_training(model, call, x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number in range(1, 10):
            lorafx.activate(model, f"a{number}")
            check_training(model, call, x)
        trained = model[1].trained.a9
        for write in (lambda: trained.weight.data.mul_(2),
                      lambda: setattr(trained, "weight", nn.Parameter(torch.ones(3, 6)))):
            write()
            check_training(model, call, x)


def test_what_comes_first_is_announced():
    model = made(1, "classifier")
    lorafx.add(model, "b", trainable="classifier.bias")
    call = torch.compile(model, backend="eager", fullgraph=True)
    call(IDS)
    lorafx.add(model, "c", trainable="classifier.weight")
    with pytest.warns(UserWarning, match="an adapter comes to 1 place .* such as 'scale'"):
        lorafx.add(model, "d", trainable=["scale", "classifier"])
    lorafx.activate(model, "d")
    check_training(model.eval(), call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_weight(dtype):
    """Of any number, of several adapters, beside one that has all; tied to the head."""
    model = made(1, ["embedding[1:4]", "scale"], dtype).eval()
    trainable = ["embedding[0,3]", "embedding[2:6]", "embedding[1,2,5]", "embedding[6:7]",
                 "embedding"]
    for number, names in enumerate(trainable, 1):
        lorafx.add(model, f"a{number}", trainable=names)
    randomise(model)
    counter = CompileCounter()
    call = torch.compile(model, backend=counter, fullgraph=True)
    tolerances = {} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.1}
    for use in ("a0", "a1", "a2", "a3", {"a1": 1.0, "a3": 0.5}, "a4", "a5", ["a4", "a2"], "a4"):
        lorafx.activate(model, use)
        check_training(model, call, **tolerances)
    lorafx.activate(model, [])
    for _ in range(2):
        torch.testing.assert_close(call(IDS), eager(model), **tolerances)
        with torch.no_grad():
            model.embedding.frozen_weight.mul_(2)
    assert counter.frame_count == 1


def test_an_exported_program_has_what_is_used_here():
    model = made(2, ["classifier", "embedding[1:4]"]).eval()
    with lorafx.using(model, "a1"):
        program = torch.export.export(model, (IDS,), strict=True)
        torch.testing.assert_close(program.module()(IDS), model(IDS))
    assert not program.constants and "classifier.trained.a1.weight" in program.state_dict
