"""The shards of a checkpoint's folder, which holds no other weights."""

from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from .._errors import FormatError
from .._storage.json_files import read_json
from .._storage.safetensors_files import Shard, open_shard


INDEX, SINGLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"

# Files of a folder that hold its weights once more, or make programs look for them or for an adapter.
OTHER_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.gguf", "*.onnx", "pytorch_model*.bin",
                 "pytorch_model*.bin.index.json", "consolidated*.pth", "tf_model*.h5", "flax_model*.msgpack",
                 "rust_model.ot", "adapter_config.json", "adapter_model*.bin")


def shards_of(folder: Path) -> list[Shard]:
    """The shards of a Hugging Face folder that holds no other weights: those that its index names, or its only one."""
    shards = _listed_shards(folder)
    used = {folder / INDEX, *(shard.path for shard in shards)}
    named = read_json(folder / CONFIG).get("transformers_weights") if (folder / CONFIG).is_file() else None
    others = [path.name for path in folder.iterdir() if any(fnmatchcase(path.name, row) for row in OTHER_WEIGHTS)]
    others += [named] if isinstance(named, str) else []
    names = sorted({f"'{name}'" for name in others if (folder / name).is_file() and folder / name not in used})
    if names:
        raise FormatError(f"'{folder}' also holds {', '.join(names)}: weights that would stay as they are, and that "
                          "programs may load in place of the merged ones or add to them: move them away first.")
    return shards


def _listed_shards(folder: Path) -> list[Shard]:
    index = folder / INDEX
    if not index.is_file():
        if not (folder / SINGLE).is_file():
            raise FormatError(f"The folder '{folder}' holds neither {INDEX} nor {SINGLE}: name a checkpoint in "
                              "safetensors format, or a single .safetensors, .pth or .pt file.")
        return [open_shard(folder / SINGLE)]
    listed = read_json(index).get("weight_map")
    if not (isinstance(listed, dict) and listed and all(isinstance(name, str) for name in listed.values())):
        raise FormatError(f"'{index}' has no weight_map of tensors to files.")
    for name in listed.values():
        parts = PurePosixPath(name).parts
        if not parts or "\\" in name or PurePosixPath(name).is_absolute() or ".." in parts:
            raise FormatError(f"'{index}' names a shard '{name}', which is no file in its folder.")
    shards = [open_shard(folder / name) for name in dict.fromkeys(listed.values())]
    held: dict[str, Path] = {}
    for shard in shards:
        for name in shard.entries:
            if name in held:
                raise FormatError(f"'{held[name]}' and '{shard.path}' both hold '{name}'.")
            held[name] = shard.path
    wrong = [name for name in {**listed, **held} if name not in listed or held.get(name) != folder / listed[name]]
    if wrong:
        place = listed.get(wrong[0], "no shard")
        raise FormatError(f"'{index}' says that '{wrong[0]}' is in {place}, but it is in "
                          f"{held[wrong[0]].name if wrong[0] in held else 'none'}: the index is of other shards.")
    return shards
