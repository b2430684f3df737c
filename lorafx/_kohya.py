"""Adapters of kohya-ss and of diffusers, read: `.safetensors` with `lora_down`, `lora_up` and `alpha`.

Keys are `<module>.lora_down.weight` (rank, in) and `<module>.lora_up.weight` (out, rank), and a scalar `<module>.alpha`
from which the scale is alpha / rank, 1 without it. kohya writes a module's name with `_` for `.`, after a prefix that
says to which part of a pipeline it belongs (`lora_unet_`, `lora_te_`); diffusers writes it as it is, after `unet.`.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor, nn

from ._adapter import Adapter, LoRAConfig, Pair, check_shapes
from ._errors import FormatError, MismatchError
from ._files import read_safetensors, safetensors_names
from ._sites import near

# What the halves of a pair are called, by the first and the second way of each writer.
_HALVES = {"lora_down.weight": "A", "lora_up.weight": "B", "lora.down.weight": "A", "lora.up.weight": "B",
           "lora_A.weight": "A", "lora_B.weight": "B", "alpha": "alpha"}
_FORM = re.compile(rf"(.+)\.({'|'.join(map(re.escape, _HALVES))})")


def is_kohya(path: Path) -> bool:
    """Whether a file's tensors are named as these are; what each holds is not looked at."""
    names, header = safetensors_names(path)
    return header.get("format") != "lorafx" and bool(names) and any(_FORM.fullmatch(name) for name in names)


def decode(path: Path, model: nn.Module | None) -> Adapter:
    """The adapter in a file, on the modules of a model, whose names the file has in another form."""
    if model is None:
        raise FormatError(f"'{path}' names modules in a form that only the model tells: load it into the model.")
    tensors, _ = read_safetensors(path)
    halves: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        match = _FORM.fullmatch(name)
        if match is None:
            raise FormatError(f"'{path}' has a tensor '{name}', which is neither half of a pair nor its alpha.")
        if _HALVES[match[2]] in halves[match[1]]:
            raise FormatError(f"'{path}' has two tensors for the {_HALVES[match[2]]} of '{match[1]}'.")
        halves[match[1]][_HALVES[match[2]]] = tensor
    modules = [name for name, module in model.named_modules() if name and not list(module.children())]
    known = _by_form(modules, lambda name: name), _by_form(modules, lambda name: name.replace(".", "_"))
    pairs: dict[str, Pair] = {}
    for stem, half in halves.items():
        if not {"A", "B"} <= half.keys():
            raise FormatError(f"'{path}' has only {', '.join(sorted(half))} of '{stem}'.")
        A, B = half["A"], half["B"]
        check_shapes(stem, A, B)
        name = _module(stem, *known, path, modules)
        if name in pairs:
            raise MismatchError(f"'{path}' has two adapters for '{name}'.")
        alpha = half.get("alpha")
        if alpha is not None and alpha.numel() != 1:
            raise FormatError(f"'{path}' has an alpha of shape {tuple(alpha.shape)} at '{stem}'.")
        pairs[name] = Pair(A, B, 1.0 if alpha is None else alpha.item() / A.shape[-2])
    rank = max(pair.A.shape[-2] for pair in pairs.values())
    return Adapter("default", LoRAConfig(rank=rank, targets=list(pairs)), pairs)


def _by_form(names: Iterable[str], form: Callable[[str], str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        found[form(name)].append(name)
    return found


def _module(stem: str, dotted: dict[str, list[str]], flat: dict[str, list[str]], path: Path, names: list[str]) -> str:
    """The one module that a name means: whole, or without the part of the pipeline that it begins with."""
    part = re.match(r"lora_[a-z0-9]+_", stem)
    flattened = flat.get(stem[part.end():], []) if part else []
    found: set[str] = {*dotted.get(stem, []), *dotted.get(stem.partition(".")[2], []), *flattened}
    if len(found) != 1:
        means = f"may mean {', '.join(map(repr, sorted(found)))}" if found else (
            f"means no module of this model; near it: {near(stem.replace('_', '.'), names)}")
        raise MismatchError(f"'{path}' has an adapter at '{stem}', which {means}.")
    name, = found
    return name
