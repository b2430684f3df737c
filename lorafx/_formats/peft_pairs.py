"""An adapter's pairs as PEFT has them: each for all of a weight, or of a parameter by itself."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._adapter.adapter import Adapter, Pair, StoredWeight
from .._adapter.names import dotted, split_block
from .._errors import ConfigError
from .._graph.loaded import loaded
from .._graph.modules import named_modules, submodule, users_modules
from .._model.branches import Branch
from .._model.quantised import is_packed
from .._model.trained import Copies, Trained
from .adapter_file import INSTEAD


class PeftPair(NamedTuple):
    """A pair, the name that its config goes by, its module, and its parameter if that is named."""

    name: str
    module: str
    attribute: str | None
    pair: Pair


def conv1d() -> tuple[type, ...]:
    """Return transformers' Conv1D, which stores (in, out), if it is loaded: models load it."""
    found = loaded("transformers.pytorch_utils", "Conv1D")
    return () if found is None else (found,)


def peft_pairs(adapter: Adapter, model: nn.Module) -> list[PeftPair]:
    """Return an adapter's pairs as PEFT has them; ConfigError where PEFT would add another sum."""
    _check_sites_untied(adapter, model)
    attentions: dict[str, dict[str, Pair]] = defaultdict(dict)
    found: list[PeftPair] = []
    modules = users_modules(model)
    for name, (pair, stored) in _whole_weights(adapter).items():
        owner, attribute = name, "weight"  # as a weight of that name goes by its module's
        if name not in modules:
            owner, _, attribute = name.rpartition(".")
        module = submodule(model, owner)
        above, _, last = owner.rpartition(".")
        if isinstance(module, nn.MultiheadAttention) and attribute == "in_proj_weight":
            attentions[owner]["in_proj"] = pair
        elif last == "out_proj" and isinstance(submodule(model, above), nn.MultiheadAttention):
            attentions[above]["out_proj"] = pair
        elif attribute == "weight" and _is_layer(module):
            found.append(PeftPair(owner, owner, None, pair))
        elif not owner:
            raise ConfigError(f"PEFT's format has no place for an adapter of '{name}', a parameter "
                              f"of the model itself: {INSTEAD}.")
        elif isinstance(module, (nn.Linear, nn.Embedding, nn.MultiheadAttention, *conv1d())):
            raise ConfigError(f"PEFT's format has no place for an adapter of '{name}', a parameter "
                              f"of a {type(module).__name__}: {INSTEAD}.")
        else:
            pair = _as_parameter(name, pair, stored, module)
            found.append(PeftPair(dotted(owner, attribute), owner, attribute, pair))
    for owner, halves in attentions.items():
        found += _attention(model, owner, halves)
    _check_together(adapter, model, found)
    return found


def _is_layer(module: nn.Module) -> bool:
    """True for a layer that PEFT adapts as one, whose weight goes by the layer's name."""
    return isinstance(module, (nn.Linear, *conv1d())) or is_packed(module)


def _whole_weights(adapter: Adapter) -> dict[str, tuple[Pair, StoredWeight]]:
    """{name of a weight: what is added to all of it, with how it is stored}.

    Blocks of its rows are joined: of one A and one scale they keep its rank, as when they were read
    from one pair; else their ranks add up.
    """
    blocks: dict[str, list[tuple[Pair, StoredWeight]]] = defaultdict(list)
    for site, pair in adapter.pairs.items():
        blocks[split_block(site)[0]].append((pair, adapter.stored[site]))
    whole = {}
    for name, parts in blocks.items():
        pair, stored = parts[0]
        height = stored.shape[-1] if stored.transposed else stored.shape[-2]  # of B
        if len(parts) > 1 or pair.B.shape[-2] != height:
            pair = _sum_of_blocks(parts, height)
        whole[name] = pair, stored._replace(start=0)
    return whole


def _sum_of_blocks(parts: list[tuple[Pair, StoredWeight]], height: int) -> Pair:
    """The sum of what is added to some rows each, as one pair (rank, in), (height, rank)."""
    first = parts[0][0]
    alike = all(torch.equal(pair.A, first.A) and pair.scale == first.scale for pair, _ in parts)
    rank = first.A.shape[0] if alike else sum(pair.A.shape[0] for pair, _ in parts)
    B = first.B.new_zeros(height, rank)
    column = 0
    for pair, (_, _, start) in parts:
        rows, columns = pair.B.shape
        if alike:
            B[start:start + rows] += pair.B
        else:
            B[start:start + rows, column:column + columns] += pair.B * pair.scale
            column += columns
    if alike:
        return Pair(first.A, B, first.scale)
    return Pair(torch.cat([pair.A for pair, _ in parts]), B, 1.0)


