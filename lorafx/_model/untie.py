"""Tied tensors that an adapter has apart: each gets a Parameter of its own, on the same memory."""

from torch import nn

from .._adapter.adapter import Adapter
from .._adapter.names import dotted, renaming, split_block
from .._errors import AdapterError, MismatchError
from .._graph.modules import Place, users_modules
from .copies import same_kind
from .record import find_injection


def untie(model: nn.Module, adapter: Adapter, source: str) -> bool:
    """Let what an adapter names in a copy of a model be tied to nothing else; True if it was.

    What it trained whole under one of several names stays tied if the adapter is for all of these.
    """
    places: dict[str, Place] = {}
    names_of: dict[nn.Parameter, list[str]] = {}
    for path, module in users_modules(model).items():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                name = dotted(path, attribute)
                places[name] = Place(module, attribute)
                names_of.setdefault(parameter, []).append(name)
    sites, trained, alone = _weights_named(adapter, places)
    found = False
    for parameter, names in names_of.items():
        apart = [name for name in names if name in sites | trained | alone]
        together = len(apart) == 1 and apart[0] in trained and not adapter.untied
        if len(names) == 1 or not apart or together:
            continue
        for name in apart:
            module, attribute = places[name]
            shared = [other for other in names if places[other].module is module and other != name]
            if shared:
                raise MismatchError(f"{source} has '{name}' by itself, but in this model its "
                                    f"module is that of '{shared[0]}' too, which cannot be untied.")
            if find_injection(model) is not None:
                raise AdapterError(f"{source} has '{name}' by itself, which in this injected model "
                                   "is tied: load it into the base, with untie=True, and the "
                                   "other adapters after it.")
            module._parameters[attribute] = same_kind(parameter, parameter.detach())
        found = True
    return found


def _weights_named(
    adapter: Adapter, places: dict[str, Place]
) -> tuple[set[str], set[str], set[str]]:
    """The parameters of this model that an adapter's pairs are for, those that it trained whole,
    and those of which it trained rows alone.
    """
    owners = {name.rpartition(".")[0] for name in places}
    weights = [split_block(site)[0] for site in adapter.pairs]
    of_rows = [split_block(name)[0] for name in adapter.alone]
    rename = renaming([*weights, *adapter.trained, *of_rows], {*owners, *places})
    sites = set()
    for name in map(rename, weights):
        sites.add(name if name in places else dotted(name, "weight"))
    return sites, set(map(rename, adapter.trained)), set(map(rename, of_rows))
