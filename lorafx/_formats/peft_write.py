"""PEFT's directories, written: what PEFT needs to compute the same, and what reads its format."""

import json
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from .._adapter.adapter import Adapter, Pair, Stored
from .._adapter.names import dotted, split_block
from .._errors import ConfigError
from .._graph.modules import LorafxModule, submodule, users_modules
from .._model.branches import Branch
from .peft_config import bytes_digest, config_digest
from .peft_read import BEFORE, DIGEST, PREFIX, WHOLE


class _PeftPair(NamedTuple):
    """One pair as PEFT has it: the name that its config goes by, its module, and its parameter if that is named."""

    name: str
    module: str
    attribute: str | None
    pair: Pair


def encode(adapter: Adapter, model: nn.Module, before: bytes | None) -> tuple[bytes, bytes]:
    """The contents of adapter_config.json and of adapter_model.safetensors.

    `before` is the config that is there already, if one is: the tensors stand beside it if saving ends half-way.
    """
    whole = _whole(adapter)
    entries = _entries(adapter, model, whole)
    biases, modules, tensors = _trained(adapter, model, entries)
    by_module: dict[str, list[_PeftPair]] = defaultdict(list)
    for entry in entries:
        by_module[entry.module].append(entry)
    for module, group in by_module.items():
        parameters = list(submodule(model, module)._parameters)
        group.sort(key=lambda entry: parameters.index(entry.attribute) if entry.attribute else 0)
        for position, entry in enumerate(group):
            after = 0 if entry.attribute is None else len(group) - 1 - position
            stem = _stem(entry.module, entries) + ".base_layer" * after
            A, B = _flat(entry.pair)
            tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = A, B
    config = _config(adapter, model, entries, modules, biases)
    content = {PREFIX + name: tensor.detach().cpu().contiguous().clone() for name, tensor in sorted(tensors.items())}
    text, header = json.dumps(config, indent=2), {"format": "pt", DIGEST: config_digest(config)}
    if before not in (None, text.encode()):
        header |= {WHOLE: text, BEFORE: bytes_digest(before)}
    return text.encode(), safetensors.torch.save(content, header)


def _stem(module: str, entries: Iterable[_PeftPair]) -> str:
    """How keys name an adapted module: an attention's out_proj is below the attention that PEFT wraps."""
    inner = any(entry.module == module and entry.attribute is None and entry.name != module for entry in entries)
    return module.removesuffix("out_proj") + "base_layer.out_proj" if inner else module


def _whole(adapter: Adapter) -> dict[str, tuple[Pair, Stored]]:
    """{name of a weight: what is added to all of it, with how it is stored}; blocks of its rows are put together.

    Blocks of one A and one scale keep its rank, as when they were read from one pair; else their ranks add up.
    """
    blocks: dict[str, list[tuple[Pair, Stored]]] = defaultdict(list)
    for site, pair in adapter.pairs.items():
        blocks[split_block(site)[0]].append((pair, adapter.stored[site]))
    found = {}
    for name, parts in blocks.items():
        (first, stored), *others = parts
        height = stored.shape[-1] if stored.transposed else stored.shape[-2]  # of B
        if not others and first.B.shape[-2] == height:
            found[name] = first, stored
            continue
        alike = all(torch.equal(pair.A, first.A) and pair.scale == first.scale for pair, _ in others)
        B = first.B.new_zeros(height, sum(pair.B.shape[1] for pair, _ in parts if not alike) or first.B.shape[1])
        column = 0
        for pair, (_, _, start) in parts:
            length, rank = pair.B.shape
            B[start:start + length, column:column + rank] += pair.B if alike else pair.B * pair.scale
            column += 0 if alike else rank
        A = first.A if alike else torch.cat([pair.A for pair, _ in parts])
        found[name] = Pair(A, B, first.scale if alike else 1.0), stored._replace(start=0)
    return found


