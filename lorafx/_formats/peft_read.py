"""PEFT's folders, read: an adapter from the tensors and the config in one.

Keys are `base_model.model.<module>.lora_A.weight` (rank, in) and `lora_B` (out, rank). A parameter
that is adapted by itself (`target_parameters`) is named after its module; where a module has
several, the one that is registered last is named so, and those before it after one more
`base_layer` each. See PEFT 0.21.2 and its checkpoint format page.
"""

import dataclasses
import re
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._adapter.adapter import Adapter, Pair, StoredWeight, check_shapes
from .._adapter.names import dotted
from .._errors import FormatError
from .._graph.modules import users_modules
from .._model.older_names import renaming_here
from .._model.places import base_buffers
from .adapter_file import AdapterFile, Decoded
from .peft_config import (
    check_complete, is_saved, is_target, lora_config, parameters_of, rank_and_scale, with_heads
)
from .peft_folder import PeftFiles, find_adapter, read_files
from .peft_names import PREFIX, without_repeated_prefix
from .peft_tokens import SUFFIX, read_rows


def decode(file: AdapterFile) -> Decoded:
    """Return the adapter in a folder; the model tells apart parameters that keys alone do not."""
    folder, tensors_file, name = find_adapter(file.path, file.adapter)
    files = read_files(folder, tensors_file)
    return Decoded(dataclasses.replace(_adapter(files, file.model), name=name))


def _adapter(files: PeftFiles, model: nn.Module | None) -> Adapter:
    modules = {} if model is None else users_modules(model)
    path, tensors = files.path, without_repeated_prefix(files.tensors, modules, files.path)
    config = with_heads(files.config)
    keys: dict[str, HalfName] = {}
    for name in tensors:
        key = _parse_key(name)
        if key is not None:
            keys[name] = key
    halves = _halves(keys, tensors, path)
    adapted = {key.module for key in keys.values()}
    here = renaming_here(sorted(adapted), model)
    attentions = set()
    for name, key in keys.items():
        if ".base_layer.out_proj." in name:
            attentions.add(key.module.removesuffix(".out_proj"))
    reader = _PairReader(config, path, attentions)
    pairs: dict[str, Pair] = {}
    stored: dict[str, StoredWeight] = {}
    for (module, after), (A, B) in halves.items():
        read = reader.pair(module, after, A, B, modules.get(here(module)))
        site = dotted(here(module), read.attribute) if read.attribute else here(module)
        pairs[site] = read.pair
        if read.stored is not None:
            stored[site] = read.stored
    others = {name: tensor for name, tensor in tensors.items()
              if name not in keys and not name.endswith(SUFFIX)}
    persistent = {} if model is None else base_buffers(model)
    trained = _trained_here(_trained(others, adapted, config, path), here, modules, others, path,
                            config, persistent)
    rows, alone = read_rows(config, tensors, here, model, path)
    trained |= rows
    buffers = frozenset(name for name, tensor in trained.items()
                        if name in persistent or not tensor.is_floating_point())
    check_complete(config, {here(module) for module in adapted}, modules,
                   [name.replace(".base_layer.", ".") for name in others], path)
    return Adapter("default", lora_config(config, pairs, trained), pairs, trained, stored,
                   untied=not config.get("ensure_weight_tying"),
                   says_transposed=bool(config.get("fan_in_fan_out")), buffers=buffers,
                   alone=alone)


class HalfName(NamedTuple):
    """What the name of half of a pair says: its module, how many parameters follow, which half."""

    module: str
    after: int
    half: str  # A, B


def _parse_key(name: str) -> HalfName | None:
    """What a name says if it is of half of a pair."""
    match = re.fullmatch(r"(.+?)((?:\.base_layer)*)\.lora_([AB])\.weight", name)
    if match is None:
        return None
    return HalfName(match[1].replace(".base_layer.", "."), match[2].count("base_layer"), match[3])


def _halves(
    keys: Mapping[str, HalfName], tensors: Mapping[str, Tensor], path: Path
) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
    """{(module, how many parameters follow there): (A, B)}."""
    halves: dict[tuple[str, int], dict[str, Tensor]] = {}
    for name, key in keys.items():
        halves.setdefault((key.module, key.after), {})[key.half] = tensors[name]
    if not halves:
        raise FormatError(f"'{path}' holds no adapter: it has no lora_A and lora_B.")
    found = {}
    for (module, after), half in halves.items():
        if len(half) != 2:
            there = next(iter(half))
            raise FormatError(f"'{path}' has the lora_{there}.weight of '{module}' but not its "
                              "other half.")
        check_shapes(module, half["A"], half["B"])
        found[module, after] = half["A"], half["B"]
    return found