def _as_parameter(name: str, pair: Pair, stored: StoredWeight, module: nn.Module) -> Pair:
    """A parameter's pair for (out, in), or for (in, out) where a module of experts says so."""
    transposed = bool(getattr(module, "is_transposed", False)) and len(stored.shape) == 3
    if transposed and stored.shape[0] == 1:
        raise ConfigError(f"PEFT takes the one transposed expert '{name}' for one that is not: "
                          f"{INSTEAD}.")
    if stored.transposed != transposed:
        return Pair(pair.B.mT, pair.A.mT, pair.scale)  # (B A)^T = A^T B^T
    return pair


def _check_sites_untied(adapter: Adapter, model: nn.Module) -> None:
    """Raise where a site has several names: PEFT would adapt one of them only."""
    sites: dict[Branch, list[str]] = defaultdict(list)
    for path, module in named_modules(model, every_name=True):
        if isinstance(module, Branch) and adapter.name in module._modules:
            sites[module].append(path.rpartition(".")[0])
    for names in sites.values():
        if len(names) > 1:
            raise _tied(names[0], names[1])


def trained_under_every_name(adapter: Adapter, model: nn.Module) -> dict[str, Tensor]:
    """Return what an adapter trains, as many times as the model has names for it, tied to another.

    PEFT copies each module that has one. A module that has two names itself it copies once.
    """
    places: dict[tuple[Copies, str], list[tuple[str, nn.Module]]] = defaultdict(list)
    holders: dict[str, tuple[Copies, str]] = {}
    for path, module in users_modules(model).items():
        trained = module._modules.get("trained")
        copies = trained._modules.get(adapter.name) if isinstance(trained, Trained) else None
        if isinstance(copies, Copies):
            for name, holder in copies.holders().items():
                places[holder].append((dotted(path, name), module))
                holders[dotted(path, name)] = holder
    found: dict[str, Tensor] = {}
    for name, tensor in adapter.trained.items():
        if split_block(name)[1]:
            continue  # PEFT has a place of its own for rows
        first: dict[nn.Module, str] = {}
        for other, module in places[holders[name]]:
            if first.setdefault(module, other) != other:
                raise _tied(first[module], other)
            found[other] = tensor
    return found


def _tied(name: str, other: str) -> ConfigError:
    return ConfigError(
        f"PEFT would change '{name}' and not '{other}', which is tied to it: {INSTEAD}.")


def _check_together(adapter: Adapter, model: nn.Module, pairs: list[PeftPair]) -> None:
    """Raise where PEFT cannot have all of these at once."""
    if any(not pair.module for pair in pairs):
        raise ConfigError("PEFT adapts modules inside a model, and this model is one layer: "
                          f"{INSTEAD}.")
    parameter = next((pair.name for pair in pairs if pair.attribute is not None), None)
    conv1ds = [pair.name for pair in pairs if isinstance(submodule(model, pair.module), conv1d())]
    if parameter is not None and (conv1ds or adapter.config.dropout):
        beside = f"the Conv1D '{conv1ds[0]}'" if conv1ds else "dropout"
        raise ConfigError(f"PEFT cannot adapt the parameter '{parameter}' together with {beside}: "
                          f"{INSTEAD}.")


def _attention(model: nn.Module, owner: str, halves: Mapping[str, Pair]) -> list[PeftPair]:
    """Both halves of an attention, of one rank and scale 1; PEFT adapts both, so one may be 0."""
    module: Any = submodule(model, owner)
    width, some = module.embed_dim, next(iter(halves.values()))
    rank = max(pair.A.shape[0] for pair in halves.values())
    both = []
    places = {"in_proj": (3 * width, owner), "out_proj": (width, dotted(owner, "out_proj"))}
    for half, (height, path) in places.items():
        A, B = some.A.new_zeros(rank, width), some.B.new_zeros(height, rank)
        if half in halves:
            pair = halves[half]
            A[:len(pair.A)], B[:, :len(pair.A)] = pair.A, pair.B * pair.scale
        both.append(PeftPair(owner, path, None, Pair(A, B, 1.0)))
    return both


def as_matrices(pair: Pair) -> tuple[Tensor, Tensor]:
    """Return A and B as matrices: of E experts (E rank, d2), by expert, and (d1, rank E), by rank.
    """
    if pair.A.ndim == 2:
        return pair.A, pair.B
    return pair.A.flatten(0, 1), pair.B.permute(1, 2, 0).flatten(1, 2)
