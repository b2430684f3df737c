"""PEFT's trainable_token_indices: rows of an embedding that are trained beside the adapter.

Those at `<embedding>.token_adapter.trainable_tokens_delta` (n, dim) stand, despite the name, in the
place of the rows, in the order in which the config lists them. Where the config of a transformers
model ties its head, PEFT lets the head use them too.
"""

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._adapter.adapter import Adapter
from .._adapter.config import short_repr
from .._adapter.names import Rename, block_of, dotted, ranges_of, split_block
from .._errors import ConfigError, FormatError
from .._graph.loaded import loaded
from .._graph.modules import submodule, users_modules
from .adapter_file import INSTEAD


SUFFIX = ".token_adapter.trainable_tokens_delta"
INDICES = "trainable_token_indices"  # the entry of the config


class Outline(nn.Module):
    """The layers of a model, without its code; `tying` is its embedding if its config ties a head.
    """

    tying: str | None = None


def read_rows(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], here: Rename,
    model: nn.Module | None, path: Path,
) -> tuple[dict[str, Tensor], frozenset[str]]:
    """Return {weight in this model and block of rows: what stands in the place of these}.

    And those of them beside which what is tied to that weight in this model stays as it is.
    """
    entry, found, alone = config.get(INDICES), dict[str, Tensor](), set[str]()
    for name, tensor in tensors.items():
        if not name.endswith(SUFFIX):
            continue
        module = name.removesuffix(SUFFIX)
        indices = _indices_of(entry, module)
        sound = isinstance(indices, list) and len(indices) > 0 and all(
            type(index) is int and 0 <= index < 2**31 for index in indices)
        if not sound or len(set(indices)) != len(indices):
            raise FormatError(f"'{path}' has rows of '{module}', and its {INDICES}, "
                              f"{short_repr(entry)}, does not say which.")
        if tensor.ndim < 1 or len(tensor) != len(indices):
            raise FormatError(f"'{path}' has {tuple(tensor.shape)} for the {len(indices)} rows of "
                              f"'{module}' that {INDICES} names.")
        block = block_of(range(index, index + 1) for index in indices)
        name = dotted(here(module), f"weight{block}")
        found[name] = tensor[torch.tensor(indices).argsort()]
        if model is not None and _tied_alone(model, here(module)) is not None:
            alone.add(name)
    if entry and not found:
        raise FormatError(f"'{path}' has no rows of an embedding, which {INDICES} names.")
    return found, frozenset(alone)


def _indices_of(entry: Any, module: str) -> Any:
    """The rows of a module that the config lists: of the only embedding, or by how names end."""
    if not isinstance(entry, dict):
        return entry
    return next((rows for name, rows in entry.items() if module.endswith(name)), None)


def _tied_alone(model: nn.Module, module: str) -> str | None:
    """Return a module whose weight a module has, where PEFT would change it in the latter only."""
    modules = users_modules(model)
    weight = modules[module]._parameters.get("weight") if module in modules else None
    if weight is None or ties_head(model, module):
        return None
    for path, owner in modules.items():
        if path != module and any(own is weight for own in owner._parameters.values()):
            return path
    return None


def ties_head(model: Any, module: str) -> bool:
    """Return True if a module is the embedding of a transformers model whose config ties its head.
    """
    if isinstance(model, Outline):
        return model.tying == module
    pretrained = loaded("transformers.modeling_utils", "PreTrainedModel")
    if pretrained is None or not isinstance(model, pretrained):
        return False
    known: Any = model
    tied = known.config.to_dict().get("tie_word_embeddings", False)
    return bool(tied) and known.get_input_embeddings() is submodule(model, module)


def written_rows(
    adapter: Adapter, model: nn.Module, adapted: Container[str]
) -> tuple[dict[str, list[int]], dict[str, Tensor]]:
    """Return the config's entry, {module: rows}, and {name: tensor} for rows that were trained."""
    indices: dict[str, list[int]] = {}
    tensors: dict[str, Tensor] = {}
    modules = users_modules(model)
    for name, tensor in adapter.trained.items():
        whole, block = split_block(name)
        if not block:
            continue
        owner, _, attribute = whole.rpartition(".")
        module = modules[owner]
        plain = isinstance(module, nn.Embedding) or (
            isinstance(module, nn.Linear) and module.bias is None)  # PEFT would forget the bias
        if not owner or attribute != "weight" or not plain or owner in adapted or owner in indices:
            raise ConfigError(
                f"PEFT trains rows of embeddings, and of linear layers without bias that have no "
                f"adapter, not '{name}': {INSTEAD}.")
        for other in modules:
            if other != owner and other.endswith(owner):
                raise ConfigError(f"PEFT would train rows of '{other}' too, since its name ends as "
                                  f"'{owner}' does.")
        tied = _tied_alone(model, owner)
        if tied is not None:
            raise ConfigError(f"PEFT would change rows of '{owner}' and not of '{tied}', which is "
                              f"tied to it: {INSTEAD}.")
        indices[owner] = [index for rows in ranges_of(block) for index in rows]
        tensors[owner + SUFFIX] = tensor
    return indices, tensors
