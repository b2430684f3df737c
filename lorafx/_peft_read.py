"""PEFT's directories, read: `adapter_config.json` beside `adapter_model.safetensors` (or an older `.bin`).

Keys are `base_model.model.<module>.lora_A.weight` (rank, in) and `lora_B` (out, rank). A parameter that is adapted by
itself (`target_parameters`) is named after its module; where a module has several, the one that is registered last is
named so, and those before it after one more `base_layer` each. See PEFT 0.21.2 and its checkpoint format page.
"""

import json
import math
import re
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._adapter import Adapter, LoRAConfig, Pair, Stored, check_shapes, first_match, join
from ._errors import ConfigError, FormatError
from ._files import read_pickle, read_safetensors
from ._sites import renamed

PREFIX = "base_model.model."
CONFIG, TENSORS, OLD = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
# Entries of the config that say how the adapter was made, not what it computes.
_ABOUT = {"auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version",
          "layers_to_transform", "layers_pattern", "exclude_modules", "megatron_core", "megatron_config",
          "ensure_weight_tying", "fan_in_fan_out", "qalora_group_size", "runtime_config",
          "target_modules", "eva_config", "corda_config", "lora_ga_config"}
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # those that leave the base as it is
_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "bias",
         "modules_to_save", "target_parameters", "init_lora_weights"}


class Key(NamedTuple):
    """What the name of a tensor says: of which module, how many parameters follow it there, and which part it is."""

    path: str
    after: int
    part: str  # lora_A.weight, lora_B.weight


def decode(folder: Path, model: nn.Module | None) -> Adapter:
    """The adapter in a folder, named default; the model tells apart parameters that its keys alone cannot."""
    config, (path, tensors) = _config(folder / CONFIG), _tensors(folder)
    keys = {name: key for name in tensors if (key := _key(name)) is not None}
    halves: dict[tuple[str, int], dict[str, Tensor]] = {}
    for name, key in keys.items():
        halves.setdefault((key.path, key.after), {})[key.part] = tensors[name]
    for (module, _), half in halves.items():
        if len(half) != 2:
            raise FormatError(f"'{path}' has the {next(iter(half))} of '{module}' but not its other half.")
        check_shapes(module, half["lora_A.weight"], half["lora_B.weight"])
    if not halves:
        raise FormatError(f"'{path}' holds no adapter: it has no lora_A and lora_B.")
    adapted = {module for module, _ in halves}
    owners = {} if model is None else dict(model.named_modules(remove_duplicate=False))
    here = renamed(sorted(adapted), owners)
    attentions = {key.path.removesuffix(".out_proj") for name, key in keys.items() if ".base_layer.out_proj." in name}
    pairs: dict[str, Pair] = {}
    stored: dict[str, Stored] = {}
    for (module, after), half in halves.items():
        A, B, owner = half["lora_A.weight"], half["lora_B.weight"], owners.get(here(module))
        attribute = _attribute(config, module, after, owner, path)
        inner = module.removesuffix(".out_proj") if module.removesuffix(".out_proj") in attentions else module
        matched = inner if attribute is None else join(module, attribute)
        site = here(module) if attribute in (None, "weight") else join(here(module), str(attribute))
        if attribute is None and module in attentions:
            site = join(site, "in_proj_weight")
        rank, scale = _rank_and_scale(config, matched)
        if attribute is not None:
            weight = None if owner is None else owner._parameters[attribute]
            A, B = _stacks(A, B, rank, weight, matched)
            if weight is not None:
                stored[site] = Stored(tuple(weight.shape), A.ndim == 3 and bool(getattr(owner, "is_transposed", False)))
        if A.shape[-2] != rank:
            raise FormatError(f"'{path}' has rank {A.shape[-2]} at '{matched}', but its config says {rank}.")
        pairs[site] = Pair(A, B, scale)
    rest = {name: tensor for name, tensor in tensors.items() if name not in keys}
    trained = {here(name): tensor for name, tensor in _trained(rest, adapted, config, path).items()}
    return Adapter("default", _lora_config(config, pairs, trained), pairs, trained, stored)


