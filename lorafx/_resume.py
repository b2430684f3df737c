"""Where a training run stands, taken from a live model and its optimizer, and put back."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ._adapter.adapter import Adapter, Training
from ._adapter.config import shown
from ._adapter.names import dotted
from ._errors import ConfigError, FormatError, MismatchError
from ._formats.table import read_adapter
from ._formats.training import fits
from ._model import generators
from ._model.attach import extract, trained_whole
from ._model.branches import branches, factors_at
from ._model.fit import fit
from ._model.program import read_program
from ._switch import only_active


NOT_OPTIONS = ("params", "param_names")  # of a parameter group: they are this process's own


@torch.inference_mode(False)
def resume(
    model: nn.Module, optimizer: torch.optim.Optimizer, path: str | os.PathLike[str], adapter: str | None = None
) -> int:
    """Continue a training run from a file of `lorafx.save(model, path, optimizer=..., step=...)`: returns its step.

    The adapter's tensors, the optimizer's state and options, and the random generators (torch on the CPU and on the
    GPUs of the model, Python, and numpy if it was loaded) are set to what they were, so that training goes on, bit for
    bit, as if it had never stopped. It is a call of its own, after `lorafx.load`, because an optimizer can only be made
    for parameters that exist. What lorafx does not know of is yours to continue: a scheduler (make it anew and load
    its own state_dict before this call, as making it sets the rate), generators of your own, the place in the data, the
    base's buffers. Nothing changes on failure.

    Args:
        model: an injected model with an adapter of the same sites and shapes, best by `lorafx.load(base, path)`.
        optimizer: made as it was for the run that was saved: of the same class, for the same parameters in the same
            groups.
        path: a `.safetensors` file.
        adapter: which of the model's adapters; by default the only active one.

    Raises:
        FormatError: the file is missing, damaged, or has no training state. MismatchError: it was saved from another
        adapter, another kind of optimizer, or with other parameters or groups.

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
    adapter, source = only_active(model, adapter, "resume continues one adapter"), f"'{os.fspath(path)}'"
    found, made_for = read_adapter(path, model=model)
    training = found.training
    if training is None:
        raise FormatError(f"{source} has no training state: it was saved without optimizer=... and step=....")
    fitted, live = fit(read_program(model), found, source, made_for), _live(model, adapter)
    _check_adapter(extract(model, adapter), fitted, source)
    names = _names(found, fitted, source)
    state = _state_dict(optimizer, training, {name: live[names[name]] for name in names}, source)
    _check_generators(model, training.random, source)
    optimizer.load_state_dict(state)
    _keep_dtypes(optimizer, state)
    with torch.no_grad():
        for name, tensor in fitted.tensors():
            live[name].copy_(tensor)
    generators.set_states(training.random)
    return training.step


def capture(model: nn.Module, adapter: str, optimizer: torch.optim.Optimizer | None, step: int | None) -> Training:
    """Where the training of an adapter stands; its tensors share storage with the optimizer's."""
    if not isinstance(optimizer, torch.optim.Optimizer) or type(step) is not int or not 0 <= step < 2**63:
        raise ConfigError("A training run is saved with both, optimizer=... and step=... (a number of steps), not with "
                          f"{type(optimizer).__name__} and {shown(step)}.")
    names = {id(parameter): name for name, parameter in _live(model, adapter).items()}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not all(id(parameter) in names for parameter in (*held, *optimizer.state)):
        raise ConfigError(f"The optimizer holds a parameter that is not of adapter {adapter!r}: save keeps the "
                          f"optimizer of one adapter, made for lorafx.parameters(model, {adapter!r}).")
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            if isinstance(value, Tensor) and not fits(value, parameter.shape):
                raise ConfigError(f"The optimizer keeps '{key}' {tuple(value.shape)} of '{names[id(parameter)]}' "
                                  f"{tuple(parameter.shape)}: a state of that shape cannot be saved.")
    groups = [({key: value for key, value in group.items() if key not in NOT_OPTIONS},
               [names[id(parameter)] for parameter in group["params"]]) for group in optimizer.param_groups]
    state = {names[id(parameter)]: dict(entries) for parameter, entries in optimizer.state.items()}
    return Training(step, _kind(optimizer), groups, state, generators.states(model))