class _ReadPair(NamedTuple):
    """A pair, the parameter that it is for (None: the weight), and how that is stored, if known."""

    pair: Pair
    attribute: str | None
    stored: StoredWeight | None


class _PairReader(NamedTuple):
    """What all pairs of a folder are read by."""

    config: Mapping[str, Any]
    path: Path
    attentions: Container[str]

    def pair(
        self, module: str, after: int, A: Tensor, B: Tensor, owner: nn.Module | None
    ) -> _ReadPair:
        """The pair of a module, whose module in this model is the owner, if there is one."""
        attribute = self._attribute(module, after, owner)
        above = module.removesuffix(".out_proj")
        if attribute is not None:
            matched = dotted(module, attribute)
        else:
            matched = above if above in self.attentions else module
            if not is_target(self.config, matched):
                raise FormatError(f"'{self.path}' has an adapter of '{module}', which "
                                  "target_modules does not name, so that PEFT does not use it.")
        rank, scale = rank_and_scale(self.config, matched)
        stored = None
        if attribute is not None:
            weight = None if owner is None else owner._parameters[attribute]
            A, B = _stacks(A, B, rank, weight, matched)
            stored = self._stored(A, B, weight, owner, matched)
        elif module in self.attentions or above in self.attentions:
            stored = StoredWeight((B.shape[0], A.shape[1]))
        if A.shape[-2] != rank:
            raise FormatError(
                f"'{self.path}' has rank {A.shape[-2]} at '{matched}', but its config says {rank}.")
        if attribute is None and module in self.attentions:
            attribute = "in_proj_weight"
        return _ReadPair(Pair(A, B, scale), None if attribute == "weight" else attribute, stored)

    def _attribute(self, module: str, after: int, owner: nn.Module | None) -> str | None:
        """The parameter that is adapted by itself and that `after` others follow, if one is."""
        among = parameters_of(self.config, module)
        if not among:
            if after:
                raise FormatError(f"'{self.path}' adapts several parameters of '{module}', but "
                                  "target_parameters names none.")
            return None
        if owner is not None:
            live = [name for name, parameter in owner._parameters.items() if parameter is not None]
            among = [name for name in live if name in among]
        elif len(among) > 1:
            raise FormatError(f"'{self.path}' adapts {len(among)} parameters of '{module}', in an "
                              "order that only the model tells: load it into the model.")
        if after >= len(among):
            raise FormatError(f"'{self.path}' adapts {after + 1} parameters of '{module}', of "
                              "which target_parameters and the model have "
                              f"{', '.join(among) or 'none'}.")
        return among[len(among) - 1 - after]

    def _stored(
        self, A: Tensor, B: Tensor, weight: Tensor | None, owner: nn.Module | None, name: str
    ) -> StoredWeight | None:
        """How a parameter that is adapted by itself is stored; None of experts without a model."""
        if weight is None:
            return StoredWeight((B.shape[0], A.shape[1])) if A.ndim == 2 else None
        transposed = A.ndim == 3 and bool(getattr(owner, "is_transposed", False))
        if transposed and len(A) == 1:
            raise FormatError(f"'{self.path}' adapts '{name}', one transposed expert, which PEFT "
                              "takes for one that is not.")
        return StoredWeight(tuple(weight.shape), transposed)


def _stacks(
    A: Tensor, B: Tensor, rank: int, weight: Tensor | None, name: str
) -> tuple[Tensor, Tensor]:
    """A (E rank, d2), expert by expert, and B (d1, rank E), rank by rank, as stacks of E."""
    experts = A.shape[0] // rank
    expected = experts
    if weight is not None and weight.ndim == 3:
        expected = weight.shape[0]
    if A.shape[0] != experts * rank or experts != expected:
        raise FormatError(
            f"At '{name}' A has {A.shape[0]} rows, which is not its rank, {rank}, for each expert.")
    if experts == 1 and (weight is None or weight.ndim == 2):
        return A, B
    A = A.reshape(experts, rank, -1)  # (E, rank, d2)
    B = B.reshape(B.shape[0], rank, experts).permute(2, 0, 1).contiguous()  # (E, d1, rank)
    return A, B


