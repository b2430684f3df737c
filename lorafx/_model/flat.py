"""Models that FSDP1 wraps: it keeps parameters in flat ones, and each process has chunks of those.

The chunks of one parameter, in the order of the processes, are all of it.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._errors import ConfigError, UnsupportedModelError
from .._graph.loaded import loaded
from .._graph.modules import Place, all_modules, named_modules
from .factors import Factors
from .record import holders
from .shards import gathered, spread_like
from .together import from_all, on_cpu
from .zero import check_gathered


class Chunk(NamedTuple):
    """What this process has of one parameter: `length` numbers of it, from `start` on.

    `shape` is that of the whole, and `group` has the processes that share it.
    """

    parameter: nn.Parameter
    shape: torch.Size
    start: int
    length: int
    places: list[Place]
    group: Any


def chunks_of(model: nn.Module) -> list[Chunk]:
    """The parameters that FSDP1 cuts in chunks, each once, in the same order in every process."""
    found: list[Chunk] = []
    for wrapper in _wrappers(model):
        if wrapper._handle is not None and wrapper._handle.uses_sharded_strategy:
            found += _chunks_in(wrapper._flat_param, wrapper.process_group)
    return found


def _wrappers(model: nn.Module) -> list[Any]:
    """The FSDP1 wrappers in a model, of which itself may be one."""
    fsdp = loaded("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel")
    modules = [] if fsdp is None else all_modules(model)
    return [module for _, module in modules if isinstance(module, fsdp)]


def _chunks_in(flat: Any, group: Any) -> list[Chunk]:
    if flat._params is None:
        raise UnsupportedModelError(
            "This model is wrapped by FullyShardedDataParallel with use_orig_params=False, so that "
            "its parameters cannot be told apart: wrap it with use_orig_params=True.")
    found = []
    for number, (name, module, _) in enumerate(flat._param_infos):
        places = [Place(module, name)]
        for info in flat._shared_param_infos:
            if (info.prim_module, info.prim_param_name) == (module, name):
                places.append(Place(info.module, info.param_name))
        part = flat._shard_param_infos[number]
        start, length = part.intra_param_start_idx or 0, part.numel_in_shard or 0
        parameter, shape = flat._params[number], flat._shapes[number]
        found.append(Chunk(parameter, shape, start, length, places, group))
    return found


@contextlib.contextmanager
def in_shape(model: nn.Module, adapter: str | None = None) -> Iterator[None]:
    """Within this context what FSDP1 cut in chunks has the shape of the whole.

    The tensors of `adapter` are gathered, for which every process must enter it, and have their
    values; all others have none, and take no memory.
    """
    chunks = chunks_of(model)
    holding = {holder._modules.get(adapter or "") for holder in holders(model)}
    wanted = [chunk for chunk in chunks if chunk.places[0].module in holding]
    own = [chunk.parameter.detach().flatten() for chunk in wanted]
    whole = dict(zip(map(id, wanted), _joined(wanted, own))) if adapter is not None else {}
    with contextlib.ExitStack() as stack:
        for chunk in chunks:
            parameter = chunk.parameter
            data = whole.get(id(chunk), parameter.detach().new_empty(1).expand(chunk.shape))
            stack.callback(setattr, parameter, "data", parameter.data)
            parameter.data = data
            for place in chunk.places:
                stack.enter_context(_registered(place, parameter))
        _check_whole(model)
        yield


@contextlib.contextmanager
def _registered(place: Place, parameter: nn.Parameter) -> Iterator[None]:
    """Have a parameter in its place, where FSDP1 may have put what forward computes with."""
    module, name = place
    tables: tuple[dict[str, Any], ...] = module._parameters, vars(module)
    before = [table.pop(name, None) for table in tables]
    module._parameters[name] = parameter
    try:
        yield
    finally:
        for table, value in zip(tables, before):
            table.pop(name, None)
            if value is not None:
                table[name] = value


def check_takes_parameters(model: nn.Module) -> None:
    """Raise if a model is in a state in which no parameter can be added to it."""
    if _wrappers(model):
        raise UnsupportedModelError(
            "FullyShardedDataParallel takes in no parameters once it has wrapped a model: give the "
            "model its adapters first (lorafx.inject, add, load, compose) and wrap the result; one "
            "that was trained goes from lorafx.save to lorafx.load into the base.")
    _check_whole(model)


def check_can_be_renamed(model: nn.Module) -> None:
    """Raise if FSDP1 knows parameters by the names that they had when it wrapped the model."""
    if _wrappers(model):
        raise UnsupportedModelError(
            "FullyShardedDataParallel keeps the names that parameters had when it wrapped the "
            "model: lorafx.rename before that; one that was trained goes from lorafx.save to "
            "lorafx.load(base, path, adapter=...).")


def check_can_be_copied(model: nn.Module) -> None:
    """Raise if what FSDP1 holds would have to be copied, as merge and eject do."""
    if _wrappers(model):
        raise UnsupportedModelError(
            "What FullyShardedDataParallel has wrapped can be neither merged nor ejected: "
            "lorafx.save the adapter, lorafx.load it into the base model, and merge that.")
    _check_whole(model)


def _check_whole(model: nn.Module) -> None:
    """Raise where factors are in chunks that nobody here knows the rest of."""
    check_gathered(model)
    for path, module in named_modules(model):
        if isinstance(module, Factors) and module.shapes != (module.A.shape, module.B.shape):
            raise UnsupportedModelError(
                f"'{path}' is one of many that a FullyShardedDataParallel around this "
                f"{type(model).__name__} holds in one: pass that.")


def _joined(chunks: Sequence[Chunk], parts: Sequence[Any]) -> list[Tensor]:
    """The whole of each parameter, from this process's parts of them and those of all others."""
    found = []
    for chunk, own, of_all in zip(chunks, parts, _from_all(chunks, parts)):
        size = chunk.shape.numel()
        complete = [part for part in of_all if len(part) == size]  # as inside summon_full_params
        flat = complete[0] if complete else torch.cat(of_all)
        found.append(flat.to(own.device).view(chunk.shape))
    return found


