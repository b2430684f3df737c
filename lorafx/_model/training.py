"""Where a training run stands: taken from an adapter's live tensors and optimizer, and put back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._adapter.adapter import Adapter, Training
from .._adapter.config import short_repr
from .._adapter.names import dotted
from .._errors import AdapterError, ConfigError, MismatchError
from .._graph.dispatched import offloaded_parameters
from .._graph.loaded import loaded
from . import generators
from .branches import branches, factors_at
from .factors import OFFLOADED
from .extract import trained_whole
from .flat import Layout, in_shape
from .fsdp import settle
from .record import is_cut
from .together import from_all, on_cpu

Groups = list[tuple[dict[str, Any], list[str]]]  # (options, names of tensors)
State = dict[str, dict[str, Any]]  # {name of a tensor: {key: what the optimizer keeps}}
# (module, class, attribute): an optimizer of this class stands for the one in this attribute.
# A class is looked up only where its module is loaded, so that nothing is imported for it.
WRAPPERS = (("accelerate.optimizer", "AcceleratedOptimizer", "optimizer"),)
NOT_OPTIONS = ("params", "param_names")  # of a parameter group: they are this process's own


def live_tensors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Return the tensors of an adapter under the names that `extract` gives them."""
    settle(model)
    found: dict[str, Tensor] = {}
    for site, branch in branches(model).items():
        factors = factors_at(branch, adapter)
        if factors is not None:
            found[dotted(site, "lora.A")] = factors.A
            found[dotted(site, "lora.B")] = factors.B
    found |= trained_whole(model, adapter)
    if not offloaded_parameters(model.modules()).isdisjoint(found.values()):
        raise AdapterError(OFFLOADED)
    return found


def _unwrapped(optimizer: Any) -> Any:
    for where, name, attribute in WRAPPERS:
        cls = loaded(where, name)
        if cls is not None and isinstance(optimizer, cls):
            return _unwrapped(getattr(optimizer, attribute))
    return optimizer


def capture(model: nn.Module, adapter: str, optimizer: Any, step: Any) -> Training:
    """Return where the training of an adapter stands, on the optimizer's own tensors."""
    optimizer = _unwrapped(optimizer)
    is_step = type(step) is int and 0 <= step < 2**63
    if not isinstance(optimizer, torch.optim.Optimizer) or not is_step:
        raise ConfigError(
            "A training run is saved with both, optimizer=... and step=... (a number of steps), "
            f"not with {type(optimizer).__name__} and {short_repr(step)}.")
    with in_shape(model):
        live = live_tensors(model, adapter)
        groups, state = _groups_and_state(live, adapter, optimizer, Layout(model))
    if is_cut(model):
        groups, state = _of_all_stages(groups, state)
    return Training(step, _kind(optimizer), groups, state, generators.states(model))


def _groups_and_state(
    live: Mapping[str, Tensor], adapter: str, optimizer: torch.optim.Optimizer,
    layout: Layout,
) -> tuple[Groups, State]:
    """What an optimizer has for an adapter's tensors, of whole ones, under their names."""
    names = {id(parameter): name for name, parameter in live.items()}
    groups: Groups = []
    for group in optimizer.param_groups:
        _check_known(group["params"], names, adapter)
        options = {key: value for key, value in group.items() if key not in NOT_OPTIONS}
        groups.append((options, [names[id(parameter)] for parameter in group["params"]]))
    _check_known(optimizer.state, names, adapter)
    kept = {tensor: optimizer.state.get(tensor, {}) for tensor in live.values()
            if isinstance(tensor, nn.Parameter)}
    state: State = {}
    for parameter, entries in layout.gathered(kept).items():
        name = names[id(parameter)]
        for key, value in entries.items():
            if isinstance(value, Tensor) and not _fits_shape(value, parameter.shape):
                raise ConfigError(
                    f"The optimizer keeps '{key}' {tuple(value.shape)} of '{name}' "
                    f"{tuple(parameter.shape)}: a state of that shape cannot be saved.")
        state[name] = entries
    # optimizer.state has another order in each process where FSDP1 gives it parts of some only
    order = [name for _, of_group in groups for name in of_group]
    return groups, {name: state[name] for name in (*order, *state) if name in state}


def _of_all_stages(groups: Groups, state: State) -> tuple[Groups, State]:
    """What the optimizers of a pipeline's stages have together; options are the first one's."""
    parts = from_all(on_cpu((groups, state)))
    if len({len(theirs) for theirs, _ in parts}) > 1:
        raise ConfigError("The optimizers of a pipeline's stages have different numbers of "
                          "parameter groups: make them alike.")
    joined: State = {}
    names: list[list[str]] = [[] for _ in groups]
    for theirs, their_state in parts:
        joined |= {name: kept for name, kept in their_state.items() if name not in joined}
        for own, (_, more) in zip(names, theirs):
            own += [name for name in more if name not in own]
    return [(options, own) for (options, _), own in zip(parts[0][0], names)], joined


