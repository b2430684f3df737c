"""Takes an adapter out of a model, whole: also where several processes hold it together."""

import dataclasses
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from .._adapter.adapter import Adapter, Pair, StoredWeight
from .._adapter.names import dotted, split_block, stands_for
from .._errors import AdapterError
from .._graph.dispatched import value_of
from .._graph.modules import submodule
from .branches import branches, factors_at
from .flat import in_shape
from .fsdp import settle
from .guard import check_each_in_its_place
from .places import places_of, tensor_at
from .reading import adapted_names, base_tensor
from .record import check_adapter, injection, is_cut, of_one_moment, trained_modules
from .shards import gathered
from .together import from_all, on_cpu
from .trained import Copies
from .zero import check_gathered


_TAKING = "taking it from its model"


def extract(model: nn.Module, adapter: str) -> Adapter:
    """An adapter apart from its model; its tensors share storage with the model's.

    They are gathered where they are spread over processes, or where the model is a stage of a
    pipeline, and each process must call this.
    """
    found = extract_here(model, adapter)
    if is_cut(model):
        found = _with_other_stages(found, _positions(model))
    lost = [site for site in found.config.targets if site not in found.pairs]
    if lost:
        raise AdapterError(_LOST.format(adapter, lost[0]))
    return found


@of_one_moment
def extract_here(model: nn.Module, adapter: str) -> Adapter:
    """`extract`, but of a stage of a pipeline only what is in this process."""
    check_adapter(model, adapter)
    check_gathered(model)
    check_each_in_its_place(model)
    settle(model)
    with in_shape(model, adapter):
        config = injection(model).configs[adapter]
        pairs: dict[str, Pair] = {}
        stored: dict[str, StoredWeight] = {}
        places = places_of(model)
        check_in_place(model, adapter)
        for site, branch in branches(model).items():
            factors, place = factors_at(branch, adapter), places.get(split_block(site)[0])
            if factors is not None and place is not None:
                live = factors.tensors()
                factors.check(live, None, _TAKING)
                A, B = (gathered(factor.detach()) for factor in live)
                pairs[site] = Pair(A, B, factors.scale)
                shape, start = tuple(tensor_at(place).shape), branch.rows[0] if branch.rows else 0
                stored[site] = StoredWeight(shape, branch.transposed, start)
        whole = trained_whole(model, adapter)
        trained = {name: gathered(_value(model, adapter, name)) for name in whole}
        buffers = frozenset(
            name for name, tensor in whole.items() if not isinstance(tensor, nn.Parameter))
    untied = injection(model).untied
    return Adapter(adapter, config, pairs, trained, stored, untied=untied, buffers=buffers,
                   alone=_rows(trained) if untied else frozenset())


def check_in_place(model: nn.Module, adapter: str) -> None:
    """Raise if something in whose place or beside which an adapter stands was replaced or resized.

    Of a stage of a pipeline that is not known.
    """
    record, held, places = injection(model), branches(model), places_of(model)
    if is_cut(model):
        return
    for site in record.configs[adapter].targets:
        if site not in held or factors_at(held[site], adapter) is None \
                or split_block(site)[0] not in places:
            raise AdapterError(_LOST.format(adapter, site))
    there: set[str] = set()
    for path, owner, trained in trained_modules(model):
        copies = trained.sets().get(adapter)
        for name, (holder, key) in {} if copies is None else copies.holders().items():
            attribute, block = split_block(name)
            if attribute not in adapted_names(owner):
                continue
            there.add(dotted(path, name))
            ours, base = tuple(holder.held(key).shape), base_tensor(owner, attribute)
            if base is None or not stands_for(ours, block, base.shape):
                raise AdapterError(
                    f"Adapter {adapter!r} trains '{dotted(path, name)}' {ours}, which in the model "
                    f"is {None if base is None else tuple(base.shape)} now, resized after "
                    "injection, as by resize_token_embeddings: do that before lorafx.inject.")
    for name in record.trained[adapter]:
        if name not in there:
            raise AdapterError(_LOST.format(adapter, name))


_LOST = ("Adapter {!r} is no longer at '{}', whose module or weight was replaced after injection, "
         "as by resize_token_embeddings with a head: do that before lorafx.inject.")


def _value(model: nn.Module, adapter: str, name: str) -> Tensor:
    """What an adapter trains in the place of a base tensor."""
    path, _, attribute = name.rpartition(".")
    own = submodule(model, dotted(path, f"trained.{adapter}"))
    assert isinstance(own, Copies)
    value = value_of(own, attribute, own.held(attribute).detach())
    own.check([value], None, _TAKING)
    return value


def _with_other_stages(here: Adapter, positions: Mapping[str, int]) -> Adapter:
    """An adapter of which processes have parts; what several have is the first one's."""
    targets: dict[str, None] = {}
    pairs: dict[str, Pair] = {}
    trained: dict[str, Tensor] = {}
    stored: dict[str, StoredWeight] = {}
    buffers: frozenset[str] = frozenset()
    own = here.config.targets, here.pairs, here.trained, here.stored, here.buffers
    for part in from_all(on_cpu(own)):
        targets |= dict.fromkeys(part[0])
        pairs, trained, stored = part[1] | pairs, part[2] | trained, part[3] | stored
        buffers |= part[4]

    def position(name: str) -> int:
        return positions.get(split_block(name)[0], len(positions))

    pairs = {name: pairs[name] for name in sorted(pairs, key=position)}
    trained = {name: trained[name] for name in sorted(trained, key=position)}
    config = dataclasses.replace(here.config, targets=sorted(targets, key=position))
    stored = {name: stored[name] for name in pairs}
    return dataclasses.replace(here, config=config, pairs=pairs, trained=trained, stored=stored,
                               buffers=buffers, alone=_rows(trained) if here.untied else here.alone)


def _rows(names: Iterable[str]) -> frozenset[str]:
    """Those names that are of rows."""
    return frozenset(name for name in names if split_block(name)[1])


def _positions(model: nn.Module) -> dict[str, int]:
    """The order of the base's modules and parameters at injection, all of them."""
    positions: dict[str, int] = {}
    for name in injection(model).requires_grad:
        for path in (name.rpartition(".")[0], name):
            positions.setdefault(path, len(positions))
    return positions


def trained_whole(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """{first name: tensor} of all that an adapter has in the place of the base's, each once."""
    found: dict[str, Tensor] = {}
    for path, _, trained in trained_modules(model):
        copies = trained.sets().get(adapter)
        if copies is not None:
            for name in (*copies._parameters, *copies._buffers):
                found[dotted(path, name)] = copies.held(name)
    return found
