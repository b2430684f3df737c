"""transformers' table of the names that a model's tensors had, where transformers is loaded."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from .._adapter.adapter import Adapter
from .._adapter.conversions import ConversionTable, of_today
from .._adapter.names import Rename, dotted, renaming, split_block
from .._graph.loaded import loaded
from .._graph.modules import unwrapped, users_modules


def conversion_table(model: nn.Module) -> ConversionTable | None:
    """Return transformers' table for a model of its own, None for any other model."""
    model = unwrapped(model)
    pretrained = loaded("transformers.modeling_utils", "PreTrainedModel")
    table_of = loaded("transformers.conversion_mapping", "get_model_conversion_mapping")
    converter = loaded("transformers.core_model_loading", "WeightConverter")
    if pretrained is None or table_of is None or not isinstance(model, pretrained):
        return None
    renamings: list[Any] = []
    converters: list[Any] = []
    for transform in table_of(model):
        (converters if isinstance(transform, converter) else renamings).append(transform)
    return ConversionTable(renamings, converters)


def adapter_of_today(adapter: Adapter, model: nn.Module) -> Adapter:
    """Return an adapter by this model's names, if it has those that transformers once had."""
    known = set()
    for path, module in users_modules(model).items():
        known |= {path, *(dotted(path, name) for name in module._parameters)}
    names = [*(split_block(site)[0] for site in adapter.pairs), *adapter.trained]
    rename = renaming(names, known)
    if all(rename(name) in known for name in names):
        return adapter
    table = conversion_table(model)
    return adapter if table is None else of_today(adapter, table, known)


def older_names(model: nn.Module, modules: Iterable[str]) -> dict[str, str]:
    """Return {module: the name that it had in older versions of transformers} of those renamed."""
    table = conversion_table(model)
    before = {} if table is None else {name: table.before(name) for name in modules}
    return {name: old for name, old in before.items() if old != name}


def renaming_here(names: list[str], model: nn.Module | None) -> Rename:
    """Return how names of modules become this model's: by a prefix, or by transformers' table.

    A module that the table joins with others keeps its name.
    """
    modules = {} if model is None else users_modules(model)
    rename = renaming(names, modules)
    if model is None or all(rename(name) in modules for name in names):
        return rename
    table = conversion_table(model)
    if table is None:
        return rename
    for name in names:
        today = table.today(dotted(name, "weight"))
        if today.converter is None and table.rename(name) not in modules:
            return rename

    def here(name: str) -> str:
        joined = table.today(dotted(name, "weight")).converter is not None
        return name if joined else table.rename(name)

    return here