def _entries(adapter: Adapter, model: nn.Module, whole: Mapping[str, tuple[Pair, Stored]]) -> list[_PeftPair]:
    attentions: dict[str, dict[str, Pair]] = defaultdict(dict)
    entries, modules = [], users_modules(model)
    _check_alone(adapter, model)
    for name, (pair, stored) in whole.items():
        # a weight goes by its module's name if it is called weight
        owner, attribute = (name, "weight") if name in modules else (name.rpartition(".")[0], name.rpartition(".")[2])
        module = submodule(model, owner)
        above = owner.rpartition(".")[0]
        if isinstance(module, nn.MultiheadAttention) and attribute == "in_proj_weight":
            attentions[owner]["in_proj"] = pair
        elif owner.rpartition(".")[2] == "out_proj" and isinstance(submodule(model, above), nn.MultiheadAttention):
            attentions[above]["out_proj"] = pair
        elif attribute == "weight" and isinstance(module, (nn.Linear, *_conv1d())):
            entries.append(_PeftPair(owner, owner, None, pair))
        elif not owner or isinstance(module, (nn.Linear, nn.Embedding, nn.MultiheadAttention, *_conv1d())):
            raise ConfigError(f"PEFT's format has no place for an adapter of '{name}', a parameter of "
                              f"{'the model itself' if not owner else 'a ' + type(module).__name__}: {_INSTEAD}.")
        else:
            swapped = bool(getattr(module, "is_transposed", False)) and len(stored.shape) == 3
            if swapped and stored.shape[0] == 1:
                raise ConfigError(f"PEFT takes the one transposed expert '{name}' for one that is not: {_INSTEAD}.")
            if stored.transposed != swapped:
                pair = Pair(pair.B.mT, pair.A.mT, pair.scale)
            entries.append(_PeftPair(dotted(owner, attribute), owner, attribute, pair))
    for owner, halves in attentions.items():
        entries += _attention(model, owner, halves)
    if any(not entry.module for entry in entries):
        raise ConfigError(f"PEFT adapts modules inside a model, and this model is one layer: {_INSTEAD}.")
    parameter = next((entry.name for entry in entries if entry.attribute is not None), None)
    conv1d_layers = [entry.name for entry in entries if isinstance(submodule(model, entry.module), _conv1d())]
    if parameter is not None and (conv1d_layers or adapter.config.dropout):
        beside = f"the Conv1D '{conv1d_layers[0]}'" if conv1d_layers else "dropout"
        raise ConfigError(f"PEFT cannot adapt the parameter '{parameter}' together with {beside}: {_INSTEAD}.")
    return entries


_INSTEAD = "save to a path that ends in .safetensors"


def _check_alone(adapter: Adapter, model: nn.Module) -> None:
    """Raise where an adapter is for a tensor that has several names: PEFT would change it under one alone."""
    sites: dict[Branch, list[str]] = defaultdict(list)
    tensors: dict[nn.Parameter, list[str]] = defaultdict(list)
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Branch) and adapter.name in module._modules:
            sites[module].append(path.rpartition(".")[0])
        for name, parameter in module._parameters.items() if not isinstance(module, LorafxModule) else ():
            if parameter is not None:
                tensors[parameter].append(dotted(path, name))
    trained = [names for names in tensors.values() if not adapter.trained.keys().isdisjoint(names)]
    for names in (*sites.values(), *trained):
        if len(names) > 1:
            raise ConfigError(f"PEFT would change '{names[0]}' and not '{names[1]}', which is tied to it: {_INSTEAD}.")


def _attention(model: nn.Module, owner: str, halves: Mapping[str, Pair]) -> list[_PeftPair]:
    """Both halves of an attention, of one rank and scale 1, since PEFT adapts both or none; what is missing is 0."""
    module: Any = submodule(model, owner)
    width, some = module.embed_dim, next(iter(halves.values()))
    rank = max(pair.A.shape[0] for pair in halves.values())
    entries = []
    for half, height, path in (("in_proj", 3 * width, owner), ("out_proj", width, dotted(owner, "out_proj"))):
        A, B = some.A.new_zeros(rank, width), some.B.new_zeros(height, rank)
        if half in halves:
            pair = halves[half]
            A[:len(pair.A)], B[:, :len(pair.A)] = pair.A, pair.B * pair.scale
        entries.append(_PeftPair(owner, path, None, Pair(A, B, 1.0)))
    return entries


def _conv1d() -> tuple[type, ...]:
    """transformers' Conv1D, which stores (in, out), if it is loaded: a model that has one has loaded it."""
    loaded = sys.modules.get("transformers.pytorch_utils")
    return () if loaded is None else (loaded.Conv1D,)


def _flat(pair: Pair) -> tuple[Tensor, Tensor]:
    """A and B as matrices: of stacks, A (E rank, d2), expert by expert, and B (d1, rank E), rank by rank."""
    if pair.A.ndim == 2:
        return pair.A, pair.B
    return pair.A.flatten(0, 1), pair.B.permute(1, 2, 0).flatten(1, 2)


