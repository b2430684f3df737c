"""The states of the random generators that training draws from: torch's, Python's, and numpy's."""

import importlib.util
import json
import math
import random
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._adapter.config import short_repr
from .._errors import ConfigError, FormatError, MismatchError


def devices_of(model: nn.Module) -> set[str]:
    """The devices on which torch draws random numbers for a model: the CPU, and its GPUs."""
    devices = {"cpu"}
    for parameter in model.parameters():
        if parameter.device.type == "cuda":
            devices.add(str(parameter.device))
        elif parameter.device.type not in ("cpu", "meta"):
            raise ConfigError(f"the state of the random numbers of '{parameter.device}' cannot be "
                              "kept: train on cpu or cuda.")
    return devices


def states(model: nn.Module) -> dict[str, Tensor]:
    """{device or library: state} of all generators: uint8, 1-D; numpy's where it is loaded."""
    found: dict[str, Tensor] = {}
    for device in sorted(devices_of(model)):
        on_cpu = device == "cpu"
        found[device] = torch.get_rng_state() if on_cpu else torch.cuda.get_rng_state(device)
    found["python"] = _to_bytes(random.getstate())
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        state = numpy.random.get_state(legacy=False)
        if state["bit_generator"] != "MT19937":
            raise ConfigError(f"the state of numpy's {state['bit_generator']} cannot be kept: use "
                              "its own MT19937.")
        state["state"]["key"] = state["state"]["key"].tolist()
        found["numpy"] = _to_bytes(state)
    return found


def check(model: nn.Module, found: Mapping[str, Tensor], source: str) -> None:
    """Raise unless these are states of the generators that this model's training draws from."""
    drawn, kept = devices_of(model), found.keys() - {"python", "numpy"}
    if drawn != kept or "python" not in found:
        raise MismatchError(f"{source} has random numbers of {short_repr(sorted(kept))}, and this "
                            f"model is on {', '.join(sorted(drawn))}: put it where it was trained.")
    try:
        for name, state in found.items():
            _check_state(name, state)
    except (ValueError, TypeError, LookupError, OverflowError, RuntimeError) as error:
        raise FormatError(f"{source} is damaged: a random generator does not take the state in it: "
                          f"{str(error)[:200]!r}.") from error


def _check_state(name: str, state: Tensor) -> None:
    if name == "python":
        random.Random().setstate(_python_state(state))
    elif name == "numpy":
        numpy = _numpy()
        if numpy is not None:
            numpy.random.RandomState().set_state(_numpy_state(state))
    else:
        torch.Generator(name).set_state(state)


def set_states(found: Mapping[str, Tensor]) -> None:
    """Continue all generators from states that were checked."""
    for name, state in found.items():
        if name == "python":
            random.setstate(_python_state(state))
        elif name == "numpy":
            numpy = _numpy()
            if numpy is not None:
                numpy.random.set_state(_numpy_state(state))
        elif name == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, name)


def _python_state(state: Tensor) -> Any:
    version, (*words, position), gauss = _from_bytes(state)
    _check_mersenne_twister(words, position, 0.0 if gauss is None else gauss)
    return version, (*words, position), gauss


def _numpy_state(state: Tensor) -> Any:
    found = _from_bytes(state)
    if found["has_gauss"] not in (0, 1):
        raise ValueError("the state of numpy's random numbers is damaged")
    _check_mersenne_twister(found["state"]["key"], found["state"]["pos"], found["gauss"])
    return found


def _check_mersenne_twister(words: Any, position: Any, gauss: Any) -> None:
    """Raise ValueError unless this is a state of MT19937: numpy reads past a short one's end."""
    whole = type(words) is list and len(words) == 624
    inside = type(position) is int and 0 <= position <= 624
    if not whole or not inside or any(type(w) is not int or not 0 <= w < 2**32 for w in words):
        raise ValueError("the state of a Mersenne twister is damaged")
    if type(gauss) is not float or not math.isfinite(gauss):
        raise ValueError("the number that waits in a random generator is damaged")


def _numpy() -> Any:
    """numpy, or None where it is not installed, so that nothing can draw from it."""
    installed = importlib.util.find_spec("numpy") is not None
    return importlib.import_module("numpy") if installed else None


def _to_bytes(state: Any) -> Tensor:
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def _from_bytes(state: Tensor) -> Any:
    return json.loads(bytes(state.tolist()))
