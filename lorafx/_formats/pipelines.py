"""How files of a diffusion pipeline name modules: by part, prefix, and what stands for a dot."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .._adapter.names import closest_names
from .._errors import ConfigError, MismatchError


class Prefix(NamedTuple):
    """What a prefix says: the parts of a pipeline that it may mean, and how dots are written."""

    parts: tuple[str, ...]
    separator: str = "."


DENOISER = ("unet", "transformer")  # of which a pipeline has one

# {prefix of a module's name in a file: what it says}; the parts are named as pipelines of diffusers
# name them
PREFIXES = {
    "unet.": Prefix(("unet",)),
    "transformer.": Prefix(("transformer",)),
    "diffusion_model.": Prefix(DENOISER),  # ComfyUI, ai-toolkit
    "prior.": Prefix(("prior",)),
    "text_encoder.": Prefix(("text_encoder",)),
    "text_encoder_2.": Prefix(("text_encoder_2",)),
    "text_encoder_3.": Prefix(("text_encoder_3",)),
    "lora_unet_": Prefix(DENOISER, "_"),  # kohya
    "lora_transformer_": Prefix(("transformer",), "_"),
    "lora_prior_unet_": Prefix(("prior",), "_"),
    "lora_te_": Prefix(("text_encoder",), "_"),
    "lora_te1_": Prefix(("text_encoder",), "_"),
    "lora_te2_": Prefix(("text_encoder_2",), "_"),
    "lora_te3_": Prefix(("text_encoder_3",), "_"),
}


def modules_meant(
    keys: Sequence[str], modules: Sequence[str], path: Path, part: str | None,
    older: Mapping[str, str],
) -> dict[str, str]:
    """Return {name in a file: the one module of this model that it means}, for one part.

    Without a part all names are meant, and have one prefix or none. `older` are the names that some
    modules had before.
    """
    if part is not None:
        keys = _keys_of(part, keys, path)
    candidates: dict[str, set[str]] = defaultdict(set)
    written = [*zip(modules, modules), *_numbered_names(modules).items(), *older.items()]
    for prefix, separator in _fitting(keys, part):
        for name, other in written:
            candidates[prefix + other.replace(".", separator)].add(name)
    meant: dict[str, str] = {}
    for key in keys:
        means = candidates.get(key, set())
        if len(means) != 1:
            _refuse(key, means, keys, modules, path, part)
        meant[key], = means
    return meant


def _fitting(keys: Iterable[str], part: str | None) -> list[tuple[str, str]]:
    """(prefix, separator) of all that these keys may have: one of this part's, or one of all."""
    if part is not None:
        return [(prefix, said.separator) for prefix, said in PREFIXES.items() if part in said.parts]
    fitting = [("", ".")]
    for prefix, said in PREFIXES.items():
        if all(key.startswith(prefix) for key in keys):
            fitting.append((prefix, said.separator))
    return fitting


def _prefix_of(key: str) -> str:
    """The prefix of a name in a file, the longest, or ''."""
    return max((prefix for prefix in PREFIXES if key.startswith(prefix)), key=len, default="")


def parts_in(keys: Iterable[str]) -> list[str]:
    """Return the parts that names in a file are of, by their first names."""
    prefixes = {_prefix_of(key) for key in keys} - {""}
    return sorted({PREFIXES[prefix].parts[0] for prefix in prefixes})


def _keys_of(part: str, keys: Sequence[str], path: Path) -> list[str]:
    """The names of one part of a pipeline."""
    chosen = []
    for key in keys:
        prefix = _prefix_of(key)
        if not prefix:
            raise MismatchError(f"'{path}' has an adapter at '{key}', which is of no part: load it "
                                "without part=....")
        if part in PREFIXES[prefix].parts:
            chosen.append(key)
    if not chosen:
        raise MismatchError(f"'{path}' has nothing for {part!r}: it has the parts "
                            f"{', '.join(map(repr, parts_in(keys)))}.")
    return chosen


def _refuse(
    key: str, means: Collection[str], keys: Sequence[str], modules: Sequence[str], path: Path,
    part: str | None,
) -> None:
    parts = parts_in(keys)
    if part is None and len(parts) > 1:
        raise MismatchError(f"'{path}' holds adapters for {' and '.join(map(repr, parts))}: load "
                            f"each into its model, such as with part={parts[0]!r}.")
    closest = closest_names(key.replace("_", "."), modules)
    which = (f"may mean {', '.join(map(repr, sorted(means)))}" if means
             else f"means no module of this model; near it: {closest}")
    raise MismatchError(f"'{path}' has an adapter at '{key}', which {which}.")


_IN_BLOCK = re.compile(
    r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(attentions|resnets)\.(\d+)\.(.+)")
_LEVEL = re.compile(r"(down|up)_blocks\.(\d+)\.(?:resnets\.\d+\.conv1|downsamplers\.\d+\.conv)")
# What else than attentions has linear layers, and their names there.
_OF_RESNETS = {"time_emb_proj": "emb_layers.1"}
_OF_SDXL = "add_embedding.linear_1"
_OUTSIDE = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
            "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}


def _numbered_names(modules: Iterable[str]) -> dict[str, str]:
    """{linear layer in diffusers' U-Net: its name where blocks are numbered in a row}.

    So Stability's code names them, and kohya for SDXL. The first input block is a convolution; each
    resnet begins a block, and so does what changes the size of the input. In a block the attention
    comes second; the middle has a resnet on both sides of it.
    """
    blocks: dict[tuple[str, int], int] = defaultdict(int)
    found = {name: other for name, other in _OUTSIDE.items() if name in modules}
    inside: list[tuple[str, re.Match[str]]] = []
    for name in modules:
        level, layer = _LEVEL.fullmatch(name), _IN_BLOCK.fullmatch(name)
        if level is not None:
            blocks[level[1], int(level[2])] += 1
        if layer is not None and (layer[3] == "attentions" or layer[5] in _OF_RESNETS):
            inside.append((name, layer))
    for name, layer in inside:
        side, depth, kind, number, rest = layer.groups()
        attends = kind == "attentions"
        rest = rest if attends else _OF_RESNETS[rest]
        if side is None:
            found[name] = f"middle_block.{2 * int(number) + attends}.{rest}"
            continue
        before = sum(blocks[side, level] for level in range(int(depth)))
        kind, first = ("input", 1) if side == "down" else ("output", 0)
        place = first + before + int(number)
        found[name] = f"{kind}_blocks.{place}.{int(attends)}.{rest}"
    return found


def in_kohyas_file(names: Iterable[str], modules: Collection[str], part: str) -> dict[str, str]:
    """Return {name of a module of a part: what kohya calls it}.

    It numbers blocks in a row where the U-Net is given the size of images too, as SDXL's.
    """
    for prefix, said in PREFIXES.items():
        if part in said.parts and said.separator == "_":
            break
    else:
        raise ConfigError(f"kohya's files have no part {part!r}")
    numbered = _numbered_names(modules) if _OF_SDXL in modules else {}
    return {name: prefix + numbered.get(name, name).replace(".", "_") for name in names}
