"""Files of torchtune, litgpt and loralib: A and B by name, and not the scale, s = alpha / rank.

torchtune writes `<module>.lora_a.weight` (rank, in) and `.lora_b.weight` (out, rank), loralib and
litgpt `<module>.lora_A` and `.lora_B`. A layer that joins n others, as q, k and v, has their n A
one after the other, (n rank, in), and their B likewise, (rows, rank).

The alpha is given to `load`, or stands beside the file: in the `adapter_config.json` that torchtune
writes for PEFT, or in litgpt's `hyperparameters.yaml`.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from .._adapter.adapter import Adapter, Pair, check_shapes
from .._adapter.config import LoRAConfig, is_number
from .._errors import FormatError
from .._graph.modules import users_modules
from .._storage.files import read_config
from .adapter_file import AdapterFile, Decoded
from .litgpt import Rows, joins, rows_of, settings_of
from .peft_config import ADAPTER_CONFIG
from .peft_pairs import conv1d


_TORCHTUNES = ("lora_a.weight", "lora_b.weight")
_HALVES = {"lora_a.weight": "A", "lora_b.weight": "B", "lora_A": "A", "lora_B": "B"}
_KEY = re.compile(rf"(.+)\.({'|'.join(map(re.escape, _HALVES))})")


def names_in(names: Collection[str]) -> Collection[str]:
    """Return all names if some are of such a file, else none."""
    return names if any(map(_KEY.fullmatch, names)) else []


def recognises(file: AdapterFile) -> bool:
    """True if tensors are named as these are."""
    return bool(names_in(file.tensors))


def decode(file: AdapterFile) -> Decoded:
    """Return the adapter in a file, once its alpha is known."""
    halves: dict[str, dict[str, Tensor]] = defaultdict(dict)
    biases: dict[str, Tensor] = {}
    for name, tensor in file.tensors.items():
        match = _KEY.fullmatch(name)
        if match is not None:
            halves[match[1]][_HALVES[match[2]]] = tensor
        elif name.rpartition(".")[2] == "bias":  # what loralib's lora_state_dict(bias=...) adds
            biases[name] = tensor
        else:
            raise FormatError(f"'{file.path}' has a tensor '{name}', which is no half of a pair: "
                              "save those of the adapter alone, as loralib.lora_state_dict(model) "
                              "gives them.")
    pairs = {}
    for site, found in halves.items():
        if len(found) != 2:
            raise FormatError(f"'{file.path}' has only {min(found)} of '{site}'.")
        pairs[site] = _pair(file, site, found["A"], found["B"])
    if not pairs:
        raise FormatError(f"'{file.path}' holds no adapter: no tensor is half of a pair.")
    rank = max(pair.A.shape[-2] for pair in pairs.values())
    owners = tuple(sorted({name.rpartition(".")[0] for name in biases} - {""}))
    config = LoRAConfig(rank, targets=list(pairs), trainable=owners)
    return Decoded(Adapter("default", config, pairs, biases))


def _pair(file: AdapterFile, site: str, A: Tensor, B: Tensor) -> Pair:
    """One pair, or those of a layer that joins several as one, whose B has them as blocks."""
    rank = B.shape[-1] if A.ndim == B.ndim == 2 else 0
    if not rank or A.shape[0] % rank:
        raise FormatError(f"'{file.path}' has A {tuple(A.shape)} and B {tuple(B.shape)} at "
                          f"'{site}', which are not (rank, in) and (out, rank).")
    count = A.shape[0] // rank
    if count > 1 or joins(site) and rows_of(file.path, site) is not None:
        B = _blocks(B, _rows(file, site, count, B.shape[0]))
    check_shapes(site, A, B)
    return Pair(A, B, _alpha(file, rank) / rank)


def _blocks(B: Tensor, rows: Rows) -> Tensor:
    """B (rows, rank) of n matrices as (out, n rank), zero but where each has its rows."""
    rank = B.shape[1]
    made = B.new_zeros(rows.out, len(rows.of_each) * rank)
    start = 0
    for number, places in enumerate(rows.of_each):
        made[places, number * rank:(number + 1) * rank] = B[start:start + len(places)]
        start += len(places)
    return made


def _rows(file: AdapterFile, site: str, count: int, length: int) -> Rows:
    """Of the n matrices that a layer joins, the rows of each, as far as the file tells."""
    rows = rows_of(file.path, site)
    if rows is None and file.model is not None and not joins(site):
        module = users_modules(file.model).get(site)
        weight = None if module is None else module._parameters.get("weight")
        if weight is not None and weight.shape[-1 if isinstance(module, conv1d()) else 0] == length:
            each = max(length // count, 1)
            rows = Rows(length, [[*range(start, start + each)] for start in range(0, length, each)])
    if rows is None or len(rows.of_each) != count or sum(map(len, rows.of_each)) != length:
        raise FormatError(
            f"'{file.path}' has at '{site}' the A and B of {count} of the matrices that it joins, "
            f"{length} rows in all, and does not say which rows they are: keep litgpt's "
            "hyperparameters.yaml and model_config.yaml beside it; or fill lora_A and lora_B up "
            "with zeros for the others, (rank of each, in) and (rows of each, rank).")
    return rows


def _alpha(file: AdapterFile, rank: int) -> float:
    """The alpha that was given, or that stands beside the file, with this rank."""
    if file.alpha is not None:
        return file.alpha
    found: Mapping[str, Any] = {}
    beside = file.path.parent / ADAPTER_CONFIG
    if not any(name.endswith(_TORCHTUNES) for name in file.tensors):
        settings = settings_of(file.path)
        found = {"r": settings.get("lora_r"), "lora_alpha": settings.get("lora_alpha")}
    elif beside.is_file():
        found = read_config(beside)
    alpha = found.get("lora_alpha")
    if alpha is None or not is_number(alpha) or found.get("r") != rank:
        raise FormatError(
            f"'{file.path}' holds A and B without their scale, alpha / rank, as torchtune, litgpt "
            "and loralib write them: name the alpha of its training, load(..., alpha=16) or "
            "--alpha 16.")
    return float(alpha)
