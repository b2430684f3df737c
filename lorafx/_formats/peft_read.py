"""PEFT's directories, read: `adapter_config.json` beside `adapter_model.safetensors` (or an older `.bin`).

Keys are `base_model.model.<module>.lora_A.weight` (rank, in) and `lora_B` (out, rank). A parameter that is adapted by
itself (`target_parameters`) is named after its module; where a module has several, the one that is registered last is
named so, and those before it after one more `base_layer` each. See PEFT 0.21.2 and its checkpoint format page.
"""

import os
import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._adapter.adapter import Adapter, Pair, Stored, check_shapes
from .._adapter.names import dotted, renamed
from .._errors import FormatError
from .._graph.modules import users_modules
from .._storage.files import read_metadata, read_pickle, read_safetensors
from .peft_config import (
    CONFIG, bytes_digest, check_complete, config_digest, is_saved, is_target, lora_config,
    parameters_of, rank_and_scale, read_config
)


PREFIX = "base_model.model."
TENSORS, OLD = "adapter_model.safetensors", "adapter_model.bin"

# In the header of TENSORS: the digest of the config that was written with it, and if another config was there before,
# its digest, and the new one as a whole.
DIGEST, BEFORE, WHOLE = "lorafx_config", "lorafx_config_before", "lorafx_config_whole"


class Key(NamedTuple):
    """What the name of a tensor says: of which module, how many parameters follow it there, and which part it is."""

    path: str
    after: int
    part: str  # lora_A.weight, lora_B.weight


def decode(folder: Path, model: nn.Module | None, file: str | None = None) -> Adapter:
    """The adapter in a folder, named default; the model tells apart parameters that its keys alone cannot.

    `file` is the name of its tensors' file, by default the newer of the two that PEFT has written.
    """
    config, path, tensors = _files(folder, file)
    keys = {name: key for name in tensors if (key := _key(name)) is not None}
    halves: dict[tuple[str, int], dict[str, Tensor]] = {}
    for name, key in keys.items():
        halves.setdefault((key.path, key.after), {})[key.part] = tensors[name]
    for (module, _), half in halves.items():
        if len(half) != 2:
            raise FormatError(f"'{path}' has the {next(iter(half))} of '{module}' but not its other half.")
        if half["lora_A.weight"].ndim > 3:
            raise FormatError(f"'{path}' adapts '{module}', a convolution, which lorafx does not support.")
        check_shapes(module, half["lora_A.weight"], half["lora_B.weight"])
    if not halves:
        raise FormatError(f"'{path}' holds no adapter: it has no lora_A and lora_B.")
    adapted = {module for module, _ in halves}
    modules = {} if model is None else users_modules(model)
    here = renamed(sorted(adapted), modules)
    attentions = {key.path.removesuffix(".out_proj") for name, key in keys.items() if ".base_layer.out_proj." in name}
    reader = _PairReader(config, path, attentions)
    pairs: dict[str, Pair] = {}
    stored: dict[str, Stored] = {}
    for (module, after), half in halves.items():
        found = reader.pair(module, after, half["lora_A.weight"], half["lora_B.weight"], modules.get(here(module)))
        site = dotted(here(module), found.attribute) if found.attribute else here(module)
        pairs[site] = found.pair
        if found.stored is not None:
            stored[site] = found.stored
    names = {dotted(name, key): tensor for name, module in modules.items()
             for key, tensor in (*module._parameters.items(), *module._buffers.items()) if tensor is not None}
    rest = {name: tensor for name, tensor in tensors.items() if name not in keys}
    whole = _trained(rest, adapted, config, path)
    trained = {here(name): tensor for name, tensor in whole.items()}
    if len(trained) != len(whole):
        raise FormatError(f"'{path}' has one trained tensor under two names of this model.")
    trained = {name: tensor for name, tensor in trained.items() if not _is_bases(name, tensor, names, rest, path)}
    check_complete(config, {here(module) for module in adapted}, modules.items(),
                   [name.replace(".base_layer.", ".") for name in rest], path)
    return Adapter("default", lora_config(config, pairs, trained), pairs, trained, stored, untied=True,
                   says_transposed=bool(config.get("fan_in_fan_out")))


