"""Ways to take each row of a batch through an adapter of its own, all of one base."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import peft
from torch import Tensor, nn

import lorafx
from common.contenders import BASE, LORAFX, PEFT, Adapters, draw
from common.llama import adapted_layers

LOOP = "loop over adapters"
Forward = Callable[..., Tensor]  # (x or tokens, **options) -> what the model gives


@dataclasses.dataclass(frozen=True)
class Assignment:
    """Adapters of one rank by name, and which of them each row uses, in turn."""

    adapters: Mapping[str, Adapters]
    rows: Sequence[str]

    @staticmethod
    def draw(base: nn.Module, count: int, rows: int, rank: int) -> "Assignment":
        """So many random adapters of all linear layers but the head, one for each row."""
        layers, names = adapted_layers(base), [f"a{index}" for index in range(count)]
        adapters = {name: draw(base, layers, rank, seed) for seed, name in enumerate(names)}
        return Assignment(adapters, [names[row % count] for row in range(rows)])

    def rows_of(self, name: str) -> list[int]:
        """The rows that use an adapter."""
        return [row for row, used in enumerate(self.rows) if used == name]


class WithRows(nn.Module):
    """A model of lorafx whose rows use adapters of their own."""

    def __init__(self, model: nn.Module, rows: Sequence[str]) -> None:
        super().__init__()
        self.model, self.rows = model, rows

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives for a batch of these rows."""
        with lorafx.rows(self.model, self.rows):
            return self.model(*args, **kwargs)


def rows_model(base: nn.Module, assignment: Assignment) -> WithRows:
    """lorafx, with all adapters, all of them active, and each row's own used."""
    model = lorafx_model(base, assignment)
    lorafx.activate(model, list(assignment.adapters))
    return WithRows(model, assignment.rows)


def peft_model(base: nn.Module, assignment: Assignment) -> nn.Module:
    """PEFT, with all adapters."""
    model: Any = None
    for adapter, given in assignment.adapters.items():
        config = peft.LoraConfig(r=given.rank, lora_alpha=given.scale * given.rank,
                                 target_modules=list(given.values))
        if model is None:
            model = peft.get_peft_model(base, config, adapter_name=adapter)
        else:
            model.add_adapter(adapter, config)
        for name, (A, B) in given.values.items():
            layer: Any = model.base_model.model.get_submodule(name)
            layer.lora_A[adapter].weight.data.copy_(A)
            layer.lora_B[adapter].weight.data.copy_(B)
    found: nn.Module = model
    return found


def lorafx_model(base: nn.Module, assignment: Assignment) -> nn.Module:
    """lorafx, with all adapters, one of them active at a time."""
    model: Any = None
    for adapter, given in assignment.adapters.items():
        alpha, targets = given.scale * given.rank, list(given.values)
        if model is None:
            model = lorafx.inject(base, given.rank, alpha=alpha, targets=targets, adapter=adapter)
        else:
            lorafx.add(model, adapter, given.rank, alpha=alpha, targets=targets)
        state = {}
        for name, (A, B) in given.values.items():
            state |= {f"{name}.lora.{adapter}.A": A, f"{name}.lora.{adapter}.B": B}
        model.load_state_dict(state, strict=False)
    found: nn.Module = model
    return found


def contenders(base: nn.Module, assignment: Assignment) -> dict[str, nn.Module]:
    """{contender: its model}, in eval, all on the base's Parameters."""
    methods = {BASE: lambda base, _: base, PEFT: peft_model, LOOP: lorafx_model,
               LORAFX: rows_model}
    models = {}
    for name, method in methods.items():
        fresh = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
        models[name] = method(fresh, assignment).eval()
    return models
