"""The config in PEFT's folders: what each entry says, which modules and parameters it means."""

import hashlib
import json
import math
import re
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .._adapter.adapter import Pair
from .._adapter.config import LoRAConfig, first_match, is_number, short_repr
from .._errors import ConfigError, FormatError


ADAPTER_CONFIG = "adapter_config.json"

# Entries that say how the adapter was made, not what it computes.
_ABOUT = {
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "peft_version", "megatron_core", "qalora_group_size", "runtime_config", "eva_config",
    "corda_config", "lora_ga_config"}
_READ = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern",
    "bias", "modules_to_save", "target_modules", "target_parameters", "init_lora_weights",
    "fan_in_fan_out", "exclude_modules", "layers_to_transform", "layers_pattern",
    "ensure_weight_tying", "trainable_token_indices"}
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # those that leave the base as it is
_TYPES: dict[str, tuple[type, ...]] = {  # a list is of strings
    "rank_pattern": (dict,), "alpha_pattern": (dict,), "modules_to_save": (list,),
    "target_parameters": (list,), "target_modules": (list, str), "exclude_modules": (list, str),
    "layers_pattern": (list, str), "use_rslora": (bool,), "fan_in_fan_out": (bool,),
    "ensure_weight_tying": (bool,)}


def parse_config(content: bytes, path: Path, count: int) -> dict[str, Any]:
    """Return the config that a file holds; FormatError for an entry that is not understood.

    There are so many tensors beside it.
    """
    try:
        config = dict(json.loads(content.decode()))
    except (ValueError, TypeError, RecursionError) as error:
        raise FormatError(
            f"'{path}' is missing or damaged: {type(error).__name__}: {error}.") from error
    if config.get("peft_type") != "LORA":
        raise FormatError(f"'{path}' is for PEFT's {short_repr(config.get('peft_type'))}, as all "
                          f"of the {count} tensors beside it are: lorafx reads 'LORA'.")
    for name, value in config.items():
        if name not in _ABOUT | _READ and value not in (None, False, 0, [], {}, ""):
            raise FormatError(f"'{path}' asks for {short_repr(name)[1:-1]}={short_repr(value)}, "
                              "which lorafx does not support.")
    if config.get("init_lora_weights", True) not in _INITS:
        raise FormatError(f"'{path}' asks for "
                          f"init_lora_weights={short_repr(config['init_lora_weights'])}, which "
                          "changes the base's weights: let PEFT save it with "
                          "path_initial_model_for_weight_conversion.")
    for name, types in _TYPES.items():
        value = config.get(name)
        sound = value is None or isinstance(value, types)
        if isinstance(value, list):
            sound = sound and all(isinstance(entry, str) for entry in value)
        if not sound:
            raise FormatError(f"'{path}' has {name}={short_repr(value)}, which PEFT does not mean.")
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise FormatError(f"'{path}' has bias={short_repr(config['bias'])}, not none, all or "
                          "lora_only.")
    _check_matching(config, path)
    return config


def _check_matching(config: Mapping[str, Any], path: Path) -> None:
    """Raise unless what selects modules can be matched with their names."""
    layers = config.get("layers_to_transform")
    if not all(type(layer) is int for layer in _as_list(layers)):
        raise FormatError(f"'{path}' has layers_to_transform={short_repr(layers)}, not numbers of "
                          "layers.")
    patterns = _layer_patterns(config)
    for name in ("target_modules", "exclude_modules"):
        if isinstance(config.get(name), str):
            patterns.append(config[name])
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise FormatError(f"'{path}' matches modules by {short_repr(pattern)}, which is not a "
                              f"regular expression: {error}.") from error


def _as_list(value: Any) -> list[Any]:
    """A list as it is, None as an empty one, any other value as the only one of a list."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def config_digest(config: Mapping[str, Any]) -> str:
    """Return a short hash of what a config says about what is computed."""
    read = {name: value for name, value in config.items() if name in _READ and value}
    return bytes_digest(json.dumps(read, sort_keys=True).encode())


def bytes_digest(content: bytes) -> str:
    """Return a short hash of what a file holds."""
    return hashlib.sha256(content).hexdigest()[:16]


def is_target(config: Mapping[str, Any], module: str) -> bool:
    """True if PEFT would adapt a module of this name.

    It is one of target_modules, not of exclude_modules, and if a list names it by a dotted end, in
    layers_to_transform.
    """
    targets = config.get("target_modules") or []
    layers = _as_list(config.get("layers_to_transform"))
    if _matches(config.get("exclude_modules") or [], module):
        return False
    if targets == "all-linear":
        return True
    if not _matches(targets, module):
        return False
    if isinstance(targets, str) or module in targets or not layers:
        return True
    for pattern in _layer_patterns(config):
        match = re.match(pattern, module)
        if match is not None:
            return int(match["number"]) in layers
    return False


def _layer_patterns(config: Mapping[str, Any]) -> list[str]:
    """The regular expressions that find the number of a module's layer, as in PEFT."""
    number = r"\.(?P<number>\d+)\."
    names = _as_list(config.get("layers_pattern") or None)
    if not names:
        return [rf".*?\.[^.]*{number}"]
    return [rf"(?:^|.*?\.){name}{number}" for name in names]