def _files(folder: Path, file: str | None) -> tuple[dict[str, Any], Path, dict[str, Tensor]]:
    """A folder's config, the file of its tensors, and these by name, without the prefix of all; of one save."""
    while True:
        content, version = _content(folder / CONFIG)
        path, tensors, header = _tensors(folder, file)
        config = _config(content, folder / CONFIG, header, path)
        if config is not None:
            return config, path, tensors
        if _content(folder / CONFIG)[1] == version:  # else another process has saved meanwhile
            raise FormatError(f"'{path}' was not written together with the {CONFIG} beside it: one of them was changed "
                              "or is of another adapter; save it again.")


def _tensors(folder: Path, file: str | None) -> tuple[Path, dict[str, Tensor], dict[str, str]]:
    """The file of a folder's tensors, these by name, and what its header says besides."""
    path = next((folder / name for name in (TENSORS, OLD) if file in (None, name) and (folder / name).is_file()), None)
    if path is None:
        raise FormatError(f"'{folder}' has neither {TENSORS} nor {OLD}.")
    newer = folder / TENSORS
    if file == OLD and newer.is_file() and DIGEST in read_metadata(newer):
        raise FormatError(f"'{path}' is of an older adapter than {TENSORS} and {CONFIG} beside it: load '{newer}'.")
    tensors, header = read_safetensors(path) if path.name == TENSORS else (read_pickle(path), {})
    for name in tensors:
        if not name.startswith(PREFIX):
            raise FormatError(f"'{path}' has a tensor '{name}', which does not begin with '{PREFIX}' as PEFT's do.")
    return path, {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}, header


def _config(content: bytes, path: Path, header: Mapping[str, str], tensors: Path) -> dict[str, Any] | None:
    """The config that belongs to tensors with this header, which are new if saving ended half-way; None if unknown."""
    if header.get(BEFORE) == bytes_digest(content):
        content, path = header.get(WHOLE, "").encode(), tensors
    config = read_config(content, path)
    return config if header.get(DIGEST, config_digest(config)) == config_digest(config) else None