def _trained(
    adapter: Adapter, model: nn.Module, entries: Sequence[_PeftPair]
) -> tuple[str, list[str], dict[str, Tensor]]:
    """The config's bias, its modules_to_save, and the tensors of both.

    PEFT trains whole modules: all that a module has is written, as it is in the base where it was not trained.
    """
    adapted = {entry.module for entry in entries if entry.attribute is None}
    kinds, owners, tensors = set(), [], {}
    by_owner: dict[str, set[str]] = defaultdict(set)
    for name in adapter.trained:
        by_owner[name.rpartition(".")[0]].add(name.rpartition(".")[2])
    for owner, names in by_owner.items():
        if names == {"bias"} and len(submodule(model, owner)._parameters) > 1:
            kinds.add("lora_only" if owner in adapted else "all")
            stem = _stem(owner, entries) + ".base_layer" * (owner in adapted)
            tensors[dotted(stem, "bias")] = adapter.trained[dotted(owner, "bias")]
        elif owner:
            owners.append(owner)
        else:
            raise ConfigError(f"PEFT trains whole modules, and '{min(names)}' belongs to the model itself: {_INSTEAD}.")
    modules = [owner for owner in owners if not any(owner.startswith(f"{other}.") for other in owners)]
    known = users_modules(model)
    for path, module in known.items():
        inside = any(path == owner or path.startswith(f"{owner}.") for owner in modules)
        for name, tensor in (*module._parameters.items(), *module._buffers.items()) if inside else ():
            if tensor is not None and name not in module._non_persistent_buffers_set:
                tensors[dotted(path, name)] = adapter.trained.get(dotted(path, name), tensor)
    for other in known:
        if not any(f"{other}.".startswith(f"{module}.") for module in modules) and any(
                other.endswith(module) for module in modules):
            raise ConfigError(f"PEFT would train '{other}' too, since its name ends as that of a trained module does.")
    return "all" if "all" in kinds else "lora_only" if kinds else "none", modules, tensors


def _config(adapter: Adapter, model: nn.Module, entries: Sequence[_PeftPair], modules: list[str],
            biases: str) -> dict[str, Any]:
    rslora = adapter.config.rslora
    ranks = {entry.name: entry.pair.A.shape[-2] for entry in entries}
    alphas = {entry.name: entry.pair.scale * (math.sqrt(ranks[entry.name]) if rslora else ranks[entry.name])
              for entry in entries}
    rank, alpha = (Counter(table.values()).most_common(1)[0][0] for table in (ranks, alphas))
    parameters = [entry.name for entry in entries if entry.attribute is not None]
    others = sorted({entry.name for entry in entries if entry.attribute is None})
    layers = [submodule(model, name) for name in others]
    known = users_modules(model)
    config: dict[str, Any] = {
        "peft_type": "LORA", "base_model_name_or_path": None, "inference_mode": True, "init_lora_weights": True,
        "r": rank, "lora_alpha": alpha, "lora_dropout": adapter.config.dropout,
        "target_modules": _targets(others, list(known))}
    if parameters:
        _check_suffixes(parameters, [dotted(path, name) for path, module in known.items()
                                     for name in module._parameters])
        config["target_parameters"] = parameters
    all_conv1d = bool(layers) and all(isinstance(layer, _conv1d()) for layer in layers)
    options = {"use_rslora": rslora, "fan_in_fan_out": all_conv1d, "bias": biases if biases != "none" else None,
               "modules_to_save": modules, "rank_pattern": _pattern(ranks, rank),
               "alpha_pattern": _pattern(alphas, alpha)}
    return config | {name: value for name, value in options.items() if value}


def _pattern(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """{anchored regular expression of a name: value} of all that differ from the usual."""
    return {f"^{re.escape(name)}": value for name, value in values.items() if value != usual}


def _targets(names: list[str], known: Sequence[str]) -> list[str] | str:
    """The modules as PEFT's target_modules: a list, or a regular expression where a name also ends another's."""
    chosen = set(names)
    if any(other not in chosen and other.endswith("." + name) for name in names for other in known):
        return "|".join(map(re.escape, names))
    return names


def _check_suffixes(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        also = next((other for other in known if other not in names and other.endswith("." + name)), None)
        if also is not None:
            raise ConfigError(f"PEFT would adapt '{also}' too, since its name ends in '{name}'.")
