"""The config of PEFT's directories: what each entry says, and which modules and parameters it means."""

import hashlib
import json
import math
import re
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .._adapter.adapter import Pair
from .._adapter.config import LoRAConfig, first_match, is_number, shown
from .._errors import ConfigError, FormatError


CONFIG = "adapter_config.json"

# Entries that say how the adapter was made, not what it computes.
_ABOUT = {"auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version",
          "megatron_core", "qalora_group_size", "runtime_config", "eva_config", "corda_config", "lora_ga_config"}
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # those that leave the base as it is
_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "bias",
         "modules_to_save", "target_modules", "target_parameters", "init_lora_weights", "fan_in_fan_out",
         "exclude_modules", "layers_to_transform", "layers_pattern"}
_KINDS: dict[str, tuple[type, ...]] = {  # a list is of texts
    "rank_pattern": (dict,), "alpha_pattern": (dict,), "modules_to_save": (list,), "target_parameters": (list,),
    "target_modules": (list, str), "exclude_modules": (list, str), "layers_pattern": (list, str), "use_rslora": (bool,),
    "fan_in_fan_out": (bool,)}


def read_config(content: bytes, path: Path) -> dict[str, Any]:
    """The config that a file at a path has, of which every entry is understood, or else says nothing."""
    try:
        config = json.loads(content.decode())
        found = dict(config)
    except (ValueError, TypeError, RecursionError) as error:
        raise FormatError(f"'{path}' is missing or damaged: {type(error).__name__}: {error}.") from error
    if found.get("peft_type") != "LORA":
        raise FormatError(f"'{path}' is for PEFT's {shown(found.get('peft_type'))}; lorafx reads 'LORA'.")
    for name, value in found.items():
        if name not in _ABOUT | _READ and value not in (None, False, 0, [], {}, ""):
            raise FormatError(f"'{path}' asks for {shown(name)[1:-1]}={shown(value)}, which lorafx does not support.")
    if found.get("init_lora_weights", True) not in _INITS:
        raise FormatError(f"'{path}' asks for init_lora_weights={shown(found['init_lora_weights'])}, which changes "
                          "the base's weights: let PEFT save it with path_initial_model_for_weight_conversion.")
    for name, kinds in _KINDS.items():
        value = found.get(name)
        if value is not None and not isinstance(value, kinds) or isinstance(value, list) and not all(
                isinstance(entry, str) for entry in value):
            raise FormatError(f"'{path}' has {name}={shown(value)}, which PEFT does not mean.")
    if found.get("bias", "none") not in ("none", "all", "lora_only"):
        raise FormatError(f"'{path}' has bias={shown(found['bias'])}, not none, all or lora_only.")
    _check_matching(found, path)
    return found


def _check_matching(config: Mapping[str, Any], path: Path) -> None:
    """Raise unless what chooses modules can be matched with their names."""
    layers = config.get("layers_to_transform")
    if layers is not None and not all(type(layer) is int for layer in _listed(layers)):
        raise FormatError(f"'{path}' has layers_to_transform={shown(layers)}, not numbers of layers.")
    texts = [config.get(name) for name in ("target_modules", "exclude_modules")]
    for pattern in [*(text for text in texts if isinstance(text, str)), *_layers(config)]:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise FormatError(f"'{path}' matches modules by {shown(pattern)}, which is no regular expression: {error}."
                              ) from error


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] * (value is not None)


def config_digest(config: Mapping[str, Any]) -> str:
    """A short hash of what a config says about what is computed."""
    said = {name: value for name, value in config.items() if name in _READ and value}
    return bytes_digest(json.dumps(said, sort_keys=True).encode())


def bytes_digest(content: bytes) -> str:
    """A short hash of what a file holds."""
    return hashlib.sha256(content).hexdigest()[:16]


def is_target(config: Mapping[str, Any], module: str) -> bool:
    """Whether a module is one of target_modules and none of exclude_modules; of a list, in the layers to transform."""
    targets, layers = config.get("target_modules") or [], _listed(config.get("layers_to_transform"))
    if _names(config.get("exclude_modules") or [], module):
        return False
    if targets == "all-linear" or not _names(targets, module):
        return bool(targets == "all-linear")
    if isinstance(targets, str) or module in targets or not layers:
        return True
    found = next((match for pattern in _layers(config) if (match := re.match(pattern, module))), None)
    return found is not None and int(found["number"]) in layers