def _tensors(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The file of a folder's tensors, and these by name, without the prefix of all."""
    path = next((folder / name for name in (TENSORS, OLD) if (folder / name).is_file()), None)
    if path is None:
        raise FormatError(f"'{folder}' has neither {TENSORS} nor {OLD}.")
    tensors = read_safetensors(path)[0] if path.name == TENSORS else read_pickle(path)
    for name in tensors:
        if not name.startswith(PREFIX):
            raise FormatError(f"'{path}' has a tensor '{name}', which does not begin with '{PREFIX}' as PEFT's do.")
    return path, {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def _config(path: Path) -> dict[str, Any]:
    """The config, of which every entry is understood, or else says nothing."""
    try:
        config = json.loads(path.read_text("utf-8"))
        found = dict(config)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise FormatError(f"'{path}' is missing or damaged: {type(error).__name__}: {error}.") from error
    if found.get("peft_type") != "LORA":
        raise FormatError(f"'{path}' is for PEFT's {found.get('peft_type')!r}; lorafx reads 'LORA'.")
    for name, value in found.items():
        if name not in _ABOUT | _READ and value not in (None, False, 0, [], {}, ""):
            raise FormatError(f"'{path}' asks for {name}={value!r}, which lorafx does not support.")
    if found.get("init_lora_weights", True) not in _INITS:
        raise FormatError(f"'{path}' asks for init_lora_weights={found['init_lora_weights']!r}, which changes the "
                          "base's weights: let PEFT save it with path_initial_model_for_weight_conversion.")
    for name, kind in (("rank_pattern", dict), ("alpha_pattern", dict), ("modules_to_save", list),
                       ("target_parameters", list)):
        if not isinstance(found.get(name) or kind(), kind):
            raise FormatError(f"'{path}' has {name}={found[name]!r}, which is no {kind.__name__}.")
    if found.get("bias", "none") not in ("none", "all", "lora_only"):
        raise FormatError(f"'{path}' has bias={found['bias']!r}, not none, all or lora_only.")
    return found


def _key(name: str) -> Key | None:
    """What a name says, if it names half of a pair; raises for what lorafx cannot add to a linear call."""
    other = re.search(r"\.(lora_embedding_[AB]|lora_magnitude_vector|lora_B\.bias)\b", name)
    if other is not None:
        what = {"lora_m": "DoRA", "lora_B": "lora_bias=True"}.get(other[1][:6], "an adapter of an embedding")
        raise FormatError(f"'{PREFIX}{name}' is part of {what}, which lorafx does not support.")
    match = re.fullmatch(r"(.+?)((?:\.base_layer)*)\.(lora_[AB]\.weight)", name)
    if match is None:
        return None
    return Key(match[1].replace(".base_layer.", "."), match[2].count("base_layer"), match[3])


def _parameters(config: Mapping[str, Any], module: str) -> list[str]:
    """The parameters of a module that the config adapts by themselves, by name."""
    found = []
    for target in config.get("target_parameters") or ():
        owner, _, attribute = str(target).rpartition(".")
        if module == owner or module.endswith("." + owner):
            found.append(attribute)
    return sorted(set(found))


def _attribute(
    config: Mapping[str, Any], module: str, after: int, owner: nn.Module | None, path: Path
) -> str | None:
    """The parameter of a module that is adapted by itself and that some others follow, `after` of them; or None."""
    among = _parameters(config, module)
    if not among:
        if after:
            raise FormatError(f"'{path}' adapts several parameters of '{module}', but target_parameters names none.")
        return None
    if owner is not None:
        among = [name for name, parameter in owner._parameters.items() if name in among and parameter is not None]
    elif len(among) > 1:
        raise FormatError(f"'{path}' adapts {len(among)} parameters of '{module}', in an order that only the model "
                          "tells: load it into the model.")
    if after >= len(among):
        raise FormatError(f"'{path}' adapts {after + 1} parameters of '{module}', of which target_parameters and the "
                          f"model have {', '.join(among) or 'none'}.")
    return among[len(among) - 1 - after]


def _stacks(A: Tensor, B: Tensor, rank: int, weight: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
    """A (E rank, d2), expert by expert, and B (d1, rank E), rank by rank, as stacks of E, where there are experts."""
    experts = A.shape[0] // rank
    if A.shape[0] != experts * rank or weight is not None and weight.ndim == 3 and weight.shape[0] != experts:
        raise FormatError(f"At '{name}' A has {A.shape[0]} rows, which is not its rank, {rank}, for each expert.")
    if experts == 1 and (weight is None or weight.ndim == 2):
        return A, B
    return A.reshape(experts, rank, -1), B.reshape(B.shape[0], rank, experts).permute(2, 0, 1)


def _rank_and_scale(config: Mapping[str, Any], name: str) -> tuple[int, float]:
    """The rank and alpha / rank, or alpha / sqrt(rank), at a module; what is missing is 8."""
    try:
        rank = first_match(config.get("rank_pattern") or {}, name, config.get("r", 8))
        alpha = float(first_match(config.get("alpha_pattern") or {}, name, config.get("lora_alpha", 8)))
    except (re.error, TypeError, ValueError) as error:
        raise FormatError(f"The config's rank and alpha at '{name}' cannot be read: {error}.") from error
    if not isinstance(rank, int) or rank < 1:
        raise FormatError(f"The config's rank at '{name}' is {rank!r}.")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _trained(
    tensors: Mapping[str, Tensor], adapted: Container[str], config: Mapping[str, Any], path: Path
) -> dict[str, Tensor]:
    """{name of a base tensor: what stands in its place}: biases, and modules that were trained whole."""
    whole, found = config.get("modules_to_save") or [], {}
    for name in sorted(tensors):
        base = name.replace(".base_layer.", ".")
        owner, _, attribute = base.rpartition(".")
        if attribute == "bias" and config.get("bias") == "all" and _is_copy(owner, tensors, whole):
            continue
        saved = any(re.fullmatch(rf"(.*\.)?{re.escape(str(module))}(\..*)?", owner) for module in whole)
        biased = attribute == "bias" and config.get("bias", "none") != "none"
        if not saved and not biased:
            raise FormatError(f"'{path}' has a tensor '{PREFIX}{name}', which its config does not account for.")
        if biased and not saved and owner in adapted and base == name:
            raise FormatError(f"'{path}' has '{PREFIX}{name}', which PEFT does not read: an adapted layer's bias is "
                              f"'{PREFIX}{owner}.base_layer.bias'.")
        found[base] = tensors[name]
    return found


def _is_copy(owner: str, tensors: Mapping[str, Tensor], whole: Sequence[Any]) -> bool:
    """Whether a bias is one of the two that PEFT, told to save all biases, writes again of a module trained whole."""
    module, _, kind = owner.rpartition(".")
    if kind not in ("modules_to_save", "original_module") or f"{module}.bias" not in tensors:
        return False
    same = kind == "original_module" or torch.equal(tensors[f"{owner}.bias"], tensors[f"{module}.bias"])
    return same and any(module == str(name) or module.endswith(f".{name}") for name in whole)


def _lora_config(config: Mapping[str, Any], pairs: Mapping[str, Pair], trained: Mapping[str, Tensor]) -> LoRAConfig:
    owners = sorted({name.rpartition(".")[0] for name in trained if name.rpartition(".")[0] not in pairs})
    try:
        return LoRAConfig(
            rank=config.get("r", 8), alpha=config.get("lora_alpha", 8), rslora=bool(config.get("use_rslora")),
            dropout=config.get("lora_dropout", 0.0) or 0.0, rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {}, targets=list(pairs), trainable=tuple(owners))
    except ConfigError as error:
        raise FormatError(f"The config cannot be used: {error}") from error
