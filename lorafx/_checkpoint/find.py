"""The shards of a checkpoint's folder, which holds no other weights."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from .._errors import FormatError
from .._storage.json_files import read_json
from .._storage.safetensors_files import SafetensorsFile, open_safetensors


INDEX, SINGLE, MODEL_CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"

# Files that hold a folder's weights once more, or make programs look for them or for an adapter.
OTHER_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.gguf", "*.onnx",
                 "pytorch_model*.bin", "pytorch_model*.bin.index.json", "consolidated*.pth",
                 "tf_model*.h5", "flax_model*.msgpack", "rust_model.ot", "adapter_config.json",
                 "adapter_model*.bin")


def read_config(folder: Path) -> dict[str, Any] | None:
    """Return the content of a folder's config.json, None if there is none."""
    return read_json(folder / MODEL_CONFIG) if (folder / MODEL_CONFIG).is_file() else None


def shards_of(folder: Path) -> list[SafetensorsFile]:
    """Return the shards of a Hugging Face folder: those that its index names, or its only one.

    Raises:
        FormatError: there are none, the index is of others, or the folder holds other weights.
    """
    if (folder / INDEX).is_file():
        shards = _indexed_shards(folder)
    elif (folder / SINGLE).is_file():
        shards = [open_safetensors(folder / SINGLE)]
    else:
        raise FormatError(f"The folder '{folder}' holds neither {INDEX} nor {SINGLE}: name a "
                          "checkpoint in safetensors format, or a single .safetensors, .pth or "
                          ".pt file.")
    others = _other_weights(folder, shards)
    if others:
        raise FormatError(
            f"'{folder}' also holds {', '.join(others)}: weights that would stay as they are, and "
            "that programs may load in place of the merged ones or add to them: move them away "
            "first.")
    return shards


def _other_weights(folder: Path, shards: Sequence[SafetensorsFile]) -> list[str]:
    """The files of a folder that hold weights but are none of its shards, quoted."""
    used = {folder / INDEX, *(shard.path for shard in shards)}
    names = []
    for path in folder.iterdir():
        if any(fnmatchcase(path.name, pattern) for pattern in OTHER_WEIGHTS):
            names.append(path.name)
    named = (read_config(folder) or {}).get("transformers_weights")
    if isinstance(named, str):
        names.append(named)
    others = {name for name in names if (folder / name).is_file() and folder / name not in used}
    return sorted(f"'{name}'" for name in others)


def _indexed_shards(folder: Path) -> list[SafetensorsFile]:
    """The shards that an index names, once it says of each tensor where it is."""
    index = folder / INDEX
    weight_map = read_json(index).get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map
            and all(isinstance(name, str) for name in weight_map.values())):
        raise FormatError(f"'{index}' has no weight_map of tensors to files.")
    for name in weight_map.values():
        path = PurePosixPath(name)
        if not path.parts or "\\" in name or path.is_absolute() or ".." in path.parts:
            raise FormatError(
                f"'{index}' names a shard '{name}', which is not a file in its folder.")
    shards = [open_safetensors(folder / name) for name in dict.fromkeys(weight_map.values())]
    places: dict[str, Path] = {}
    for shard in shards:
        for name in shard.entries:
            if name in places:
                raise FormatError(f"'{places[name]}' and '{shard.path}' both hold '{name}'.")
            places[name] = shard.path
    for name in {**weight_map, **places}:
        if name not in weight_map or places.get(name) != folder / weight_map[name]:
            listed = weight_map.get(name, "no shard")
            actual = places[name].name if name in places else "none"
            raise FormatError(f"'{index}' says that '{name}' is in {listed}, but it is in "
                              f"{actual}: the index is of other shards.")
    return shards
