"""The state_dict of an injected model, or a folder of it: an adapter among the base's tensors.

Names are those in the model, `<site>.lora.<adapter>.A`, `.B`, where the scale is not 1 `.s`, and
`<module>.trained.<adapter>.<name>`. A Trainer's checkpoint and `save_pretrained` write it in a
folder, in one file or in shards with an index.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .._adapter.adapter import Adapter, Pair, check_shapes
from .._adapter.config import LoRAConfig, short_repr
from .._adapter.names import dotted, site_name
from .._errors import FormatError
from .._kernels.private import storage_key
from .._model.places import base_buffers
from .._storage.files import read_config, read_part, read_safetensors
from .adapter_file import AdapterFile, Decoded
from .peft_config import ADAPTER_CONFIG


_FACTOR = re.compile(r"(?:(.+)\.)?lora(?:_([^.\[]+))?(\[[^\]]+\])?\.([^.]+)\.([ABs])")
_TRAINED = re.compile(r"(?:(.+)\.)?trained\.([^.]+)\.([^.]+)")
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")


def names_in(names: Collection[str]) -> list[str]:
    """Return those of a state_dict's names that are of adapters, none where it has no factors."""
    if not any(map(_FACTOR.fullmatch, names)):
        return []
    return [name for name in names if _FACTOR.fullmatch(name) or _TRAINED.fullmatch(name)]


def names_in_file(names: Collection[str], metadata: Mapping[str, str]) -> list[str]:
    """Return the same of a safetensors file; none of one that lorafx.save wrote."""
    return [] if metadata.get("format") == "lorafx" else names_in(names)


def recognises(file: AdapterFile) -> bool:
    """True if factors are named as a model's."""
    return bool(names_in_file(file.tensors, file.metadata))


def decode(file: AdapterFile) -> Decoded:
    """Return the one adapter that is in a model's state_dict, or that is asked for by its name."""
    factors: dict[str, dict[str, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    trained: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in file.tensors.items():
        factor, copy = _FACTOR.fullmatch(name), _TRAINED.fullmatch(name)
        if factor is not None:
            owner, attribute, block, adapter, letter = factor.groups()
            site = site_name(owner or "", attribute or "weight") + (block or "")
            factors[adapter][site][letter] = tensor
        elif copy is not None:
            trained[copy[2]][dotted(copy[1] or "", copy[3])] = tensor
    adapter = _chosen(file, list(factors))
    pairs = {}
    for site, found in _first_names(factors[adapter]).items():
        pairs[site] = _pair(site, found, file.path)
    whole = {name: parts[""] for name, parts in _first_names(
        {name: {"": tensor} for name, tensor in trained[adapter].items()}).items()}
    rank = max(pair.A.shape[-2] for pair in pairs.values())
    owners = sorted({name.rpartition(".")[0] for name in whole} - {""})
    config = LoRAConfig(rank, targets=list(pairs), trainable=tuple(owners))
    persistent = {} if file.model is None else base_buffers(file.model)
    buffers = frozenset(name for name, tensor in whole.items()
                        if name in persistent or not tensor.is_floating_point())
    return Decoded(Adapter(adapter, config, pairs, whole, buffers=buffers))


def _chosen(file: AdapterFile, adapters: list[str]) -> str:
    if file.adapter in adapters:
        return file.adapter
    if len(adapters) > 1:
        raise FormatError(f"'{file.path}' has {', '.join(map(repr, sorted(adapters)))}: name one "
                          "with adapter=....")
    return adapters[0]


def _pair(site: str, found: Mapping[str, Tensor], path: Path) -> Pair:
    if not {"A", "B"} <= found.keys():
        raise FormatError(f"'{path}' has only {', '.join(sorted(found))} of '{site}'.")
    A, B, s = found["A"], found["B"], found.get("s")
    check_shapes(site, A, B)
    if s is not None and s.numel() != 1:
        raise FormatError(f"'{path}' has a scale of shape {tuple(s.shape)} at '{site}'.")
    return Pair(A, B, 1.0 if s is None else float(s))


def _first_names(found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Mapping[str, Tensor]]:
    """What has several names, as the branch of a layer that a model holds twice, under the first.
    """
    first: dict[Any, str] = {}
    for name, tensors in found.items():
        memory = [(storage_key(tensor.untyped_storage()), tensor.storage_offset())
                  for letter, tensor in tensors.items() if letter != "s"]
        first.setdefault(tuple(memory), name)
    return {name: found[name] for name in first.values()}


def read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the adapters' tensors in a folder of a model's; none if it is another's."""
    if not folder.is_dir() or (folder / ADAPTER_CONFIG).is_file():
        return {}, {}
    return _tensors_of_folder(folder), {}


def _tensors_of_folder(folder: Path) -> dict[str, Tensor]:
    """Those in a folder's shards or its one file; none if it has neither."""
    for index in _INDICES:
        if (folder / index).is_file():
            return _tensors_of_shards(folder, index)
    for name in _SINGLE:
        if (folder / name).is_file():
            return _tensors_of_file(folder / name)
    for part in (folder, *folder.iterdir()):
        if (part / ".metadata").is_file():
            raise FormatError(
                f"'{part}' is a checkpoint of torch.distributed.checkpoint: make one file of it by "
                "torch.distributed.checkpoint.format_utils.dcp_to_torch_save(folder, 'model.pth').")
    return {}


def _tensors_of_shards(folder: Path, index: str) -> dict[str, Tensor]:
    places = read_config(folder / index).get("weight_map")
    if not isinstance(places, dict):
        raise FormatError(f"'{folder / index}' has no weight_map of tensors to files.")
    names = names_in(places)
    for name in names:
        shard = places[name]
        if not (isinstance(shard, str) and shard.isprintable() and Path(shard).name == shard):
            raise FormatError(f"'{folder / index}' has {short_repr(name)} in {short_repr(shard)}, "
                              "which is not a file in its folder.")
    tensors: dict[str, Tensor] = {}
    for shard in dict.fromkeys(places[name] for name in names):
        tensors |= _tensors_of_file(folder / shard)
    if tensors.keys() != set(names):
        name = short_repr(min(tensors.keys() ^ set(names)))
        raise FormatError(f"'{folder / index}' and its shards do not both have {name}.")
    return tensors


def _tensors_of_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        found: Mapping[str, Tensor] = read_safetensors(path, names_in_file)[0]
    else:
        found = read_part(path, names_in)[0]
    return {name: found[name] for name in names_in(found)}
