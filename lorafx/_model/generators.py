"""The states of the random generators that training draws from: torch's, Python's, and numpy's where it is loaded."""

import importlib.util
import json
import random
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import ConfigError


def places(model: nn.Module) -> set[str]:
    """Where torch draws random numbers for a model: on the CPU, and on the GPUs that hold its parameters."""
    devices = {parameter.device for parameter in model.parameters()} - {torch.device("cpu"), torch.device("meta")}
    for device in devices:
        if device.type != "cuda":
            raise ConfigError(f"the state of the random numbers of '{device}' cannot be kept: train on cpu or cuda.")
    return {"cpu", *map(str, devices)}


def states(model: nn.Module) -> dict[str, Tensor]:
    """{place: state} of all generators: uint8, 1-D."""
    found = {place: _torch_state(place) for place in sorted(places(model))}
    found["python"] = _to_bytes(random.getstate())
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        state = numpy.random.get_state(legacy=False)
        if state["bit_generator"] != "MT19937":
            raise ConfigError(f"the state of numpy's {state['bit_generator']} cannot be kept: use its own MT19937.")
        state["state"]["key"] = state["state"]["key"].tolist()
        found["numpy"] = _to_bytes(state)
    return found


def check(found: Mapping[str, Tensor]) -> None:
    """ValueError, TypeError, KeyError or RuntimeError unless generators take these states; sets none."""
    for place, state in found.items():
        if place == "python":
            random.Random().setstate(_python_state(state))
        elif place == "numpy":
            numpy = _numpy()
            if numpy is not None:
                numpy.random.RandomState().set_state(_from_bytes(state))
        else:
            torch.Generator(place).set_state(state)


def set_states(found: Mapping[str, Tensor]) -> None:
    """Continue all generators from states that were checked."""
    for place, state in found.items():
        if place == "python":
            random.setstate(_python_state(state))
        elif place == "numpy":
            numpy = _numpy()
            if numpy is not None:
                numpy.random.set_state(_from_bytes(state))
        elif place == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, place)


def _torch_state(place: str) -> Tensor:
    return torch.get_rng_state() if place == "cpu" else torch.cuda.get_rng_state(place)


def _python_state(state: Tensor) -> Any:
    version, words, gauss = _from_bytes(state)
    if gauss is not None and type(gauss) is not float:
        raise ValueError("the state of Python's random numbers is damaged")
    return version, tuple(words), gauss


def _numpy() -> Any:
    """numpy, or None where it is not installed, so that nothing can draw from it."""
    return importlib.import_module("numpy") if importlib.util.find_spec("numpy") is not None else None


def _to_bytes(state: Any) -> Tensor:
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def _from_bytes(state: Tensor) -> Any:
    return json.loads(bytes(state.tolist()))