def _from_all(chunks: Sequence[Chunk], parts: Sequence[Any]) -> list[list[Any]]:
    """For each chunk, what each process has there, in their order."""
    found: list[list[Any]] = [[] for _ in chunks]
    groups = {id(chunk.group): chunk.group for chunk in chunks}
    for group in groups.values():
        numbers = [n for n, chunk in enumerate(chunks) if chunk.group is group]
        for theirs in from_all(on_cpu([parts[n] for n in numbers]), group):
            for number, part in zip(numbers, theirs):
                found[number].append(part)
    return found


class Layout:
    """How a model's parameters lie in this process: whole, spread over processes, or in chunks."""

    def __init__(self, model: nn.Module) -> None:
        self._chunks = {id(chunk.parameter): chunk for chunk in chunks_of(model)}

    def is_elsewhere(self, parameter: Tensor) -> bool:
        """True if other processes have all of it."""
        chunk = self._chunks.get(id(parameter))
        return chunk is not None and not chunk.length

    def spread(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """What this process has of a tensor that lies as a parameter of its shape does."""
        chunk = self._chunks.get(id(parameter))
        if chunk is None or tensor.shape != chunk.shape:
            return spread_like(parameter, tensor)
        return tensor.flatten()[chunk.start:chunk.start + chunk.length]

    def gathered(
        self, states: Mapping[nn.Parameter, Mapping[str, Any]]
    ) -> dict[nn.Parameter, dict[str, Any]]:
        """What an optimizer keeps for each parameter, of whole tensors; every process must ask."""
        found: dict[nn.Parameter, dict[str, Any]] = {}
        cut: list[Chunk] = []
        for parameter, entries in states.items():
            chunk = self._chunks.get(id(parameter))
            if chunk is not None:
                cut.append(chunk)
            found[parameter] = {key: gathered(value) if isinstance(value, Tensor) else value
                                for key, value in entries.items()}
        parts = [found[chunk.parameter] for chunk in cut]
        lengths = _from_all(cut, [chunk.length for chunk in cut])
        for chunk, of_all, length in zip(cut, _from_all(cut, parts), lengths):
            found[chunk.parameter] = _joined_entries(chunk, of_all, length)
        return {parameter: entries for parameter, entries in found.items() if entries}


def _joined_entries(
    chunk: Chunk, of_all: Sequence[Mapping[str, Any]], lengths: Sequence[int]
) -> dict[str, Any]:
    """What an optimizer keeps for a whole parameter, from what it keeps in each process."""
    having = [(entries, length) for entries, length in zip(of_all, lengths) if entries]
    joined: dict[str, Any] = {}
    for key, value in having[0][0].items() if having else ():
        parts = [entries[key] for entries, length in having
                 if isinstance(entries[key], Tensor) and entries[key].shape == (length,)]
        if len(parts) == len(having):
            value = torch.cat(parts)
            if value.numel() != chunk.shape.numel():
                raise ConfigError(f"The optimizer keeps '{key}' of some parts of a tensor only.")
            value = value.view(chunk.shape)
        joined[key] = value
    return joined
