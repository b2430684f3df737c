"""Adapters of kohya-ss and of diffusers, read: `.safetensors` with `lora_down`, `lora_up` and `alpha`.

Keys are `<module>.lora_down.weight` (rank, in) and `<module>.lora_up.weight` (out, rank), and a scalar `<module>.alpha`
from which the scale is alpha / rank, 1 without it. kohya writes a module's name with `_` for `.`, after a prefix that
says to which part of a pipeline it belongs (`lora_unet_`, `lora_te_`); diffusers writes it as it is, after `unet.`.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from .._adapter.adapter import Adapter, Pair, check_shapes
from .._adapter.config import LoRAConfig
from .._adapter.names import near
from .._errors import FormatError, MismatchError
from .._graph.modules import LorafxModule


# What the halves of a pair are called, by the first and the second way of each writer.
_HALVES = {"lora_down.weight": "A", "lora_up.weight": "B", "lora.down.weight": "A", "lora.up.weight": "B",
           "lora_A.weight": "A", "lora_B.weight": "B", "alpha": "alpha"}
_FORM = re.compile(rf"(.+)\.({'|'.join(map(re.escape, _HALVES))})")

# What each part of a pipeline is called: by diffusers, and by kohya.
_DOTTED = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.", "prior.")
_FLAT = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_transformer_", "lora_prior_unet_")


def is_kohya(names: Iterable[str], header: Mapping[str, str]) -> bool:
    """Whether a file's tensors are named as these are; what each holds is not looked at."""
    return header.get("format") != "lorafx" and any(_FORM.fullmatch(name) for name in names)


def decode(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], model: nn.Module | None) -> Adapter:
    """The adapter in a file of these, on the modules of a model, whose names the file has in another form."""
    if model is None:
        raise FormatError(f"'{path}' names modules in a form that only the model tells: load it into the model.")
    if any(name.startswith("base_model.model.") for name in tensors):
        raise FormatError(f"'{path}' holds PEFT's tensors without its config: load the folder of both.")
    halves: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        match = _FORM.fullmatch(name)
        if match is None:
            raise FormatError(f"'{path}' has a tensor '{name}', which is neither half of a pair nor its alpha.")
        if _HALVES[match[2]] in halves[match[1]]:
            raise FormatError(f"'{path}' has two tensors for the {_HALVES[match[2]]} of '{match[1]}'.")
        halves[match[1]][_HALVES[match[2]]] = tensor
    modules = [name for name, module in model.named_modules()
               if name and not isinstance(module, LorafxModule) and module._parameters]
    here = _mapping(list(halves), modules, path)
    shared = _shared_scales(header, path)
    pairs: dict[str, Pair] = {}
    for stem, half in halves.items():
        if not {"A", "B"} <= half.keys():
            raise FormatError(f"'{path}' has only {', '.join(sorted(half))} of '{stem}'.")
        A, B, name = half["A"], half["B"], here[stem]
        if A.ndim > 3:
            raise FormatError(f"'{path}' adapts '{stem}', a convolution, which lorafx does not support.")
        check_shapes(stem, A, B)
        if name in pairs:
            raise MismatchError(f"'{path}' has two adapters for '{name}'.")
        alpha = half.get("alpha")
        if alpha is not None and alpha.numel() != 1:
            raise FormatError(f"'{path}' has an alpha of shape {tuple(alpha.shape)} at '{stem}'.")
        part = stem.partition(".")[0]
        if alpha is not None and not shared.keys().isdisjoint({part, ""}):
            raise FormatError(f"'{path}' has an alpha at '{stem}', and another in its header.")
        pairs[name] = Pair(A, B, shared.get(part, shared.get("", 1.0)) if alpha is None else alpha.item() / A.shape[-2])
    rank = max(pair.A.shape[-2] for pair in pairs.values())
    return Adapter("default", LoRAConfig(rank=rank, targets=list(pairs)), pairs, untied=True)


def _mapping(stems: Sequence[str], modules: Sequence[str], path: Path) -> dict[str, str]:
    """{name in the file: the one module that it means}, all of them names of one part of a pipeline."""
    dotted, flat = ({part for part in parts if all(stem.startswith(part) for stem in stems)} for parts in (
        ("", *_DOTTED), _FLAT))
    ways = [{part + name: [name] for name in modules} for part in dotted]
    for part in flat:
        way: dict[str, list[str]] = defaultdict(list)
        for name in modules:
            way[part + name.replace(".", "_")].append(name)
        ways.append(way)
    found = {}
    for stem in stems:
        means = {name for way in ways for name in way.get(stem, ())}
        if len(means) != 1:
            which = f"may mean {', '.join(map(repr, sorted(means)))}" if means else (
                f"means no module of this model; near it: {near(stem.replace('_', '.'), modules)}")
            raise MismatchError(f"'{path}' has an adapter at '{stem}', which {which}.")
        found[stem], = means
    return found


def _shared_scales(header: Mapping[str, str], path: Path) -> dict[str, float]:
    """{part of the pipeline: alpha / rank} where diffusers wrote the configs of all into the header."""
    if "lora_adapter_metadata" not in header:
        return {}
    try:
        config = dict(json.loads(header["lora_adapter_metadata"]))
        plain = not any("." in name for name in config)  # of one model by itself, whose tensors have no prefix
        said = {("", name) if plain else (name.partition(".")[0], name.partition(".")[2]): value
                for name, value in config.items()}
        odd = [name for (_, name), value in said.items() if value and name in ("rank_pattern", "alpha_pattern",
                                                                               "use_rslora", "use_dora", "lora_bias")]
        if odd:
            raise FormatError(f"The header of '{path}' asks for {odd[0]}, which lorafx does not read there.")
        return {part: float(value) / int(said[part, "r"]) for (part, name), value in said.items()
                if name == "lora_alpha"}
    except (KeyError, TypeError, ValueError, ZeroDivisionError, RecursionError) as error:
        raise FormatError(f"The header of '{path}' is damaged: {type(error).__name__}: {error}.") from error
