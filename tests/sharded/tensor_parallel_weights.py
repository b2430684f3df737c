"""Set-ups of tensor parallelism: the kinds of weights, split along each of their axes."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.support.sharded import adapted
from tests.support.tensor_parallel import all_processes, both_orders, by_hand, square_loss
from tests.support.torchrun import setup


def seeded(cls: Any) -> Any:
    """A function that makes a module with the same weights each time and in all processes."""
    def make() -> nn.Module:
        torch.manual_seed(1)
        made: nn.Module = cls()
        return made

    return make


class Fused(nn.Module):
    """Query, key and value in one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.o(q * k.sigmoid() + v)


@setup
def blocks_of_rows() -> list[float]:
    """Each process has all of the factors of some rows of a weight."""
    def one(model: Any) -> Any:
        plan = {"qkv": ColwiseParallel(output_layouts=Replicate()),
                "o": RowwiseParallel(input_layouts=Replicate())}
        return parallelize_module(model, all_processes(), plan)

    def other(model: Any) -> Any:
        plan = {"qkv": RowwiseParallel(input_layouts=Replicate()),
                "o": ColwiseParallel(output_layouts=Replicate())}
        return parallelize_module(model, all_processes(), plan)

    def loss(model: Any) -> Tensor:
        x = torch.randn(3, 16, generator=torch.Generator().manual_seed(5))
        return model(x).square().mean()

    targets = ["qkv[0:16]", "qkv[32:48]", "o"]
    found = both_orders(seeded(Fused), one, loss, targets=targets)
    return found + both_orders(seeded(Fused), other, loss, targets=targets)


class Conv(nn.Module):
    """A linear layer whose weight is (in, out)."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, out) / 4)
        self.bias = nn.Parameter(torch.ones(out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Transposed(nn.Module):
    """Two of these, and a matrix by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Conv(16, 32), Conv(32, 16)
        self.w = nn.Parameter(torch.randn(16, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()) @ self.w


@setup
def transposed_and_bare_weights() -> list[float]:
    found: list[float] = []
    for axes in ({"a.weight": 1, "a.bias": 0, "b.weight": 0, "b.bias": None, "w": 1},
                 {"a.weight": 0, "a.bias": None, "b.weight": 1, "b.bias": 0, "w": 0}):
        found += both_orders(seeded(Transposed), lambda model: by_hand(model, axes), square_loss)
    return found


class Attention(nn.Module):
    """Linear calls of one x, which are joined."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(q * k.sigmoid() + v)


@setup
def joined_calls() -> list[float]:
    axes = {f"{name}.{attribute}": 0 for name in "qkv" for attribute in ("weight", "bias")}
    axes |= {"o.weight": 1, "o.bias": None}
    make = seeded(Attention)
    assert "joined" in adapted(make()).code
    return both_orders(make, lambda model: by_hand(model, axes), square_loss)


class Experts(nn.Module):
    """Stacks of matrices, one for each expert."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 16, 8) / 4)
        self.down = nn.Parameter(torch.randn(4, 8, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.bmm(x.expand(4, *x.shape), self.up).relu()
        return torch.bmm(h, self.down).sum(0)


@setup
def stacks_of_experts() -> list[float]:
    found: list[float] = []
    for axes in ({"up": 0, "down": 0}, {"up": 2, "down": 1}):
        found += both_orders(seeded(Experts), lambda model: by_hand(model, axes), square_loss)
    return found


class Reading(nn.Module):
    """Python that reads its layers' weights: products with them, and a sum over all of one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim > 0:
            h = F.linear(x, self.a.weight, self.a.bias).relu()
            x = h @ self.b.weight.T + self.b.weight.sum() + self.b.bias
        return x


@setup
def weights_that_python_reads() -> list[float]:
    axes = {"a.weight": 0, "a.bias": 0, "b.weight": 1, "b.bias": None}
    return both_orders(seeded(Reading), lambda model: by_hand(model, axes), square_loss)
