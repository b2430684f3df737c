"""What Python reads of a weight beside which branches stand."""

import contextvars
import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._adapter.names import branch_name
from .._errors import UnsupportedModelError
from .._graph.dispatched import value_of
from .._kernels.addend import Addend
from .._kernels.compiling import Anew, is_compiling
from .._kernels.private import is_transforming
from .._kernels.weights import whole, with_rows
from .adapted_weight import NARROW, AdaptedWeight
from .branches import Branch
from .factors import refuse_gradients
from .quantised_tensors import dense
from .readers import Answer, answer as answer_to_reader
from .shards import check_spread, gathered_for_use, is_sharded
from .sums import TrainedCast
from .trained import Copies, Trained


FROZEN_PREFIX = "frozen_"
STANDING_PREFIX = "_lorafx_"
# The modules of which the user's `reset_parameters` is running: it writes into W.
RESETTING: contextvars.ContextVar[tuple[nn.Module, ...]] = contextvars.ContextVar(
    "resetting", default=())


def adapted_names(owner: nn.Module) -> tuple[str, ...]:
    """Return the attributes of which Python reads adapted tensors at this module."""
    names: tuple[str, ...] = getattr(type(owner), "_adapted", ())
    return names


def original_name(owner: nn.Module, attribute: str) -> str:
    """Return the name of the tensor that an attribute reads: `weight` for an adapted module's
    `frozen_weight`."""
    name = attribute.removeprefix(FROZEN_PREFIX)
    return name if name in adapted_names(owner) else attribute


def base_tensor(owner: nn.Module, attribute: str) -> Any:
    """Return what a module has under this name without adapters: W."""
    for table in (owner._parameters, owner._buffers, vars(owner)):
        if attribute in table:
            return table[attribute]
    cls = getattr(type(owner), "_user_class", type(owner))
    return getattr(cls, attribute).__get__(owner)  # a parametrization's property


def trained_beside(owner: nn.Module, attribute: str) -> list[tuple[Copies, str]]:
    """Return who holds what active adapters have in the place of a tensor or rows of it, and its
    name there."""
    trained = owner._modules.get("trained")
    return trained.holders(attribute) if isinstance(trained, Trained) else []


def base_or_trained(owner: nn.Module, attribute: str) -> Any:
    """Return W, or what active adapters that train it, or some rows, have in its place.

    That is in W's dtype, whatever it is trained in.
    """
    state = owner.__dict__  # as Module.__getattr__ reads it: compilers compare two ways to a dict
    held, trains = state["_parameters"].get(attribute), "trained" in state["_modules"]
    if held is not None and not trains:
        return held
    tensor = base_tensor(owner, attribute)
    if is_compiling() and trains:
        standing = getattr(owner, STANDING_PREFIX + attribute)
        if standing is not None and not standing:
            return tensor
        if standing is not None:
            whole, used, numbers, rows = standing
            whole = whole.to(tensor.dtype)
            whole = whole if used is None else torch.where(used, whole, tensor)
            return whole if rows is None else whole.index_copy(0, numbers, rows.to(tensor.dtype))
    for copies, name in () if tensor is None else trained_beside(owner, attribute):
        found, ranges = _trained_tensor(copies, name, tensor), copies.rows.get(name)
        tensor = found if ranges is None else _with_rows(tensor, ranges, found)
    return tensor  # None while another is registered


def _with_rows(base: Tensor, ranges: Sequence[range], rows: Tensor) -> Tensor:
    if is_sharded(base):
        raise UnsupportedModelError(
            "Rows of a weight are trained, and it is spread over processes: train all of it, or "
            "leave it whole in each process.")
    return with_rows(dense(base), ranges, rows)


def _trained_tensor(copies: Copies, name: str, base: Tensor) -> Tensor:
    """What an adapter holds under this name, as the base's tensor is for which it stands."""
    if copies.missing:
        copies.check([*copies.parameters(), *copies.buffers()], base, "computing with it")
    held = copies.held(name)
    tensor: Tensor = value_of(copies, name, held)
    if tensor is not held and name in copies._parameters:
        tensor = tensor.detach().requires_grad_(held.requires_grad)
        refuse_gradients(copies, name, tensor)
    copies.check_all_spread(name, base)
    if name in copies._buffers:
        return tensor
    if is_sharded(tensor) and not is_sharded(base):  # FSDP2 does not know it, and gathers W alone
        tensor = gathered_for_use(tensor)
    return tensor.to(base.dtype)


