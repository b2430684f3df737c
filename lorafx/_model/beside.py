"""Puts branches beside weights, and into the graphs that use them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from torch import nn

from .._adapter.config import LoRAConfig, factor_dtype
from .._adapter.names import branch_name, dotted, split_block
from .._graph.modules import Place, submodule
from .._graph.sites import Site
from .branches import Branch, zeros
from .choice import Choice
from .insert import Insertion, insert_branches
from .layer_calls import adapt_layer
from .program import Program
from .quantised import is_packed
from .record import injection
from .regions import adapt_attribute, is_plain_graph


def put_branches(program: Program, sites: Sequence[Site], config: LoRAConfig) -> bool:
    """Put branches at those of these sites that have none, and into the graphs; True if any is new.
    """
    new = [site for site in sites if not has_branch(program, site)]
    if not new:
        return False
    model, record = program.model, injection(program.model)
    insertions: dict[str, list[Insertion]] = defaultdict(list)
    guesses = _small_numbers(model) if record.recompute else None
    for site in new:
        block = split_block(site.name)[1]
        for call in site.calls:
            path = dotted(call.owner, branch_name(call.attribute, block))
            reverse = call.transposed != site.transposed
            insertions[call.region].append(Insertion(call, path, reverse))
        branch = _new_branch(program.places, site, guesses, record.choice)
        dtype = factor_dtype(config, program.weight(site))
        branch.like = zeros(site, 0, dtype, program.home(site, has_values=False))
    for region, inserted in insertions.items():
        insert_branches(submodule(model, region), program.graphs[region], inserted, record.group)
    return True


def has_branch(program: Program, site: Site) -> bool:
    """True if there is a branch at a site."""
    name, block = split_block(site.name)
    owner, attribute = program.places[name]
    return branch_name(attribute, block) in owner._modules


def branch_at(program: Program, site: Site) -> Branch:
    """The branch at a site that has one."""
    name, block = split_block(site.name)
    owner, attribute = program.places[name]
    branch = owner._modules[branch_name(attribute, block)]
    assert isinstance(branch, Branch)
    return branch


def _new_branch(
    places: Mapping[str, Place], site: Site, guesses: set[float] | None, choice: Choice
) -> Branch:
    """A branch at a site, registered under all of its names with the owners of its weight."""
    name, block = split_block(site.name)
    first = places[name].module
    branch = Branch(choice, site.transposed, site.rows, guesses).train(first.training)
    in_graph_module = any(call.node.op == "call_module" for call in site.calls)
    for name in site.names:
        owner, attribute = places[split_block(name)[0]]
        owner._modules[branch_name(attribute, block)] = branch
        if is_packed(owner):
            adapt_layer(owner)
        elif not in_graph_module and not is_plain_graph(owner):
            adapt_attribute(owner, attribute)
    return branch


def _small_numbers(model: nn.Module) -> set[float]:
    """What may be the eps of a norm: small numbers that modules hold."""
    found = set()
    for module in model.modules():
        found |= {value for value in vars(module).values() if type(value) is float}
    return {value for value in found if 0 < value <= 1e-2}
