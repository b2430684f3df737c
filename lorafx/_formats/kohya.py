"""Adapters of kohya-ss and diffusers, read: `.safetensors` with A, B and alpha, s = alpha / rank.

Keys are `<module>.lora_down.weight` (rank, in), `<module>.lora_up.weight` (out, rank) and a scalar
`<module>.alpha`, without which s is 1. kohya writes a module's name with `_` for `.`, after a
prefix that says to which part of a pipeline it belongs (`lora_unet_`, `lora_te_`); diffusers writes
it as it is, after `unet.`.
"""

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .._adapter.adapter import Adapter, Pair, check_shapes
from .._adapter.config import LoRAConfig
from .._adapter.names import closest_names
from .._errors import FormatError, LorafxError, MismatchError
from .._graph.modules import LorafxModule, named_modules
from .adapter_file import AdapterFile, Decoded


# What the tensors of a pair are called, by both writers, of old and of late.
_PARTS = {
    "lora_down.weight": "A", "lora.down.weight": "A", "lora_A.weight": "A",
    "lora_up.weight": "B", "lora.up.weight": "B", "lora_B.weight": "B", "alpha": "alpha"}
_KEY = re.compile(rf"(.+)\.({'|'.join(map(re.escape, _PARTS))})")

# {prefix of a part of a pipeline: what stands there for the dots of a module's name}
_PREFIXES = {
    "": ".", "unet.": ".", "transformer.": ".", "text_encoder.": ".", "text_encoder_2.": ".",
    "prior.": ".",
    "lora_unet_": "_", "lora_te_": "_", "lora_te1_": "_", "lora_te2_": "_", "lora_te3_": "_",
    "lora_transformer_": "_", "lora_prior_unet_": "_"}

# Settings of PEFT's that are not read where diffusers writes them.
_UNREAD = ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias")


def recognises(file: AdapterFile) -> bool:
    """True if tensors are named as these are; what each holds is not looked at."""
    if file.metadata.get("format") == "lorafx":
        return False
    return any(_KEY.fullmatch(name) for name in file.tensors)


def decode(file: AdapterFile) -> Decoded:
    """Return the adapter in a file; the model tells the names of the modules that are meant."""
    path, model = file.path, file.model
    if model is None:
        raise FormatError(
            f"'{path}' names modules in a form that only the model tells: load it into the model.")
    if any(name.startswith("base_model.model.") for name in file.tensors):
        raise FormatError(f"'{path}' holds PEFT's tensors without its config: load the folder of "
                          "both.")
    parts = _parts_of_pairs(file)
    modules = []
    for name, module in named_modules(model):
        if name and module._parameters and not isinstance(module, LorafxModule):
            modules.append(name)
    meant = _modules_meant(list(parts), modules, path)
    shared = _scales_in_metadata(file)
    pairs: dict[str, Pair] = {}
    for key, tensors in parts.items():
        pair = _pair(key, tensors, shared, path)
        if meant[key] in pairs:
            raise MismatchError(f"'{path}' has two adapters for '{meant[key]}'.")
        pairs[meant[key]] = pair
    rank = max(pair.A.shape[-2] for pair in pairs.values())
    config = LoRAConfig(rank=rank, targets=list(pairs))
    return Decoded(Adapter("default", config, pairs, untied=True))


def _parts_of_pairs(file: AdapterFile) -> dict[str, dict[str, Tensor]]:
    """{name of a module in the file: its A, B and alpha}."""
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in file.tensors.items():
        match = _KEY.fullmatch(name)
        if match is None:
            raise FormatError(f"'{file.path}' has a tensor '{name}', which is neither half of a "
                              "pair nor its alpha.")
        key, part = match[1], _PARTS[match[2]]
        if part in found[key]:
            raise FormatError(f"'{file.path}' has two tensors for the {part} of '{key}'.")
        found[key][part] = tensor
    return found


def _pair(key: str, tensors: Mapping[str, Tensor], shared: Mapping[str, float], path: Path) -> Pair:
    """The pair of a module; `shared` are the scales in the header, beside which is no alpha."""
    if not {"A", "B"} <= tensors.keys():
        raise FormatError(f"'{path}' has only {', '.join(sorted(tensors))} of '{key}'.")
    A, B, alpha = tensors["A"], tensors["B"], tensors.get("alpha")
    check_shapes(key, A, B)
    part = key.partition(".")[0]
    if alpha is None:
        return Pair(A, B, shared.get(part, shared.get("", 1.0)))
    if alpha.numel() != 1:
        raise FormatError(f"'{path}' has an alpha of shape {tuple(alpha.shape)} at '{key}'.")
    if part in shared or "" in shared:
        raise FormatError(f"'{path}' has an alpha at '{key}', and another in its header.")
    return Pair(A, B, alpha.item() / A.shape[-2])


def _modules_meant(keys: Sequence[str], modules: Sequence[str], path: Path) -> dict[str, str]:
    """{name in the file: the one module that it means}; all of them have one prefix."""
    candidates: dict[str, set[str]] = defaultdict(set)
    for prefix, separator in _PREFIXES.items():
        if all(key.startswith(prefix) for key in keys):
            for name in modules:
                candidates[prefix + name.replace(".", separator)].add(name)
    meant = {}
    for key in keys:
        means = candidates.get(key, set())
        if len(means) != 1:
            closest = closest_names(key.replace("_", "."), modules)
            which = (f"may mean {', '.join(map(repr, sorted(means)))}" if means
                     else f"means no module of this model; near it: {closest}")
            raise MismatchError(f"'{path}' has an adapter at '{key}', which {which}.")
        meant[key], = means
    return meant


def _scales_in_metadata(file: AdapterFile) -> dict[str, float]:
    """{part of the pipeline: alpha / rank} where diffusers wrote all configs into the header."""
    text = file.metadata.get("lora_adapter_metadata")
    if text is None:
        return {}
    try:
        settings = _settings_by_part(dict(json.loads(text)))
        scales = {}
        for (part, name), value in settings.items():
            if value and name in _UNREAD:
                raise FormatError(f"The header of '{file.path}' asks for {name}, which lorafx does "
                                  "not read there.")
            if name == "lora_alpha":
                scales[part] = float(value) / int(settings[part, "r"])
        return scales
    except LorafxError:
        raise
    except (KeyError, TypeError, ValueError, ZeroDivisionError, RecursionError) as error:
        raise FormatError(
            f"The header of '{file.path}' is damaged: {type(error).__name__}: {error}.") from error


def _settings_by_part(config: Mapping[str, Any]) -> dict[tuple[str, str], Any]:
    """{(part of the pipeline, setting): value}; the part is empty if no setting has one."""
    if not any("." in name for name in config):
        return {("", name): value for name, value in config.items()}
    settings = {}
    for name, value in config.items():
        part, _, setting = name.partition(".")
        settings[part, setting] = value
    return settings
