"""The adapters of a model, and the active ones: forward adds sum w s (x A^T) B^T over these."""

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from torch import nn
from torch.export import ExportedProgram

from ._adapter.names import dotted
from ._errors import AdapterError
from ._graph.dispatched import offloaded_parameters
from ._graph.modules import all_modules, named_modules
from ._model.exported_program import named_factors, takes_exported
from ._model.factors import OFFLOADED
from ._model.fsdp import settle
from ._model.record import (
    HOLDERS, check_adapter, check_ties_are_here, injection, refresh, set_trainable, weights_of
)
from ._model.reduced import check_reduced
from ._model.replacing import drop_empty, retiring


@takes_exported
def adapters(model: nn.Module | ExportedProgram) -> list[str]:
    """Return the names of the adapters that an injected model holds, in the order they came.

    Example:
        >>> import torch, lorafx
        >>> lorafx.adapters(lorafx.inject(torch.nn.Linear(4, 4), adapter="french"))
        ['french']
    """
    assert not isinstance(model, ExportedProgram)  # takes_exported saw to that
    return list(injection(model).configs)


def activate(model: nn.Module, adapters: str | Iterable[str] | Mapping[str, float]) -> None:
    """Choose what forward adds and what trains: one adapter, several, or weighted ones.

    {a: wa, b: wb} adds wa s_a B_a A_a + wb s_b B_b A_b, exactly, with no cross terms. A module that
    an adapter trains whole is used as that adapter has it, whatever the weight. The other adapters
    are frozen. An empty list leaves the base alone. Calls of the model that other threads have
    begun go on with what was active.

    Raises:
        AdapterError: a name is unknown, or two of the adapters train one module whole.
        UnsupportedModelError: the model is wrapped by DistributedDataParallel, which would not
            reduce the gradients of one of them.

    Example:
        >>> import torch, lorafx
        >>> model = lorafx.inject(torch.nn.Linear(4, 4), adapter="a")
        >>> lorafx.add(model, "b")
        >>> lorafx.activate(model, {"a": 0.7, "b": 0.3})
        >>> len(list(lorafx.parameters(model)))
        4
    """
    record, weights = injection(model), weights_of(model, adapters)
    check_reduced(model, weights)
    before, record.active = record.active, weights
    try:
        set_trainable(model)
    except AdapterError:
        record.active = before
        set_trainable(model)
        raise


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within this context forward is the base model's, exactly; contexts may nest.

    Example:
        >>> import torch, lorafx
        >>> base = torch.nn.Linear(4, 4)
        >>> model, x = lorafx.inject(base), torch.randn(2, 4)
        >>> with lorafx.disabled(model):
        ...     torch.equal(model(x), base(x))
        True
    """
    record = injection(model)
    none = record.choice.selection({})
    record.disabled += 1
    refresh(model)
    try:
        with record.choice.choosing(none):
            yield
    finally:
        record.disabled -= 1
        refresh(model)


@contextlib.contextmanager
def using(
    model: nn.Module, adapters: str | Iterable[str] | Mapping[str, float] | None
) -> Iterator[None]:
    """Within this context forward uses one adapter, several, weighted ones, or (None) the base.

    It holds in this thread or asyncio task alone, and in the backward pass of what was computed in
    it, also where another is loaded in the place of an adapter meanwhile; contexts nest. `activate`
    stays what holds elsewhere, in threads that are started here too, and what trains. `merge`,
    `merge_error`, `summary`, `draw`, `save` and torch.export mean what is used here, too, where
    they are not told which; `parameters` and `resume`, what trains. Copies of parts of the model
    follow it. Nothing is copied or compiled again. A generator enters it anew for each step:
    between steps it would hold for whoever runs then.

    Raises:
        AdapterError: a name is unknown, two of the adapters train one module whole; or it is left
            in another order, thread or task than entered.

    Example:
        >>> import torch, lorafx
        >>> base = torch.nn.Linear(4, 4)
        >>> model, x = lorafx.inject(base), torch.randn(2, 4)
        >>> with lorafx.using(model, None):
        ...     torch.equal(model(x), base(x))
        True
    """
    weights = {} if adapters is None else weights_of(model, adapters)
    choice = injection(model).choice
    with choice.choosing(choice.selection(weights)):
        yield


@contextlib.contextmanager
def rows(
    model: nn.Module, adapters: Sequence[str | Iterable[str] | Mapping[str, float] | None]
) -> Iterator[None]:
    """Within this context each row of a batch uses adapters of its own; None is the base.

    With x (N, ..., in) at a linear call, N rows are named, and row n adds what its adapters do:
    y_n + sum w s (x_n A^T) B^T. Where x has a multiple of N rows, as beams make it, each is meant
    as many times in a row: name them all where they stand otherwise, as `torch.cat([x, x])` of
    guidance does (`2 * adapters`). Only its shape tells what x is: what has N rows by chance is
    taken for the batch, such as N tokens that are routed to one expert, or a contiguous x of N
    tokens where the sequence comes first.

    It holds where `using` does. In training each adapter's gradients are those of its rows, and
    adapters without rows have none. Without gradients, what is written into the `.data` of A or B
    in place may not be seen: write into them under `torch.no_grad()`.

    Raises:
        AdapterError: a name is unknown, or an adapter trains modules whole, which all rows use.
        ValueError: rows cannot be told at a linear call, as where batch and sequence are one
            (GPT-2, experts) or the sequence comes first.

    Example:
        >>> import torch, lorafx
        >>> model = lorafx.inject(torch.nn.Linear(4, 4), adapter="a")
        >>> lorafx.add(model, "b")
        >>> with lorafx.rows(model, ["a", None, {"a": 0.5, "b": 0.5}]):
        ...     y = model(torch.randn(3, 4))
    """
    if isinstance(adapters, (str, Mapping)) or not isinstance(adapters, Sequence) or not adapters:
        raise AdapterError("Rows are given as a list, with what each row of the batch uses, not as "
                           f"{adapters!r}.")
    record = injection(model)
    each = [{} if spec is None else weights_of(model, spec) for spec in adapters]
    here = {name for weights in each for name in weights}
    used = {name: 1.0 for name in record.configs if name in here}
    for name in used:
        if record.trained[name]:
            raise AdapterError(
                f"Adapter {name!r} trains '{record.trained[name][0]}' whole, which is the same for "
                "all rows of a batch: run its rows by themselves.")
    with record.choice.choosing(record.choice.selection(used, each)):
        yield


def named_parameters(
    model: nn.Module | ExportedProgram, adapter: str | None = None
) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name in state_dict, tensor) of the active adapters, or of one.

    These are each A and B, and the parameters of modules trained whole.

    Raises:
        AdapterError: accelerate offloads them, and new ones take their places in each call; or one
            is of a tied pair, of which a pipeline's stage has the other half.

    Example:
        >>> import torch, lorafx
        >>> [name for name, _ in lorafx.named_parameters(lorafx.inject(torch.nn.Linear(4, 4)))]
        ['lora.default.A', 'lora.default.B']
    """
    if isinstance(model, ExportedProgram):
        yield from named_factors(model, adapter)
        return
    if adapter is not None:
        check_adapter(model, adapter)
    wanted = list(injection(model).active) if adapter is None else [adapter]
    check_ties_are_here(model)
    settle(model)
    seen: set[nn.Parameter] = set()
    away = offloaded_parameters(module for _, module in all_modules(model))
    for path, module in named_modules(model):
        if not isinstance(module, HOLDERS):
            continue
        for name in wanted:
            held = module._modules.get(name)
            if held is None:
                continue
            for key, parameter in held.named_parameters():
                if parameter in away:
                    raise AdapterError(OFFLOADED)
                if parameter not in seen:
                    seen.add(parameter)
                    yield dotted(path, f"{name}.{key}"), parameter


