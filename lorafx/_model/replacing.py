"""An adapter in the place of another, or of none: a forward that runs meanwhile has one of them."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import nn

from .._adapter.adapter import Adapter
from .._adapter.config import LoRAConfig
from .._adapter.names import have_rows_in_common, split_block
from .._errors import AdapterError
from .attach import attach
from .choice import check_parts
from .flat import check_takes_parameters
from .program import Program
from .record import holders, injection, refresh, set_trainable, trained_modules
from .reduced import check_not_reduced


@contextlib.contextmanager
def retiring(model: nn.Module, adapter: str) -> Iterator[Mapping[nn.Module, nn.Module]]:
    """Within this context, which says what holders have of an adapter, they may lose it.

    What began before goes on with that, and what begins later finds what is there at the end.
    """
    choice = injection(model).choice
    check_parts(model, choice)
    with choice.lock:
        held: dict[nn.Module, nn.Module] = {}
        for holder in holders(model):
            module = holder._modules.get(adapter)
            if module is not None:
                held[holder] = module
        choice.retire(adapter, held)
        yield held
        refresh(model)


def drop_empty(model: nn.Module) -> None:
    """Forget the places of what adapters train whole where none does, nor one that went lately."""
    if injection(model).choice.any_retired:
        return
    for _, owner, trained in list(trained_modules(model)):
        if not trained._modules:
            del owner._modules["trained"]


def check_replaced(model: nn.Module, adapter: str) -> None:
    """Raise unless other tensors can take the places of an adapter's."""
    check_takes_parameters(model)
    if adapter in injection(model).active:
        check_not_reduced(model, adapter)


class Whole(NamedTuple):
    """All that a model has of one adapter."""

    modules: Mapping[nn.Module, nn.Module]  # by their holders
    config: LoRAConfig
    trained: list[str]


_WAITING = "_new"  # no adapter of the user's can have this name


def replace(program: Program, adapter: Adapter) -> None:
    """Put an adapter that fits in the place of the one of its name, which stays active if it is.

    Everything that can fail is done before that.
    """
    model, name = program.model, adapter.name
    active = name in injection(model).active
    if active:
        _check_trains_alone(program, adapter)
    attach(program, dataclasses.replace(adapter, name=_WAITING))
    new = taken(model, _WAITING)
    for module in new.modules.values():
        module.requires_grad_(active)
    old = put(model, name, new)
    try:
        set_trainable(model)
    except AdapterError:
        put(model, name, old)
        set_trainable(model)
        raise
    finally:
        drop_empty(model)


def _check_trains_alone(program: Program, adapter: Adapter) -> None:
    """Raise if an adapter trains what another active one trains too."""
    record = injection(program.model)
    for other in record.active.keys() - {adapter.name}:
        for theirs in record.trained[other]:
            whole, rows = split_block(theirs)
            for name in adapter.trained:
                ours, own_rows = split_block(name)
                same = program.base_tensors[ours] is program.base_tensors[whole]
                if same and have_rows_in_common(own_rows, rows):
                    raise AdapterError(
                        f"The new {adapter.name!r} and {other!r}, which is active too, both train "
                        f"'{name}', and one tensor cannot be both: activate one of them.")


def taken(model: nn.Module, adapter: str) -> Whole:
    """What a model has of an adapter that nobody uses, taken out of it."""
    record = injection(model)
    modules: dict[nn.Module, nn.Module] = {}
    for holder in holders(model):
        others = dict(holder._modules)
        module = others.pop(adapter, None)
        if module is not None:
            modules[holder] = module
            holder._modules = others
    return Whole(modules, record.configs.pop(adapter), record.trained.pop(adapter))


def put(model: nn.Module, adapter: str, new: Whole) -> Whole:
    """Let a model have this of an adapter, and return what it had."""
    record = injection(model)
    with retiring(model, adapter) as held:
        for holder in {**held, **new.modules}:
            modules = dict(holder._modules)
            if holder in new.modules:
                modules[adapter] = new.modules[holder]
            else:
                del modules[adapter]
            holder._modules = modules
        old = Whole(held, record.configs[adapter], record.trained[adapter])
        record.configs[adapter], record.trained[adapter] = new.config, new.trained
    return old
