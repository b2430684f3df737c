"""What can be told of the sites of a live model: where they are computed, with what, how large."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from .._adapter.names import dotted, split_block
from .._adapter.spectrum import over
from .._graph.dispatched import value_of
from .._graph.modules import Place, named_modules, submodule
from .._kernels.addend import Addend, norm
from .._kernels.tensors import PLAIN
from .branches import Branch, branches, factors_at
from .lower import joined, lower
from .places import tensor_at
from .program import Program
from .quantised import is_packed, weight_and_bias
from .quantised_tensors import dense
from .regions import Region
from .shards import is_sharded


class Surroundings(NamedTuple):
    """Where a site is computed: in straight-line code, or from the Python of a graph break.

    `path` is the largest module around it that has a graph, or the innermost break around a layer
    that has no other.
    """

    is_break: bool
    path: str


def surroundings(program: Program, name: str) -> Surroundings:
    """Return where the site of this name is computed."""
    modules, breaks = program.modules, program.breaks
    owner, site = split_block(name)[0], program.site(name)
    path = site.calls[0].region if site is not None and site.calls else owner
    while path not in modules:  # the name of a tensor
        path = path.rpartition(".")[0]
    around = [path, *_above(path)]
    region: str | None = None
    for inside in around:
        if inside not in program.graphs:
            break
        region = inside
    above = [path for path in around if path in breaks]
    if above and region in (None, owner):
        return Surroundings(True, above[0])
    return Surroundings(region is None, region or "")


def _above(path: str) -> list[str]:
    """The paths above one, the innermost first."""
    found = []
    while path:
        path = path.rpartition(".")[0]
        found.append(path)
    return found


def joined_sites(model: nn.Module) -> list[tuple[str, ...]]:
    """Return the groups of sites that regions compute together, as the model stands."""
    names = {branch: name for name, branch in branches(model).items() if branch.any_factors()}
    found: dict[tuple[str, ...], None] = {}
    for _, module in named_modules(model):
        if isinstance(module, Region):
            for members in joined_in(module):
                sites = []
                for member in members:
                    sites += [names[branch] for branch in member if branch in names]
                if len(sites) > 1:
                    found[tuple(sites)] = None
    return list(found)


def joined_in(region: Region) -> list[list[list[Branch]]]:
    """Return the groups of linear calls that a region computes together, by their branches.

    Calls that have none, which others are joined around, are left out.
    """
    groups = []
    for node in lower(region, region.graph, vars(region)["_joining"]).nodes:
        if node.target is joined:
            members = [_branches_of(region, member) for member in node.args[1:]]
            groups.append([held for held in members if held])
    return groups


def _branches_of(region: nn.Module, member: fx.Node | Sequence[fx.Node | None]) -> list[Branch]:
    """The branches of a member of `joined`: a module, or (W, b, branches)."""
    if isinstance(member, fx.Node):
        children = submodule(region, str(member.target))._modules.values()
        return [child for child in children if isinstance(child, Branch)]
    found = []
    for operand in member[2:]:
        branch = submodule(region, str(operand and operand.target))
        assert isinstance(branch, Branch)
        found.append(branch)
    return found


@torch.no_grad()
def relative_norm(branch: Branch, place: Place | None, active: Mapping[str, float]) -> float | None:
    """Return |sum w s B A| / |W|, Frobenius norms, of what the active adapters add to W at a place.

    None where W, A or B have no values here, or are spread over processes: nothing is gathered.
    """
    addends = []
    for name, weight in active.items():
        factors = factors_at(branch, name)
        if factors is None:
            continue
        if factors.missing or not _has_values(factors.A) or not _has_values(factors.B):
            return None
        A, B = factors.tensors()
        addends.append(Addend(B, A, weight * factors.scale))
    if place is None:
        return None
    W = _weight(place)
    if W is None:
        return None
    if branch.rows is not None:
        W = W.narrow(-1 if branch.transposed else -2, *branch.rows)
    return over(norm(addends) if addends else 0.0, _norm(W))


def _weight(place: Place) -> Tensor | None:
    """W as the model stores it, dequantised; None if it has no values here."""
    module, attribute = place
    if is_packed(module):
        return weight_and_bias(module)[0]
    tensor = tensor_at(place)
    if not isinstance(tensor, Tensor) or is_sharded(tensor):
        return None
    value = dense(value_of(module, attribute, tensor.detach()))
    return value if _has_values(value) else None


def _has_values(tensor: Tensor) -> bool:
    """True for a plain tensor in memory: what FSDP1 has cut stands there expanded from nothing."""
    if type(tensor) not in PLAIN or tensor.is_meta:
        return False
    return tensor.nbytes <= tensor.untyped_storage().nbytes()


def _norm(matrix: Tensor) -> float:
    """The Frobenius norm, by rows, so that float32 is wide enough for any number of them."""
    wide = torch.promote_types(matrix.dtype, torch.float32)
    rows = torch.linalg.vector_norm(matrix, dim=-1, dtype=wide)
    return float(torch.linalg.vector_norm(rows.double()))


def relative_name(name: str, beside: str) -> str:
    """Return a site's name as it is seen from another: without the path that both share."""
    owner = beside.rpartition(".")[0]
    return name.removeprefix(dotted(owner, "")) if owner else name
