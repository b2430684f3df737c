"""PEFT's folders, written: what PEFT needs to compute the same, and what reads its format."""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .._adapter.adapter import Adapter
from .._adapter.names import dotted
from .._errors import ConfigError
from .._graph.dispatched import value_of
from .._graph.loaded import loaded
from .._graph.modules import submodule, users_modules
from .._storage.safetensors_files import safetensors_bytes
from .adapter_file import INSTEAD, Destination
from .peft_config import ADAPTER_CONFIG, bytes_digest, config_digest
from .peft_folder import BEFORE, DIGEST, TENSORS, WHOLE
from .peft_names import PREFIX
from .peft_pairs import (
    PeftPair, as_matrices, conv1d, peft_pairs, trained_under_every_name
)
from .peft_tokens import INDICES, written_rows


def encode(adapter: Adapter, destination: Destination) -> dict[str, bytes]:
    """Return the contents of the files, that of the tensors first.

    The config that is there already stands beside them if saving ends half-way: so they hold all of
    the new one.
    """
    model = destination.model
    if model is None:
        raise ConfigError(
            "PEFT's format depends on the model: load the adapter into it, and save it from there.")
    pairs = peft_pairs(adapter, model)
    everywhere = trained_under_every_name(adapter, model)
    bias, modules, trained = _trained(everywhere, model, pairs)
    indices, rows = written_rows(adapter, model, {pair.module for pair in pairs})
    tensors = {}
    for name, tensor in (trained | rows | _factors(model, pairs)).items():
        tensors[PREFIX + name] = tensor
    config = config_of(adapter, model, pairs, modules, bias, indices)
    text = json.dumps(config, indent=2).encode()
    header = {"format": "pt", DIGEST: config_digest(config)}
    there = destination.path / ADAPTER_CONFIG
    before = there.read_bytes() if there.is_file() else None
    if before is not None and before != text:
        header |= {WHOLE: text.decode(), BEFORE: bytes_digest(before)}
    return {TENSORS: safetensors_bytes(tensors, header), ADAPTER_CONFIG: text}


