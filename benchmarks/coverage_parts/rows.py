"""What is found out about one architecture: built tiny, run, adapted by lorafx and by PEFT."""

import copy
import dataclasses
from typing import Any

from coverage_parts.checks import Adapted, check_lorafx, check_peft, outputs, randomise, same
from coverage_parts.models import NoModel, sentence, tiny


@dataclasses.dataclass
class Row:
    """One architecture; `reason` says why it went no further than its stage.

    `stage` is "no class", "not built", "built" or "run".
    """

    name: str
    stage: str = "not built"
    reason: str = ""
    size: str = ""
    inputs: str = ""
    parameters: int = 0
    modes: list[str] = dataclasses.field(default_factory=list)
    lorafx: Adapted = dataclasses.field(default_factory=Adapted)
    peft: Adapted = dataclasses.field(default_factory=Adapted)
    seconds: float = 0.0

    @property
    def libraries(self) -> tuple[tuple[str, Adapted], tuple[str, Adapted]]:
        """(name, what it did) of both libraries."""
        return ("lorafx", self.lorafx), ("PEFT", self.peft)

    @property
    def built(self) -> bool:
        """Whether there is a model."""
        return self.stage in ("built", "run")

    def note(self) -> str:
        """What the numbers do not say."""
        notes = []
        if self.stage == "built":
            notes.append(f"not run: {self.reason}"[:90])
        elif self.stage == "run" and self.reason:
            notes.append(self.reason)
        notes += [f"{name} raised" for name, found in self.libraries if found.error]
        if self.size != "tiny":
            notes.append(self.size)
        return "; ".join(notes)


def examine(row: Row) -> None:
    """Fill in a row. What transformers, lorafx or PEFT raise is a result."""
    try:
        example = tiny(row.name)
    except NoModel as error:
        row.stage, row.reason = "no class", str(error)
        return
    except Exception as error:
        row.reason = sentence(error)
        return
    row.stage, row.size, row.inputs, row.reason = "built", example.size, example.how, example.reason
    base, inputs = example.model, example.inputs
    row.parameters = sum(parameter.numel() for parameter in base.parameters())
    randomise(base)
    if inputs is not None:
        row.stage = "run"
        find_modes(row, base, inputs)
    for check, found in ((check_lorafx, row.lorafx), (check_peft, row.peft)):
        try:
            check(copy.deepcopy(base), inputs, row.modes, found)
            found.finished = True
        except Exception as error:
            found.error = sentence(error)


def find_modes(row: Row, base: Any, inputs: Any) -> None:
    """Note the modes in which the original gives the same output twice."""
    for mode in ("eval", "train"):
        try:
            first, second = (outputs(copy.deepcopy(base), inputs, mode) for _ in range(2))
        except Exception as error:
            row.reason = f"in {mode} mode {sentence(error)}"
            continue
        if same(first, second):
            row.modes.append(mode)
        else:
            row.reason = f"stochastic in {mode} mode"