def _live(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """The tensors of an adapter under the names that `extract` gives them."""
    found: dict[str, nn.Parameter] = {}
    for site, branch in branches(model).items():
        factors = factors_at(branch, adapter)
        if factors is not None:
            found |= {dotted(site, "lora.A"): factors.A, dotted(site, "lora.B"): factors.B}
    return found | trained_whole(model, adapter)


def _kind(optimizer: torch.optim.Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def _check_adapter(ours: Adapter, theirs: Adapter, source: str) -> None:
    mine, other = ({name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in adapter.tensors()}
                   for adapter in (ours, theirs))
    for name in sorted(mine.keys() | other.keys()):
        if mine.get(name) != other.get(name):
            raise MismatchError(f"{source} has '{name}' as {other.get(name, 'nothing')}, and adapter {ours.name!r} as "
                                f"{mine.get(name, 'nothing')}: lorafx.load(base, path) makes one that fits.")
    for what in ("dropout", "share_dropout"):
        if getattr(ours.config, what) != getattr(theirs.config, what):
            raise MismatchError(f"{source} was trained with {what}={getattr(theirs.config, what)}, and adapter "
                                f"{ours.name!r} has {getattr(ours.config, what)}.")
    for site, pair in theirs.pairs.items():
        if ours.pairs[site].scale != pair.scale:
            raise MismatchError(f"{source} has scale {pair.scale} at '{site}', and adapter {ours.name!r} "
                                f"{ours.pairs[site].scale}: lorafx.load(base, path) makes one that fits.")


def _names(found: Adapter, fitted: Adapter, source: str) -> dict[str, str]:
    """{name in the file: name in this model} of an adapter's tensors, which must be the same in both."""
    old, new = dict(found.tensors()), dict(fitted.tensors())
    if len(old) != len(new) or not all(map(_same, old.values(), new.values())):
        raise MismatchError(f"{source} was trained on a model that stores its weights in another way: lorafx.load "
                            "takes the adapter, but its training cannot go on in this model.")
    return dict(zip(old, new))


def _same(theirs: Tensor, ours: Tensor) -> bool:
    return torch.equal(theirs.to(ours), ours)


def _state_dict(
    optimizer: torch.optim.Optimizer, training: Training, live: Mapping[str, nn.Parameter], source: str
) -> dict[str, Any]:
    """What optimizer.load_state_dict gets, with all of it checked; `live` has the parameters by their names there."""
    if not isinstance(optimizer, torch.optim.Optimizer) or _kind(optimizer) != training.kind:
        raise MismatchError(f"{source} has the state of a {shown(training.kind)}, not of a {_kind(optimizer)}.")
    state = optimizer.state_dict()
    if len(state["param_groups"]) != len(training.groups):
        raise MismatchError(f"{source} has {len(training.groups)} parameter groups, and the optimizer "
                            f"{len(state['param_groups'])}.")
    numbers: dict[int, int] = {}  # of parameters in the optimizer's state_dict, by id
    for ours, held, (options, names) in zip(state["param_groups"], optimizer.param_groups, training.groups):
        if {id(live[name]) for name in names} != {id(parameter) for parameter in held["params"]}:
            raise MismatchError(f"{source} has a parameter group with {len(names)} tensors, such as "
                                f"{', '.join(map(repr, names[:1])) or 'none'}, and the optimizer holds others in it: "
                                "make it as it was made for the run that was saved.")
        numbers |= {id(parameter): index for parameter, index in zip(held["params"], ours["params"])}
        ours |= _options(ours, options, source)
    state["state"] = {}
    for name, entries in training.state.items():
        for key, value in entries.items():
            if isinstance(value, Tensor) and not fits(value, live[name].shape):
                shapes = f"'{key}' {tuple(value.shape)} for '{name}' {tuple(live[name].shape)}"
                raise MismatchError(f"{source} has {shapes}, which no optimizer keeps.")
        state["state"][numbers[id(live[name])]] = {key: value.clone() if isinstance(value, Tensor) else value
                                                   for key, value in entries.items()}
    return state


def _options(ours: Mapping[str, Any], theirs: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The options of a parameter group in a file: those of the optimizer, and what a scheduler adds to them."""
    for key in ours.keys() - {*NOT_OPTIONS}:
        if key not in theirs or not _alike(ours[key], theirs[key]):
            has = f"{key}={shown(theirs[key])}" if key in theirs else f"no {key}"
            raise MismatchError(f"{source} has {has} in a parameter group, and the optimizer "
                                f"{key}={shown(ours[key])}.")
    return {key: tuple(value) if isinstance(ours.get(key), tuple) else value for key, value in theirs.items()
            if key not in NOT_OPTIONS}


def _alike(ours: Any, theirs: Any) -> bool:
    """Whether an option in a file is of the kind that the optimizer has."""
    if isinstance(ours, (tuple, list)):
        return isinstance(theirs, (tuple, list)) and len(ours) == len(theirs) and all(map(_alike, ours, theirs))
    if ours is None or isinstance(ours, bool):  # such as foreach and fused, which are None until they are set
        return theirs is None or isinstance(theirs, bool)
    return isinstance(theirs, (int, float) if isinstance(ours, (int, float)) else type(ours))


def _keep_dtypes(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Undo that load_state_dict casts floating-point state to the parameter's dtype."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in enumerate(parameters):
        for key, value in state["state"].get(number, {}).items():
            loaded = optimizer.state[parameter][key]
            if isinstance(value, Tensor) and loaded.dtype != value.dtype:
                optimizer.state[parameter][key] = value.to(loaded.device)


def _check_generators(model: nn.Module, states: Mapping[str, Tensor], source: str) -> None:
    drawn, kept = generators.devices_of(model), states.keys() - {"python", "numpy"}
    if drawn != kept or "python" not in states:
        raise MismatchError(f"{source} has random numbers of {shown(sorted(kept))}, and this model is on "
                            f"{', '.join(sorted(drawn))}: put it where it was trained.")
    try:
        generators.check(states)
    except (ValueError, TypeError, LookupError, OverflowError, RuntimeError) as error:
        raise FormatError(f"{source} is damaged: a random generator does not take the state in it: "
                          f"{str(error)[:200]!r}.") from error