def branches_beside(owner: nn.Module, attribute: str) -> list[Branch]:
    """Return the branches beside one tensor of a module."""
    name = branch_name(attribute)
    return [module for key, module in owner._modules.items()
            if key.partition("[")[0] == name and isinstance(module, Branch)]


def followers(owner: nn.Module) -> set[nn.Module]:
    """Return what is spread over processes as soon as a module's own parameters are."""
    found: set[nn.Module] = set()
    for name in adapted_names(owner):
        if name in owner._parameters:
            found.update(branches_beside(owner, name))
    trained = owner._modules.get("trained")
    return found if trained is None else {*found, trained}


def adapted(owner: nn.Module, attribute: str) -> Tensor:
    """Return what Python reads of a module under this name: W + sum s B A, over the active adapters
    at its sites.

    It is an `AdaptedWeight`, or the sum itself where no subclass of Tensor can go: in functions
    that are being compiled, transformed or differentiated forward, and for readers that ask for it.
    A compiler cannot see who reads.
    """
    compiling = torch.compiler.is_compiling()
    answer = Answer.ADAPTED
    if not compiling:
        answer = answer_to_reader()
        if answer in (Answer.PARAMETER, Answer.LAYER) or owner in RESETTING.get():
            return base_tensor(owner, attribute)  # type: ignore[no-any-return]
    matrix = base_or_trained(owner, attribute)
    # there is no W while another is registered, and factors may have no memory then
    beside = [] if matrix is None else branches_beside(owner, attribute)
    addends: list[Addend] = []
    traced = torch.compiler.is_dynamo_compiling()
    narrow = beside and matrix.dtype in NARROW
    for branch in () if traced and narrow else beside:
        addends += branch.addends(matrix, stored=True)
    if traced and (narrow or any([addend.is_apart for addend in addends])):
        # the compiler cannot make the tensor: its graph ends here
        return _OUTSIDE.adapted(owner, attribute)  # type: ignore[no-any-return]
    if not addends:
        watched = answer is Answer.ADAPTED and not compiling and not is_transforming()
        return _unwritable(owner, attribute, matrix) if watched else matrix  # type: ignore
    if not compiling:
        check_spread(matrix, [factor for addend in addends for factor in addend[:2]])
    if matrix.dtype not in NARROW and not any(addend.dropout for addend in addends):
        plain = compiling or is_transforming()
        if plain or answer is Answer.SUM and not _trains(addends):
            return whole(dense(matrix), addends)
    return AdaptedWeight.of(matrix, addends, f"the {attribute} of a {type(owner).__name__}")


class _Outside:
    """`adapted` that no compiler traces, which a compiler can take, and say why it ends there."""

    @functools.cached_property
    def _adapted(self) -> Any:
        return torch.compiler.disable(  # type: ignore[no-untyped-call]
            adapted, reason=_WHY_OUTSIDE)

    adapted: Any = property(Anew(operator.attrgetter("_adapted")).__getitem__)


_OUTSIDE = _Outside()
_WHY_OUTSIDE = (
    "Python reads an adapted weight of a narrow dtype, for lorafx.rows, or with dropout, where a "
    "program cannot go on: compile without fullgraph=True, export with strict=False, or exclude "
    "this site.")


def _unwritable(owner: nn.Module, attribute: str, tensor: Any) -> Any:
    """The same tensor; what is made anew for each reader lets nobody write into it."""
    holders = trained_beside(owner, attribute) if type(tensor) is Tensor else []
    if not holders or any(copies.held(name) is tensor for copies, name in holders):
        return tensor
    return tensor.as_subclass(TrainedCast)


def _trains(addends: Sequence[Addend]) -> bool:
    """True if a gradient is to go through the addends."""
    return torch.is_grad_enabled() and any(addend.requires_grad for addend in addends)
