"""What training takes in memory over a frozen base in 4 bits, to the byte."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorafx
from common.counting import held_bytes
from tests.quantised.test_formats import fill
from tests.support.internals import replace_internal
from tests.support.quantised import FORMATS, HIDDEN, WIDTH

ROWS, RANK = 6, 3


class FeedForward(nn.Module):
    """x + down(silu(gate(n)) * up(n)) for n = norm(x)."""

    def __init__(self, name: str) -> None:
        super().__init__()
        make = FORMATS[name].make
        self.norm = nn.LayerNorm(WIDTH, dtype=FORMATS[name].dtype)
        self.gate, self.up, self.down = (
            make(WIDTH, HIDDEN), make(WIDTH, HIDDEN), make(HIDDEN, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        return x + self.down(F.silu(self.gate(n)) * self.up(n))


def alive(model: nn.Module, x: Tensor) -> int:
    """Bytes between forward and backward, of a pass in which nothing is proven for the first time.
    """
    model(x).float().sum().backward()
    gc.collect()
    return held_bytes(lambda: model(x), torch.device("cpu")).after


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Of A and B, and of x, added up over two passes."""
    inputs = [x, *lorafx.parameters(model)]
    for tensor in inputs:
        tensor.grad = None
    for factor in (1.0, 0.5):
        model(factor * x).float().sin().sum().backward()
    found = [tensor.grad for tensor in inputs if tensor.grad is not None]
    assert len(found) == len(inputs)
    return found


@pytest.mark.parametrize("name", ["nf4", "nf4 in bfloat16"])
def test_no_input_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_internal(monkeypatch, "kept_below", 0)
    torch.manual_seed(0)
    base = FeedForward(name).requires_grad_(False)
    x = torch.randn(ROWS, WIDTH, dtype=FORMATS[name].dtype, requires_grad=True)
    lean, full = (fill(lorafx.inject(base, RANK, targets="linear", recompute=recompute))
                  for recompute in (True, False))
    frozen = alive(base, x)
    h = 3 * (ROWS * RANK * 4 + x.element_size())  # of three sites, and a number in y's place
    inputs = ROWS * (WIDTH + HIDDEN) * x.element_size()
    assert (alive(lean, x) - frozen, alive(full, x) - frozen) == (h, h + inputs)
    for got, wanted in zip(gradients(lean, x), gradients(full, x)):
        assert torch.equal(got, wanted)
