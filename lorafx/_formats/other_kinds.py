"""Kinds of adapters that lorafx does not read: named, with how much of a file is of each."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from .._errors import FormatError
from .._storage.files import read_pickle


# (what follows the name of a weight's module, how that weight is adapted)
_KINDS = (
    (r"hada_[wt][12](?:_[ab])?", "by LoHa"),
    (r"lokr_[wt][12](?:_[ab])?", "by LoKr"),
    (r"boft_[Rs]", "by BOFT"),
    (r"oft_(?:R\.weight|r|s|blocks|diag)", "by OFT"),
    (r"ia3_l", "by (IA)3"),
    (r"on_input", "by (IA)3"),
    (r"vera_lambda_[bd]", "by VeRA"),
    (r"diff(?:_b)?", "by a full difference (.diff)"),
    (r"lora_mid\.weight", "by LoCon with a core (lora_mid)"),
    (r"lora_magnitude_vector(?:\.\w+)*", "by DoRA"),
    (r"dora_scale", "by DoRA"),
    (r"lora_B\.bias", "by LoRA with a bias (lora_bias)"),
    (r"lora_embedding_[AB](?:\.\w+)?", "as embeddings"),
)
_KEY = re.compile(r"(.+)\.(?:%s)" % "|".join(f"({ending})" for ending, _ in _KINDS))
_HALF = re.compile(r"(.+?)(?:\.base_layer)*\.lora[_.](?:A|B|up|down)\.weight")
_CONVOLUTION = "as convolutions"


def is_of_other_kind(name: str) -> bool:
    """True if a tensor's name says that it is of an adapter that lorafx does not read."""
    return _KEY.fullmatch(name) is not None


def refuse_other_kinds(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise FormatError that says which weights are adapted in ways that lorafx does not read."""
    adapted: set[str] = set()
    found: dict[str, set[str]] = {}
    for name, tensor in tensors.items():
        other, half = _KEY.fullmatch(name), _HALF.fullmatch(name)
        if other is not None:
            number = next(place for place in range(len(_KINDS)) if other[place + 2] is not None)
            adapted.add(other[1])
            found.setdefault(_KINDS[number][1], set()).add(other[1])
        elif half is not None:
            adapted.add(half[1])
            if tensor.ndim > 2:
                found.setdefault(_CONVOLUTION, set()).add(half[1])
    said = [f"{len(weights)} of its {len(adapted)} weights {how}, such as '{min(weights)}'"
            for how, weights in found.items()]
    if said:
        raise FormatError(f"'{path}' adapts {', and '.join(said)}, which lorafx does not support.")


_OF_ADAPTERHUB = {"config", "model_class", "model_type"}  # entries of its adapter_config.json
_ITS_TENSORS = "pytorch_adapter.bin"


def refuse_adapterhub(content: bytes, folder: Path) -> None:
    """Raise FormatError for a folder whose config is that of the library adapters (AdapterHub)."""
    try:
        config = json.loads(content.decode())
    except (ValueError, RecursionError):
        return  # which the format that it is of says
    if not isinstance(config, dict) or "peft_type" in config or not _OF_ADAPTERHUB <= config.keys():
        return
    file = folder / _ITS_TENSORS
    count = f", all of its {len(read_pickle(file))} tensors" if file.is_file() else ""
    raise FormatError(f"'{folder}' holds an adapter of the library adapters (AdapterHub){count}, "
                      "and lorafx reads PEFT's: convert it, or train LoRA with lorafx or PEFT.")