def _content(path: Path) -> tuple[bytes, tuple[int, ...]]:
    """What a file holds, and what differs once it has been replaced."""
    try:
        with open(path, "rb") as file:
            found = os.fstat(file.fileno())
            return file.read(), (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
    except OSError as error:
        raise FormatError(f"'{path}' is missing or cannot be read: {error.strerror or error}.") from error


class _ReadPair(NamedTuple):
    """A pair, the parameter of its module that it is for (None for the weight), and how that is stored, if known."""

    pair: Pair
    attribute: str | None
    stored: Stored | None


class _PairReader(NamedTuple):
    """What all pairs of a folder are read by."""

    config: Mapping[str, Any]
    path: Path
    attentions: Container[str]

    def pair(self, module: str, after: int, A: Tensor, B: Tensor, owner: nn.Module | None) -> _ReadPair:
        """The pair of a module, whose module in this model is the owner, if there is one."""
        attribute = _attribute(self.config, module, after, owner, self.path)
        above = module.removesuffix(".out_proj")
        matched = dotted(module, attribute) if attribute else above if above in self.attentions else module
        if attribute is None and not is_target(self.config, matched):
            raise FormatError(f"'{self.path}' has an adapter of '{module}', which target_modules does not name, so "
                              "that PEFT does not use it.")
        rank, scale = rank_and_scale(self.config, matched)
        stored = None
        if attribute is not None:
            weight = None if owner is None else owner._parameters[attribute]
            A, B = _stacks(A, B, rank, weight, matched)
            if weight is not None:
                transposed = A.ndim == 3 and bool(getattr(owner, "is_transposed", False))
                if transposed and len(A) == 1:
                    raise FormatError(f"'{self.path}' adapts '{matched}', one transposed expert, which PEFT takes for "
                                      "one that is not.")
                stored = Stored(tuple(weight.shape), transposed)
            elif A.ndim == 2:
                stored = Stored((B.shape[0], A.shape[1]))
        elif module in self.attentions or above in self.attentions:
            stored = Stored((B.shape[0], A.shape[1]))
        if A.shape[-2] != rank:
            raise FormatError(f"'{self.path}' has rank {A.shape[-2]} at '{matched}', but its config says {rank}.")
        if attribute is None and module in self.attentions:
            attribute = "in_proj_weight"
        return _ReadPair(Pair(A, B, scale), None if attribute == "weight" else attribute, stored)


def _is_bases(name: str, tensor: Tensor, base: Mapping[str, Tensor], rest: Container[str], path: Path) -> bool:
    """Whether a tensor is what the base has anyway: a buffer, or an adapted layer's weight, which PEFT may save."""
    own = base.get(name)
    module, _, attribute = name.rpartition(".")
    copied = f"{module}.base_layer.{attribute}" in rest and attribute != "bias"
    if own is None or not copied and isinstance(own, nn.Parameter):
        return False
    if own.shape == tensor.shape and torch.equal(own.to(tensor.device, tensor.dtype), tensor):
        return True
    what = "the weight of an adapted layer" if copied else "a buffer"
    raise FormatError(f"'{path}' has '{name}', {what}, in which this model differs, and lorafx trains none.")


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


def _attribute(
    config: Mapping[str, Any], module: str, after: int, owner: nn.Module | None, path: Path
) -> str | None:
    """The parameter of a module that is adapted by itself and that some others follow, `after` of them; or None."""
    among = parameters_of(config, module)
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
    return A.reshape(experts, rank, -1), B.reshape(B.shape[0], rank, experts).permute(2, 0, 1).contiguous()


def _trained(
    tensors: Mapping[str, Tensor], adapted: Container[str], config: Mapping[str, Any], path: Path
) -> dict[str, Tensor]:
    """{name of a base tensor: what stands in its place}: biases, and modules that were trained whole."""
    found = {}
    for name in sorted(tensors):
        base = name.replace(".base_layer.", ".")
        owner, _, attribute = base.rpartition(".")
        if attribute == "bias" and config.get("bias") == "all" and _is_copy(owner, tensors, config):
            continue
        saved = is_saved(config, owner)
        copied = attribute == "weight" and owner in adapted and base != name  # of a layer next to an embedding
        biased = attribute == "bias" and config.get("bias", "none") != "none"
        if not saved and not biased and not copied:
            raise FormatError(f"'{path}' has a tensor '{PREFIX}{name}', which its config does not account for.")
        if biased and not saved and owner in adapted and base == name:
            raise FormatError(f"'{path}' has '{PREFIX}{name}', which PEFT does not read: an adapted layer's bias is "
                              f"'{PREFIX}{owner}.base_layer.bias'.")
        found[base] = tensors[name]
    return found


def _is_copy(owner: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
    """Whether a bias is one of the two that PEFT, told to save all biases, writes again of a module trained whole."""
    match = re.fullmatch(r"(.+?)\.(modules_to_save|original_module)(?:\.(.+))?", owner)
    if match is None or not is_saved(config, match[1]):
        return False
    inside = match[3] or ""
    if match[2] == "modules_to_save":  # of a container, the adapter's name comes first
        inside = inside.partition(".")[2]
    bias = tensors.get(dotted(dotted(match[1], inside) if inside else match[1], "bias"))
    return bias is not None and (match[2] == "original_module" or torch.equal(tensors[f"{owner}.bias"], bias))
