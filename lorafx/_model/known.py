"""What an injected model is known to be: to read it anew takes most of the time of a `load`."""

import contextlib
import dataclasses

from torch import nn

from .._adapter.adapter import Adapter
from .._adapter.names import split_block
from .._errors import MismatchError
from .beside import has_branch
from .fit import fit
from .fsdp import settle
from .places import tensor_at
from .program import Program, read_program
from .record import KnownSite, find_injection
from .regions import is_plain_graph


def known_sites(program: Program) -> list[KnownSite]:
    """The sites of a program, without the graphs in which they are called."""
    found: list[KnownSite] = []
    for site in program.sites:
        weight = program.weight(site)
        bare = dataclasses.replace(site, calls=())
        found.append(KnownSite(bare, weight.shape, type(weight)))
    return found


def read_and_fit(
    model: nn.Module, adapter: Adapter, source: str, made_for: str | None
) -> tuple[Program, Adapter]:
    """A model as a program, and an adapter from a file as it fits that: see `fit`.

    The model is read anew but where the adapter comes to branches that stand there already.
    """
    record = find_injection(model)
    if record is not None and not adapter.trained and not is_plain_graph(model):
        settle(model)
        program = _known_program(model, record.known)
        with contextlib.suppress(MismatchError):  # all that the model is now tells why
            fitted = fit(program, adapter, source, made_for)
            sites = [program.site(name) for name in fitted.pairs]
            if all(site is not None and has_branch(program, site) for site in sites):
                return program, fitted
    program = read_program(model)
    return program, fit(program, adapter, source, made_for)


def _known_program(model: nn.Module, known: list[KnownSite]) -> Program:
    """The sites that a model had and has, by the same names, of the same shape and class."""
    program = Program(model, {}, [], {}, {})
    for site, shape, kind in known:
        first, *others = [program.places.get(split_block(name)[0]) for name in site.names]
        if first is None:
            continue
        weight = program.weight(site)
        if type(weight) is kind and weight.shape == shape:
            if all(other is not None and tensor_at(other) is weight for other in others):
                program.sites.append(site)
    return program
