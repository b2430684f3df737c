"""What mypy sees of the verbs that take a model or a program, and of what they give back.

mypy checks this file with lorafx itself, and nothing runs it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import assert_type

import torch
from torch import nn
from torch.export import ExportedProgram

import lorafx


def of_a_program(program: ExportedProgram, path: Path) -> None:
    adapted = lorafx.inject(program, rank=2)
    assert_type(adapted, ExportedProgram)
    for found in (lorafx.load(program, path), lorafx.merge(adapted), lorafx.eject(adapted)):
        assert_type(found, ExportedProgram)
    optimizer = torch.optim.SGD(lorafx.parameters(adapted))
    lorafx.save(model=adapted, path=path, optimizer=optimizer, step=1)
    assert_type(lorafx.resume(adapted, optimizer, path), int)
    assert_type(lorafx.sites(program), list[lorafx.Site])
    assert_type(lorafx.summary(adapted), lorafx.Summary)
    assert_type(lorafx.adapters(adapted), list[str])
    assert_type(lorafx.merge_error(adapted), dict[str, float])
    assert_type(lorafx.parameters(adapted), Iterator[nn.Parameter])
    assert_type(lorafx.named_parameters(adapted), Iterator[tuple[str, nn.Parameter]])


def of_a_model(model: nn.Linear, path: Path) -> None:
    for found in (lorafx.inject(model), lorafx.load(model, path), lorafx.merge(model)):
        assert_type(found, nn.Linear)
    lorafx.activate(model, "french")
