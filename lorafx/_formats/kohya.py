"""Adapters of kohya-ss and diffusers, read: `.safetensors` with A, B and alpha, s = alpha / rank.

Keys are `<module>.lora_down.weight` (rank, in), `<module>.lora_up.weight` (out, rank) and a scalar
`<module>.alpha`, without which s is 1. kohya writes a module's name with `_` for `.`, after a
prefix that says to which part of a pipeline it belongs (`lora_unet_`, `lora_te_`); diffusers writes
it as it is, after `unet.`.
"""

import json
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .._adapter.adapter import Adapter, Pair, check_shapes
from .._adapter.config import LoRAConfig
from .._errors import FormatError, LorafxError, MismatchError
from .._graph.modules import LorafxModule, named_modules
from .._model.older_names import older_names
from .adapter_file import AdapterFile, Decoded
from .other_kinds import is_of_other_kind, refuse_other_kinds
from .pipelines import modules_meant


# What the tensors of a pair are called, by both writers, of old and of late.
_PARTS = {
    "lora_down.weight": "A", "lora.down.weight": "A", "lora_A.weight": "A",
    "lora_up.weight": "B", "lora.up.weight": "B", "lora_B.weight": "B", "alpha": "alpha",
    "lora_linear_layer.down.weight": "A", "lora_linear_layer.up.weight": "B"}
_KEY = re.compile(rf"(.+)\.({'|'.join(map(re.escape, _PARTS))})")

# diffusers before 0.22 named what computes an attention, not the linear layers in it.
_PROCESSOR = re.compile(r"(.+)\.processor\.(\w+)_lora\.(down|up)\.weight")

# Settings of PEFT's that are not read where diffusers writes them.
_UNREAD = ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias")


def recognises(file: AdapterFile) -> bool:
    """True if tensors are named as these are; what each holds is not looked at."""
    if file.metadata.get("format") == "lorafx":
        return False
    return bool(names_in(file.tensors))


def names_in(names: Collection[str]) -> Collection[str]:
    """Return all names if some are of such a file, else none."""
    is_one = any(_KEY.fullmatch(_of_today(name)) or is_of_other_kind(name) for name in names)
    return names if is_one else []


def _of_today(name: str) -> str:
    """A tensor's name as diffusers writes it since 0.22."""
    found = _PROCESSOR.fullmatch(name)
    if found is None:
        return name
    layer = "to_out.0" if found[2] == "to_out" else found[2]
    return f"{found[1]}.{layer}.lora.{found[3]}.weight"


def decode(file: AdapterFile) -> Decoded:
    """Return the adapter in a file; the model tells the names of the modules that are meant."""
    path, model = file.path, file.model
    refuse_other_kinds(file.tensors, path)
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
    shared = _scales_in_metadata(file)
    pairs: dict[str, Pair] = {}
    older = older_names(model, modules)
    for key, name in modules_meant(list(parts), modules, path, file.part, older).items():
        if name in pairs:
            raise MismatchError(f"'{path}' has two adapters for '{name}'.")
        pairs[name] = _pair(key, parts[key], shared, path)
    rank = max(pair.A.shape[-2] for pair in pairs.values())
    config = LoRAConfig(rank=rank, targets=list(pairs))
    return Decoded(Adapter("default", config, pairs, untied=True))


def _parts_of_pairs(file: AdapterFile) -> dict[str, dict[str, Tensor]]:
    """{name of a module in the file: its A, B and alpha}."""
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in file.tensors.items():
        match = _KEY.fullmatch(_of_today(name))
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