def _trained(
    tensors: Mapping[str, Tensor], adapted: Container[str], config: Mapping[str, Any], path: Path
) -> dict[str, Tensor]:
    """{name of a base tensor: what stands in its place}: biases, and modules trained whole.

    PEFT takes any tensor that is named as one of the base's, as it saves resized embeddings.
    """
    found = {}
    for name in sorted(tensors):
        base = name.replace(".base_layer.", ".")
        owner, _, attribute = base.rpartition(".")
        if attribute == "bias" and config.get("bias") == "all" and _is_copy(owner, tensors, config):
            continue
        saved = is_saved(config, owner)
        # the weight of an adapted layer next to an embedding, which PEFT saves beside it
        copied = attribute == "weight" and owner in adapted and base != name
        biased = attribute == "bias" and config.get("bias", "none") != "none"
        if ".base_layer." in name and not saved and not biased and not copied:
            raise FormatError(
                f"'{path}' has a tensor '{PREFIX}{name}', which its config does not account for.")
        if not saved and owner in adapted and base == name:
            raise FormatError(f"'{path}' has '{PREFIX}{name}', which PEFT does not read: an "
                              f"adapted layer's is '{PREFIX}{owner}.base_layer.{attribute}'.")
        found[base] = tensors[name]
    return found


def _is_copy(owner: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
    """True if a bias is a copy that PEFT, saving all biases, makes of a module trained whole."""
    match = re.fullmatch(r"(.+?)\.(modules_to_save|original_module)(?:\.(.+))?", owner)
    if match is None or not is_saved(config, match[1]):
        return False
    inside = match[3] or ""
    if match[2] == "modules_to_save":  # of a container, the adapter's name comes first
        inside = inside.partition(".")[2]
    module = dotted(match[1], inside) if inside else match[1]
    bias = tensors.get(dotted(module, "bias"))
    if bias is None:
        return False
    return match[2] == "original_module" or torch.equal(tensors[f"{owner}.bias"], bias)


def _trained_here(
    trained: Mapping[str, Tensor], here: Callable[[str], str], modules: Mapping[str, nn.Module],
    tensors: Container[str], path: Path, config: Mapping[str, Any], buffers: Container[str],
) -> dict[str, Tensor]:
    """Trained tensors by their names in this model, without those that the base has anyway.

    `buffers` are the model's persistent ones, which belong to a module that is saved whole.
    """
    base = {}
    for path_of_module, module in modules.items():
        for name, own in (*module._parameters.items(), *module._buffers.items()):
            if own is not None:
                base[dotted(path_of_module, name)] = own
    renamed_tensors = {here(name): tensor for name, tensor in trained.items()}
    if len(renamed_tensors) != len(trained):
        raise FormatError(f"'{path}' has one trained tensor under two names of this model.")
    found = {}
    for name, tensor in renamed_tensors.items():
        owner, _, attribute = name.rpartition(".")
        saved = is_saved(config, owner)
        named = saved or attribute == "bias"
        if not named and name in base and _equal(base[name], tensor):
            continue  # such as an embedding that was resized and not trained
        if saved and name in buffers or not _is_base_tensor(name, tensor, base, tensors, path):
            found[name] = tensor
    return found


def _equal(own: Tensor, tensor: Tensor) -> bool:
    return own.shape == tensor.shape and torch.equal(own.to(tensor.device, tensor.dtype), tensor)


def _is_base_tensor(
    name: str, tensor: Tensor, base: Mapping[str, Tensor], tensors: Container[str], path: Path
) -> bool:
    """True for what the base has: a buffer, or an adapted layer's weight, which PEFT saves."""
    own = base.get(name)
    module, _, attribute = name.rpartition(".")
    copied = f"{module}.base_layer.{attribute}" in tensors and attribute != "bias"
    if own is None or not copied and isinstance(own, nn.Parameter):
        return False
    if _equal(own, tensor):
        return True
    what = "the weight of an adapted layer" if copied else "a buffer"
    raise FormatError(f"'{path}' has '{name}', {what}, in which this model differs, and lorafx "
                      "trains none.")
