"""Continues a training run: the adapter, its optimizer and random numbers are what they were."""

import os

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ._adapter.adapter import Adapter, Training
from ._errors import FormatError, MismatchError
from ._formats.table import read_adapter
from ._model import generators
from ._model.exported_program import takes_exported
from ._model.extract import extract_here
from ._model.fit import fit
from ._model.flat import Layout, in_shape
from ._model.program import read_program
from ._model.record import injection
from ._model.training import live_tensors, load_state, part_in, state_to_load
from ._switch import only_one


@takes_exported
@torch.inference_mode(False)
def resume(
    model: nn.Module | ExportedProgram, optimizer: torch.optim.Optimizer,
    path: str | os.PathLike[str], adapter: str | None = None,
) -> int:
    """Continue a training run from a file of `save(..., optimizer=..., step=...)`; return its step.

    The adapter's tensors, the optimizer's state and options, and the random generators (torch on
    the CPU and on the GPUs of the model, Python, and numpy if it was loaded) are set to what they
    were: training goes on bit for bit. It is a call of its own, after `lorafx.load`, because an
    optimizer can only be made for parameters that exist. What lorafx does not know of is yours to
    continue: a scheduler (make it anew and load its own state_dict before this call, as making it
    sets the rate), generators, the place in the data, the base's buffers. All or nothing changes.

    Args:
        model: one that is injected with the same sites and shapes, best by `lorafx.load`.
        optimizer: of the class of the saved run's, for the same parameters in the same groups.
        path: a `.safetensors` file.
        adapter: which of the model's adapters; by default the only active one.

    Raises:
        FormatError: the file is missing, damaged, or has no training state.
        MismatchError: it has another adapter, kind of optimizer, parameters or groups.

    Example:
        >>> import tempfile, torch, lorafx
        >>> base, path = torch.nn.Linear(4, 4), tempfile.mkdtemp() + "/adapter.safetensors"
        >>> model = lorafx.inject(base)
        >>> optimizer = torch.optim.AdamW(lorafx.parameters(model))
        >>> for step in range(1, 4):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(2, 4)).square().sum().backward()
        ...     optimizer.step()
        >>> lorafx.save(model, path, optimizer=optimizer, step=step)

        In another process:

        >>> model = lorafx.load(base, path)
        >>> optimizer = torch.optim.AdamW(lorafx.parameters(model))
        >>> lorafx.resume(model, optimizer, path)
        3
    """
    assert not isinstance(model, ExportedProgram)  # takes_exported saw to that
    adapter = only_one(model, adapter, injection(model).active, "resume continues one adapter")
    source = f"'{os.fspath(path)}'"
    found, made_for = read_adapter(path, model=model)
    found = part_in(model, adapter, found)
    training = _training_of(found, source)
    ours, layout = extract_here(model, adapter), Layout(model)
    with in_shape(model):
        fitted = fit(read_program(model), found, source, made_for)
        _check_adapter(ours, fitted, source)
        live, names = live_tensors(model, adapter), _names_here(found, fitted, source)
        parameters = {name: live[here] for name, here in names.items()}
        state = state_to_load(optimizer, training, parameters, source, layout)
        generators.check(model, training.random, source)
    load_state(optimizer, state)
    with torch.no_grad():
        for name, tensor in fitted.tensors():
            live[name].copy_(layout.spread(live[name], tensor))
    generators.set_states(training.random)
    return training.step


def _training_of(found: Adapter, source: str) -> Training:
    if found.training is None:
        raise FormatError(f"{source} has no training state: it was saved without optimizer=... and "
                          "step=....")
    return found.training


def _check_adapter(ours: Adapter, theirs: Adapter, source: str) -> None:
    """Raise MismatchError unless two adapters have the same tensors, scales and dropout."""
    remedy = "lorafx.load(base, path) makes one that fits."
    mine, other = _descriptions(ours), _descriptions(theirs)
    for name in sorted(mine.keys() | other.keys()):
        if mine.get(name) != other.get(name):
            raise MismatchError(
                f"{source} has '{name}' as {other.get(name, 'nothing')}, and adapter "
                f"{ours.name!r} as {mine.get(name, 'nothing')}: {remedy}")
    for option in ("dropout", "share_dropout"):
        value, saved = getattr(ours.config, option), getattr(theirs.config, option)
        if value != saved:
            raise MismatchError(f"{source} was trained with {option}={saved}, and adapter "
                                f"{ours.name!r} has {value}.")
    for site, pair in theirs.pairs.items():
        scale = ours.pairs[site].scale
        if scale != pair.scale:
            raise MismatchError(f"{source} has scale {pair.scale} at '{site}', and adapter "
                                f"{ours.name!r} {scale}: {remedy}")


def _descriptions(adapter: Adapter) -> dict[str, tuple[tuple[int, ...], str]]:
    """{name: (shape, dtype)} of an adapter's tensors."""
    return {name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in adapter.tensors()}


def _names_here(found: Adapter, fitted: Adapter, source: str) -> dict[str, str]:
    """{name in the file: name in this model} of an adapter's tensors, the same in both."""
    old, new = dict(found.tensors()), dict(fitted.tensors())
    if len(old) != len(new) or not all(map(_equal, old.values(), new.values())):
        raise MismatchError(
            f"{source} was trained on a model that stores its weights in another way: lorafx.load "
            "takes the adapter, but its training cannot go on in this model.")
    return dict(zip(old, new))


def _equal(theirs: Tensor, ours: Tensor) -> bool:
    return torch.equal(theirs.to(ours), ours)
