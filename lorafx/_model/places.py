"""Where the tensors of a model are, W under all its names; nothing here traces anything."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._adapter.names import dotted, site_name
from .._graph.modules import Place, tensor_names, users_modules
from .quantised import is_packed, stand_in
from .quantised_tensors import why_no_derivative
from .reading import base_tensor


def places_of(model: nn.Module) -> dict[str, Place]:
    """{site of a whole tensor: Place} of every tensor that could be a site, by all its names."""
    places: dict[str, Place] = {}
    for path, module in users_modules(model).items():
        for attribute in ["weight"] if is_packed(module) else tensor_names(module):
            places[site_name(path, attribute)] = Place(module, attribute)
    return places


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name: Parameter} of the base, under every name."""
    parameters: dict[str, nn.Parameter] = {}
    for path, module in users_modules(model).items():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                parameters[dotted(path, attribute)] = parameter
    return parameters


def base_buffers(model: nn.Module) -> dict[str, Tensor]:
    """{name: buffer} of the base's persistent buffers, under every name."""
    buffers: dict[str, Tensor] = {}
    for path, module in users_modules(model).items():
        for attribute, buffer in module._buffers.items():
            if buffer is not None and attribute not in module._non_persistent_buffers_set:
                buffers[dotted(path, attribute)] = buffer
    return buffers


def tensor_at(place: Place) -> Any:
    """Return what a module has under this name; None for a property.

    A packed weight is a stand-in of W's shape, dtype and device. A parametrized tensor is computed
    on a copy of its module, which leaves the module as it is.
    """
    module, attribute = place
    if attribute == "weight" and is_packed(module):
        return stand_in(module)
    if parametrize.is_parametrized(module, attribute):
        with torch.no_grad():
            return base_tensor(copy.deepcopy(module).eval(), attribute)
    held = (*module._parameters, *module._buffers, *vars(module))
    return base_tensor(module, attribute) if attribute in held else None


class Weight:
    """A tensor that forward may compute with, under all its names in the order of registration."""

    def __init__(self, tensor: Tensor, registered: bool) -> None:
        self.shape, self.dtype = tensor.shape, tensor.dtype
        self.registered = registered  # as a Parameter
        self.no_derivative = why_no_derivative(tensor)  # in its products, or None
        self.places: dict[str, Place] = {}

    @property
    def is_matrix(self) -> bool:
        """True if it has two dimensions or more."""
        return len(self.shape) > 1


class Weights:
    """The tensors of a model, each once: all Parameters, then what else code is found to read.

    What else there is, buffers, parametrized weights and plain attributes, is not looked at before.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.names: list[str] = []  # of all these tensors, as sites
        self._modules = modules
        self._of_parameters: dict[nn.Parameter, Weight] = {}
        self._of_places: dict[Place, Weight] = {}
        for path, module in modules.items():
            packed = is_packed(module)
            if packed and module._parameters.get("weight") is None:
                self.at(Place(module, "weight"))  # it is in buffers, or in no tensor
            for attribute, parameter in module._parameters.items():
                if parameter is not None and (attribute == "weight" or not packed):
                    if parameter not in self._of_parameters:
                        tensor = stand_in(module) if packed else parameter
                        self._of_parameters[parameter] = Weight(tensor, registered=True)
                    self._name(self._of_parameters[parameter], path, Place(module, attribute))

    def __iter__(self) -> Iterator[Weight]:
        yield from self._of_parameters.values()
        yield from self._of_places.values()

    def of_parameter(self, place: Place) -> Weight | None:
        """The weight that is a Parameter at a place, or None."""
        parameter = place.module._parameters.get(place.attribute)
        return None if parameter is None else self._of_parameters.get(parameter)

    def at(self, place: Place) -> Weight | None:
        """The weight at a place, or None where there is no tensor."""
        weight = self.of_parameter(place) or self._of_places.get(place)
        if weight is not None:
            return weight
        tensor = tensor_at(place)
        if not isinstance(tensor, Tensor):
            return None
        weight = self._of_places[place] = Weight(tensor, registered=False)
        for path, module in self._modules.items():
            if module is place.module:
                self._name(weight, path, place)
        return weight

    def _name(self, weight: Weight, path: str, place: Place) -> None:
        name = site_name(path, place.attribute)
        self.names.append(name)
        weight.places[name] = place