def _factors(model: nn.Module, pairs: Sequence[PeftPair]) -> dict[str, Tensor]:
    """{name: tensor} of all A and B, those of several parameters of a module named as in PEFT."""
    by_module: dict[str, list[PeftPair]] = defaultdict(list)
    for pair in pairs:
        by_module[pair.module].append(pair)
    tensors: dict[str, Tensor] = {}
    for module, group in by_module.items():
        parameters = list(submodule(model, module)._parameters)
        group.sort(key=lambda pair: parameters.index(pair.attribute) if pair.attribute else 0)
        for position, pair in enumerate(group):
            after = 0 if pair.attribute is None else len(group) - 1 - position
            stem = _stem(module, pairs) + ".base_layer" * after
            A, B = as_matrices(pair.pair)
            tensors |= {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": B}
    return tensors


def _stem(module: str, pairs: Iterable[PeftPair]) -> str:
    """How keys name an adapted module: an attention's out_proj is below what PEFT wraps."""
    for pair in pairs:
        if pair.module == module and pair.attribute is None and pair.name != module:
            return module.removesuffix("out_proj") + "base_layer.out_proj"
    return module


def _trained(
    trained: Mapping[str, Tensor], model: nn.Module, pairs: Sequence[PeftPair]
) -> tuple[str, list[str], dict[str, Tensor]]:
    """The config's bias, its modules_to_save, and the tensors of both."""
    adapted = {pair.module for pair in pairs if pair.attribute is None}
    by_owner: dict[str, set[str]] = defaultdict(set)
    for name in trained:
        owner, _, attribute = name.rpartition(".")
        by_owner[owner].add(attribute)
    kinds, owners, tensors = {"none"}, [], {}
    for owner, names in by_owner.items():
        if names == {"bias"} and len(submodule(model, owner)._parameters) > 1:
            kinds.add("lora_only" if owner in adapted else "all")
            stem = _stem(owner, pairs) + ".base_layer" * (owner in adapted)
            tensors[dotted(stem, "bias")] = trained[dotted(owner, "bias")]
            continue
        name = dotted(owner, min(names))
        if not owner:
            raise ConfigError(f"PEFT trains whole modules, and '{name}' belongs to the model "
                              f"itself: {INSTEAD}.")
        inside = [pair.name for pair in pairs if _is_inside(pair.module, [owner])]
        if owner in adapted or inside:
            raise ConfigError(
                f"PEFT trains whole modules, and that of '{name}' has an adapter at "
                f"'{(inside or [owner])[0]}' too: {INSTEAD}.")
        owners.append(owner)
    bias = next(kind for kind in ("all", "lora_only", "none") if kind in kinds)
    modules = [owner for owner in owners if not _is_inside(owner, owners)]
    return bias, modules, tensors | _whole_modules(trained, model, modules)


def _whole_modules(
    trained: Mapping[str, Tensor], model: nn.Module, modules: Sequence[str]
) -> dict[str, Tensor]:
    """{name: tensor} of all that modules have, as PEFT trains whole ones.

    What the adapter did not train is written as it is in the base.
    """
    tensors: dict[str, Tensor] = {}
    for path, module in users_modules(model).items():
        if path in modules or _is_inside(path, modules):
            tensors |= _all_tensors(trained, path, module)
        elif path.endswith(tuple(modules)):
            raise ConfigError(f"PEFT would train '{path}' too, since its name ends as that of a "
                              "trained module does.")
    return tensors


def _is_inside(path: str, modules: Iterable[str]) -> bool:
    return path.startswith(tuple(f"{module}." for module in modules))


def _all_tensors(
    trained: Mapping[str, Tensor], path: str, module: nn.Module
) -> dict[str, Tensor]:
    """{name: tensor} of all that a module's state_dict has, as the adapter trained it."""
    tensors = {}
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and name not in module._non_persistent_buffers_set:
            own = value_of(module, name, tensor)
            tensors[dotted(path, name)] = trained.get(dotted(path, name), own)
    return tensors


def config_of(
    adapter: Adapter, model: nn.Module, pairs: Sequence[PeftPair], modules: list[str], bias: str,
    indices: Mapping[str, list[int]],
) -> dict[str, Any]:
    """Return PEFT's config of an adapter, in as few entries as mean the same."""
    ranks, alphas = {}, {}
    modules_adapted, parameters = set(), []
    for pair in pairs:
        rank = pair.pair.A.shape[-2]
        ranks[pair.name] = rank
        alphas[pair.name] = pair.pair.scale * (math.sqrt(rank) if adapter.config.rslora else rank)
        if pair.attribute is None:
            modules_adapted.add(pair.name)
        else:
            parameters.append(pair.name)
    rank, alpha = _most_common(ranks), _most_common(alphas)
    names, known = sorted(modules_adapted), users_modules(model)
    config: dict[str, Any] = {
        "peft_type": "LORA", **_origin(model), "inference_mode": True,
        "init_lora_weights": True, "r": rank, "lora_alpha": alpha,
        "lora_dropout": adapter.config.dropout, "target_modules": _targets(names, known)}
    if parameters:
        _check_suffixes(parameters, known)
        config["target_parameters"] = parameters
    conv1ds = [name for name in names if isinstance(submodule(model, name), conv1d())]
    options = {
        "use_rslora": adapter.config.rslora, "fan_in_fan_out": bool(names) and conv1ds == names,
        "bias": bias if bias != "none" else None, "modules_to_save": modules,
        INDICES: dict(indices),
        "rank_pattern": _pattern(ranks, rank), "alpha_pattern": _pattern(alphas, alpha)}
    for name, value in options.items():
        if value:
            config[name] = value
    return config


def _origin(model: nn.Module) -> dict[str, Any]:
    """Where a model of transformers is from and its class, by which PEFT's AutoPeftModel finds it.
    """
    pretrained = loaded("transformers.modeling_utils", "PreTrainedModel")
    if pretrained is None or not isinstance(model, pretrained):
        return {"base_model_name_or_path": None}
    cls: Any = getattr(type(model), "_user_class", type(model))
    known: Any = model
    return {"base_model_name_or_path": known.name_or_path or None,
            "auto_mapping": {"base_model_class": cls.__name__, "parent_library": cls.__module__}}


def _most_common(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _pattern(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """{anchored regular expression of a name: value} of all that differ from the usual."""
    pattern = {}
    for name, value in values.items():
        if value != usual:
            pattern[f"^{re.escape(name)}"] = value
    return pattern


def _targets(names: list[str], known: Iterable[str]) -> list[str] | str:
    """PEFT's target_modules: a list, or a regular expression where a name also ends another's."""
    if any(_also_meant(name, known, names) for name in names):
        return "|".join(map(re.escape, names))
    return names


def _check_suffixes(parameters: Sequence[str], known: Mapping[str, nn.Module]) -> None:
    """Raise where the name of a parameter also ends that of another one."""
    others = [dotted(path, name) for path, module in known.items() for name in module._parameters]
    for name in parameters:
        also = _also_meant(name, others, parameters)
        if also is not None:
            raise ConfigError(f"PEFT would adapt '{also}' too, since its name ends in '{name}'.")


def _also_meant(name: str, known: Iterable[str], meant: Iterable[str]) -> str | None:
    """The first known name that is not meant but that PEFT takes for this one, as it ends in it."""
    for other in known:
        if other.endswith("." + name) and other not in meant:
            return other
    return None