def parameters(
    model: nn.Module | ExportedProgram, adapter: str | None = None
) -> Iterator[nn.Parameter]:
    """Yield the tensors to give an optimizer: those of `named_parameters`.

    Example:
        >>> import torch, lorafx
        >>> model = lorafx.inject(torch.nn.Linear(4, 4))
        >>> optimizer = torch.optim.AdamW(lorafx.parameters(model), lr=1e-4)
    """
    return (parameter for _, parameter in named_parameters(model, adapter))


def remove(model: nn.Module, adapter: str) -> None:
    """Forget an adapter and free its tensors; if it was active, the other active ones stay so.

    Raises:
        AdapterError: the model has no such adapter, or it is used within `using` or `rows`.

    Example:
        >>> import torch, lorafx
        >>> model = lorafx.inject(torch.nn.Linear(4, 4))
        >>> lorafx.remove(model, "default")
        >>> lorafx.adapters(model)
        []
    """
    check_adapter(model, adapter)
    record = injection(model)
    record.choice.check_not_entered(adapter)
    with retiring(model, adapter) as held:
        del record.configs[adapter], record.trained[adapter]
        record.active = {name: w for name, w in record.active.items() if name != adapter}
        for holder in held:
            holder._modules = {name: m for name, m in holder._modules.items() if name != adapter}
    drop_empty(model)


def only_one(
    model: nn.Module, adapter: str | None, active: Collection[str], doing: str
) -> str:
    """Return the adapter that was named, or the only active one."""
    if adapter is not None:
        check_adapter(model, adapter)
        return adapter
    if len(active) != 1:
        known = ", ".join(map(repr, injection(model).configs)) or "none"
        raise AdapterError(f"{doing}, but {len(active)} are active: name one with adapter=..., of "
                           f"{known}.")
    return [*active][0]