def _matches(patterns: str | list[str], module: str) -> bool:
    """True if a list has the module's name or a dotted end of it, or a regular expression fits."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, module) is not None
    return any(module == pattern or module.endswith("." + pattern) for pattern in patterns)


# The heads that PEFT trains and saves for a task, whatever modules_to_save says.
_HEADS = {"SEQ_CLS": ["classifier", "score"], "TOKEN_CLS": ["classifier", "score"],
          "QUESTION_ANS": ["qa_outputs"]}


def with_heads(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with what PEFT means by its task_type, too, in modules_to_save."""
    heads = _HEADS.get(str(config.get("task_type")), [])
    named = config.get("modules_to_save") or []
    return {**config, "modules_to_save": [*named, *heads]}


def is_saved(config: Mapping[str, Any], module: str) -> bool:
    """True if modules_to_save names a module or one around it; PEFT asks how the name ends."""
    ends = tuple(config.get("modules_to_save") or ())
    parts = module.split(".")
    return any(".".join(parts[:length]).endswith(ends) for length in range(1, len(parts) + 1))


def check_complete(
    config: Mapping[str, Any], adapted: Container[str], modules: Mapping[str, nn.Module],
    names: Iterable[str], path: Path,
) -> None:
    """Raise if tensors of a module that the config names are missing: one saved whole, or adapted.

    `names` are those of all tensors but A and B; `modules` is empty where there is no model. What
    no module's name ends in, PEFT passes over, as it does where it names both of the usual heads.
    """
    ends = config.get("modules_to_save") or []
    missing = list(ends)
    for name in names:
        owner = name.rpartition(".")[0]
        missing = [end for end in missing if not is_saved({"modules_to_save": [end]}, owner)]
    all_missing = len(missing) == len(ends)
    for end in missing:
        if all_missing and not modules or any(name.endswith(end) for name in modules):
            raise FormatError(f"'{path}' has no tensor of '{end}', which modules_to_save names.")
    if config.get("target_modules") == "all-linear":
        return
    for name, module in modules.items():
        if isinstance(module, nn.Linear) and name not in adapted and not is_saved(config, name):
            if is_target(config, name):
                raise FormatError(f"'{path}' has no adapter of '{name}', which target_modules "
                                  "names.")


def parameters_of(config: Mapping[str, Any], module: str) -> list[str]:
    """Return the parameters of a module that the config adapts by themselves, sorted."""
    found = set()
    for target in config.get("target_parameters") or ():
        owner, _, attribute = target.rpartition(".")
        if module == owner or module.endswith("." + owner):
            found.add(attribute)
    return sorted(found)


def rank_and_scale(config: Mapping[str, Any], name: str) -> tuple[int, float]:
    """Return the rank and alpha / rank, or alpha / sqrt(rank), of a module; both default to 8."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    try:
        rank = first_match(ranks, name, config.get("r", 8))
        alpha = float(first_match(alphas, name, config.get("lora_alpha", 8)))
    except (re.error, TypeError, ValueError) as error:
        raise FormatError(
            f"The config's rank and alpha at '{name}' cannot be read: {error}.") from error
    if not isinstance(rank, int) or rank < 1:
        raise FormatError(f"The config's rank at '{name}' is {rank!r}.")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def lora_config(
    config: Mapping[str, Any], pairs: Mapping[str, Pair], trained: Mapping[str, Tensor]
) -> LoRAConfig:
    """Return the config as lorafx has it; alphas that are not above 0 stand only in the scales."""
    trainable = set()
    for name in trained:
        owner = name.rpartition(".")[0]
        trainable.add(owner if is_saved(config, owner) else name)
    alphas = {"": config.get("lora_alpha", 8)} | (config.get("alpha_pattern") or {})
    for name, alpha in list(alphas.items()):
        if not (is_number(alpha) and alpha > 0):
            del alphas[name]
    rslora = bool(config.get("use_rslora") and alphas)
    try:
        return LoRAConfig(
            rank=config.get("r", 8), alpha=alphas.pop("", None), rslora=rslora,
            dropout=config.get("lora_dropout", 0.0) or 0.0,
            rank_pattern=config.get("rank_pattern") or {}, alpha_pattern=alphas,
            targets=list(pairs), trainable=tuple(sorted(trainable)))
    except ConfigError as error:
        raise FormatError(f"The config cannot be used: {error}") from error
