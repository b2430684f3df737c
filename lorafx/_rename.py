"""Gives an adapter another name, in place: its tensors stay the same objects."""

from collections.abc import Mapping
from typing import TypeVar

from torch import nn

from ._model.attach import check_new_name
from ._model.flat import check_can_be_renamed
from ._model.guard import check_each_in_its_place
from ._model.record import check_adapter, injection
from ._model.replacing import retiring

Value = TypeVar("Value")


def rename(model: nn.Module, old: str, new: str) -> None:
    """Give an adapter another name; its place among the others, and whether it is active, stay.

    A, B and what it trains whole are the same Parameters under new names in `state_dict`, so that
    optimizers, gradients and hooks go on, and forward adds the same at every moment, in other
    threads too. A model that was compiled may compile again.

    Raises:
        AdapterError: the model has no adapter `old`, or has one `new`; or `old` is used within
            `lorafx.using` or `lorafx.rows`.
        ConfigError: `new` cannot name an adapter.
        UnsupportedModelError: FSDP1 wraps the model, or accelerate offloads blocks of it whole,
            both of which keep the names that parameters had.

    Example:
        >>> import torch, lorafx
        >>> model = lorafx.inject(torch.nn.Linear(4, 4))
        >>> lorafx.rename(model, "default", "french")
        >>> [name for name, _ in lorafx.named_parameters(model)]
        ['lora.french.A', 'lora.french.B']
    """
    check_adapter(model, old)
    check_each_in_its_place(model)
    check_can_be_renamed(model)
    check_new_name(model, new)
    record = injection(model)
    record.choice.check_not_entered(old)
    with retiring(model, old) as held:
        for holder in held:
            holder._modules = _renamed(holder._modules, old, new)
        record.configs = _renamed(record.configs, old, new)
        record.trained = _renamed(record.trained, old, new)
        record.active = _renamed(record.active, old, new)


def _renamed(values: Mapping[str, Value], old: str, new: str) -> dict[str, Value]:
    """The same in the same order, with another name for one."""
    return {new if name == old else name: value for name, value in values.items()}