def _layers(config: Mapping[str, Any]) -> list[str]:
    """The regular expressions that find the number of a module's layer, as in PEFT."""
    number = r"\.(?P<number>\d+)\."
    return [rf"(?:^|.*?\.){name}{number}" for name in _listed(config.get("layers_pattern") or None)] or [
        rf".*?\.[^.]*{number}"]


def _names(patterns: str | list[str], module: str) -> bool:
    """Whether a list names a module by its whole name or a dotted end of it, or a text matches the whole."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, module) is not None
    return any(module == pattern or module.endswith("." + pattern) for pattern in patterns)


def is_saved(config: Mapping[str, Any], module: str) -> bool:
    """Whether modules_to_save names a module or one around it; PEFT asks how the name ends."""
    parts = module.split(".")
    around = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
    return any(name.endswith(end) for name in around for end in config.get("modules_to_save") or ())


def check_complete(config: Mapping[str, Any], adapted: Container[str], known: Iterable[tuple[str, nn.Module]],
                   names: Iterable[str], path: Path) -> None:
    """Raise if the tensors of a module that the config names are missing: one trained whole, or one that is adapted."""
    modules, owners = dict(known), {name.rpartition(".")[0] for name in names}
    ends = config.get("modules_to_save") or []
    missing = [end for end in ends if not any(is_saved({"modules_to_save": [end]}, owner) for owner in owners)]
    if modules:  # PEFT names both of the usual heads of a classifier, of which a model has one
        missing = [end for end in missing if len(missing) == len(ends) or any(name.endswith(end) for name in modules)]
    if missing and (modules or len(missing) == len(ends)):
        raise FormatError(f"'{path}' has no tensor of '{missing[0]}', which modules_to_save names.")
    for name, module in modules.items():
        if isinstance(module, nn.Linear) and name not in adapted and not is_saved(config, name) and (
                config.get("target_modules") != "all-linear" and is_target(config, name)):
            raise FormatError(f"'{path}' has no adapter of '{name}', which target_modules names.")


def parameters_of(config: Mapping[str, Any], module: str) -> list[str]:
    """The parameters of a module that the config adapts by themselves, by name."""
    found = []
    for target in config.get("target_parameters") or ():
        owner, _, attribute = str(target).rpartition(".")
        if module == owner or module.endswith("." + owner):
            found.append(attribute)
    return sorted(set(found))


def rank_and_scale(config: Mapping[str, Any], name: str) -> tuple[int, float]:
    """The rank and alpha / rank, or alpha / sqrt(rank), at a module; what is missing is 8."""
    try:
        rank = first_match(config.get("rank_pattern") or {}, name, config.get("r", 8))
        alpha = float(first_match(config.get("alpha_pattern") or {}, name, config.get("lora_alpha", 8)))
    except (re.error, TypeError, ValueError) as error:
        raise FormatError(f"The config's rank and alpha at '{name}' cannot be read: {error}.") from error
    if not isinstance(rank, int) or rank < 1:
        raise FormatError(f"The config's rank at '{name}' is {rank!r}.")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def lora_config(config: Mapping[str, Any], pairs: Mapping[str, Pair], trained: Mapping[str, Tensor]) -> LoRAConfig:
    """The same as lorafx has it; an alpha that is not above 0 has no place there, but only in the scales."""
    owners = sorted({name.rpartition(".")[0] for name in trained if name.rpartition(".")[0] not in pairs})
    alphas = {"": config.get("lora_alpha", 8), **(config.get("alpha_pattern") or {})}
    alphas = {name: alpha for name, alpha in alphas.items() if is_number(alpha) and alpha > 0}
    rslora = bool(config.get("use_rslora") and alphas)
    try:
        return LoRAConfig(
            rank=config.get("r", 8), alpha=alphas.pop("", None), rslora=rslora,
            dropout=config.get("lora_dropout", 0.0) or 0.0, rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=alphas, targets=list(pairs), trainable=tuple(owners))
    except ConfigError as error:
        raise FormatError(f"The config cannot be used: {error}") from error