def part_in(model: nn.Module, adapter: str, found: Adapter) -> Adapter:
    """Of an adapter from a file, what a pipeline's stage holds; all of it in any other model."""
    if not is_cut(model):
        return found
    with in_shape(model):
        here = live_tensors(model, adapter)
    training = found.training
    if training is not None:
        groups = [(options, [name for name in names if name in here])
                  for options, names in training.groups]
        state = {name: entries for name, entries in training.state.items() if name in here}
        training = dataclasses.replace(training, groups=groups, state=state)
    pairs = {site: pair for site, pair in found.pairs.items() if dotted(site, "lora.A") in here}
    trained = {name: tensor for name, tensor in found.trained.items() if name in here}
    return dataclasses.replace(found, pairs=pairs, trained=trained, training=training)


def _check_known(parameters: Any, names: Mapping[int, str], adapter: str) -> None:
    """Raise ConfigError unless all of these parameters are an adapter's."""
    if not all(id(parameter) in names for parameter in parameters):
        raise ConfigError(
            f"The optimizer holds a parameter that is not of adapter {adapter!r}: save keeps the "
            f"optimizer of one adapter, made for lorafx.parameters(model, {adapter!r}).")


def _fits_shape(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    """True if a tensor can be an optimizer's state for a parameter of this shape.

    It is one number, or in each dimension as long as the parameter or 1.
    """
    if tensor.numel() == 1:
        return True
    if tensor.ndim != len(shape):
        return False
    return all(length in (1, whole) for length, whole in zip(tensor.shape, shape))


def _kind(optimizer: torch.optim.Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def state_to_load(
    optimizer: torch.optim.Optimizer,
    training: Training,
    parameters: Mapping[str, Tensor],
    source: str,
    layout: Layout,
) -> dict[str, Any]:
    """Return what `load_state` puts into an optimizer, with all of it checked; nothing changes.

    `parameters` has this process's own by the names that the training state has for them.
    """
    optimizer = _unwrapped(optimizer)
    if not isinstance(optimizer, torch.optim.Optimizer) or _kind(optimizer) != training.kind:
        raise MismatchError(f"{source} has the state of a {short_repr(training.kind)}, not of a "
                            f"{_kind(optimizer)}.")
    state = optimizer.state_dict()
    if len(state["param_groups"]) != len(training.groups):
        raise MismatchError(f"{source} has {len(training.groups)} parameter groups, and the "
                            f"optimizer {len(state['param_groups'])}.")
    numbers: dict[int, int] = {}  # of parameters in the optimizer's state_dict, by id
    groups = zip(state["param_groups"], optimizer.param_groups, training.groups)
    for ours, live_group, (options, names) in groups:
        held = [id(parameter) for parameter in live_group["params"]]
        if {id(parameters[name]) for name in names} != {*held}:
            raise MismatchError(
                f"{source} has a parameter group with {len(names)} tensors, such as "
                f"{', '.join(map(repr, names[:1])) or 'none'}, and the optimizer holds others in "
                "it: make it as it was made for the run that was saved.")
        numbers |= dict(zip(held, ours["params"]))
        ours |= _options(ours, options, source)
    state["state"] = {}
    for name, entries in training.state.items():
        parameter = parameters[name]
        _check_entries(name, entries, parameter, source)
        if not layout.is_elsewhere(parameter):
            state["state"][numbers[id(parameter)]] = {
                key: layout.spread(parameter, value.clone()) if isinstance(value, Tensor) else value
                for key, value in entries.items()}
    return state


def _check_entries(
    name: str, entries: Mapping[str, Any], parameter: Tensor, source: str
) -> None:
    for key, value in entries.items():
        if isinstance(value, Tensor) and not _fits_shape(value, parameter.shape):
            raise MismatchError(
                f"{source} has '{key}' {tuple(value.shape)} for '{name}' "
                f"{tuple(parameter.shape)}, which no optimizer keeps.")


def _options(ours: Mapping[str, Any], theirs: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The options of a group in a file: the optimizer's, and what a scheduler adds to them."""
    for key in ours.keys() - {*NOT_OPTIONS}:
        if key not in theirs or not _alike(ours[key], theirs[key]):
            saved = f"{key}={short_repr(theirs[key])}" if key in theirs else f"no {key}"
            raise MismatchError(f"{source} has {saved} in a parameter group, and the optimizer "
                                f"{key}={short_repr(ours[key])}.")
    options: dict[str, Any] = {}
    for key, value in theirs.items():
        if key not in NOT_OPTIONS:
            options[key] = tuple(value) if isinstance(ours.get(key), tuple) else value
    return options


def _alike(ours: Any, theirs: Any) -> bool:
    """True if an option in a file is of the kind that the optimizer has."""
    if isinstance(ours, (tuple, list)):
        same_length = isinstance(theirs, (tuple, list)) and len(ours) == len(theirs)
        return same_length and all(map(_alike, ours, theirs))
    if ours is None or isinstance(ours, bool):  # such as foreach and fused, None until they are set
        return theirs is None or isinstance(theirs, bool)
    return isinstance(theirs, (int, float) if isinstance(ours, (int, float)) else type(ours))


def load_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Let an optimizer go on from a checked state, in the dtypes that it was saved in.

    load_state_dict casts floating-point state to the parameter's dtype.
    """
    optimizer = _unwrapped(optimizer)
    optimizer.load_state_dict(dict(state))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in enumerate(parameters):
        for key, value in state["state"].get(number, {}).items():
            loaded = optimizer.state[parameter][key]
            if isinstance(value, Tensor) and loaded.dtype != value.dtype:
                optimizer.state[parameter][key] = value.to(loaded.device)
