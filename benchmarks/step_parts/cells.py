"""The cells of the step benchmark: which model, how many tokens, which adapters."""

import dataclasses
import itertools

import torch
from torch import Tensor, nn

from common.contenders import Adapters, draw
from common.models import MODELS, targets
from step_parts.gate import Result, reference


@dataclasses.dataclass(frozen=True)
class Cell:
    """One comparison, by the processor's time in one thread, or by the clock in several.

    `layers=0` means as many as the model has, `forward_rounds=0` that forward alone is not timed.
    `sample` is the least time, in seconds, of what is timed as one: several steps where one is
    shorter.
    """

    model: str
    batch: int = 4
    length: int = 512
    rank: int = 16
    targets: str = "linear"
    dtype: torch.dtype = torch.float32
    compiled: bool = False
    layers: int = 0
    rounds: int = 12
    forward_rounds: int = 6
    sample: float = 0.1
    threads: int = 1

    @property
    def label(self) -> str:
        """All that distinguishes the cell."""
        family = MODELS[self.model]
        cut = self.layers not in (0, family.layers)
        part = f" ({self.layers} of {family.layers} layers)" if cut else ""
        dtype = str(self.dtype).removeprefix("torch.")
        threads = f", {self.threads} threads" if self.threads > 1 else ""
        return (f"{self.model}{part}, {self.batch * self.length:,} tokens, rank {self.rank}, "
                f"{self.targets}, {dtype}, {'compiled' if self.compiled else 'eager'}{threads}")


MINIMIND = "MiniMind 26M"
# The first is the one that the headline is about. Widths are whole; some have fewer layers, and few
# tokens, for time.
DEFAULT = (
    Cell(MINIMIND, rounds=7, forward_rounds=3),
    Cell(MINIMIND, rounds=9, forward_rounds=0, threads=2),
    Cell(MINIMIND, 1, 128, 4, "square", layers=2, sample=0.05),
    Cell("encoder, BERT-base", 2, 128, layers=1, sample=0.05),
    Cell("Llama layer, 1024", 1, 256, 64, sample=0.05),
    Cell("Llama layer, 1024", 1, 128, dtype=torch.bfloat16, sample=0.05),
    Cell(MINIMIND, compiled=True, layers=2, rounds=7, forward_rounds=0),
)
TINY = (
    Cell("tiny MiniMind", batch=2, length=8, rank=4, rounds=3, forward_rounds=2, sample=0),
    Cell("tiny encoder", 2, 8, 2, "square", torch.bfloat16, rounds=3, forward_rounds=2, sample=0),
    Cell("tiny encoder", 2, 8, 2, compiled=True, rounds=3, forward_rounds=0, sample=0),
)
TOKENS, RANKS, KINDS = (128, 512, 2048, 4096), (4, 16, 64), ("square", "linear")
BEYOND_EAGER = ((torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True))


def grid() -> tuple[Cell, ...]:
    """Every model by tokens, ranks and targets; the middle of it compiled and in bfloat16 too."""
    cells = []
    for model in MODELS:
        if model.startswith("tiny"):
            continue
        for tokens, rank, kind in itertools.product(TOKENS, RANKS, KINDS):
            cells.append(Cell(model, -(-tokens // 512), min(tokens, 512), rank, kind))
        for dtype, compiled in BEYOND_EAGER:
            cells.append(Cell(model, dtype=dtype, compiled=compiled))
    return tuple(cells)


@dataclasses.dataclass(frozen=True)
class Task:
    """What all contenders of a cell are given, and the right results: without, with adapters."""

    cell: Cell
    base: nn.Module
    x: Tensor
    labels: Tensor
    adapters: Adapters
    truths: tuple[Result, Result]


def task(cell: Cell, device: torch.device) -> Task:
    """The cell's model, data, and adapters: random, and always the same."""
    torch.manual_seed(0)
    family = MODELS[cell.model]
    base = family.build(family.width, cell.layers or family.layers)
    base = base.to(device, cell.dtype).requires_grad_(False)
    x = torch.randn(cell.batch, cell.length, family.width).to(device, cell.dtype).requires_grad_()
    with torch.no_grad():
        classes = base(x[:1, :1]).shape[-1]
    labels = torch.randint(classes, x.shape[:2]).to(device)
    adapters = draw(base, targets(base, cell.targets), cell.rank)
    truths = reference(base, None, x, labels), reference(base, adapters, x, labels)
    return Task(cell, base, x, labels, adapters, truths)
