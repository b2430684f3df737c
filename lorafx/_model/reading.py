"""What Python reads of a weight beside which branches stand."""

import contextvars
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._adapter.names import branch_name
from .._graph.dispatched import value_of
from .._kernels.addend import Addend
from .._kernels.private import is_transforming
from .._kernels.weights import whole
from .adapted_weight import NARROW, AdaptedWeight
from .branches import Branch, Copies, Trained, refuse_gradients
from .quantised_tensors import dense
from .readers import Answer, answer as answer_to_reader
from .shards import check_all_spread, check_spread, gathered_for_use, is_sharded


FROZEN_PREFIX = "frozen_"
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


def base_or_trained(owner: nn.Module, attribute: str) -> Any:
    """Return W, or what an active adapter that trains the module whole has in its place."""
    trained = owner._modules.get("trained")
    held = owner._parameters.get(attribute)
    if trained is None and held is not None:
        return held
    if isinstance(trained, Trained) and trained.used is not None:
        copies: Copies = trained._modules[trained.used]  # type: ignore[assignment]
        if attribute in copies._parameters:
            return _trained_tensor(owner, attribute, copies)
    return base_tensor(owner, attribute)


def _as_base_is(tensor: Any, base: Tensor) -> Any:
    """A trained tensor; gathered where nobody but FSDP2, which does not know it, gathers W."""
    if is_sharded(tensor) and not is_sharded(base):
        return gathered_for_use(tensor).to(base.dtype)
    return tensor


def _trained_tensor(owner: nn.Module, attribute: str, copies: Copies) -> Any:
    """What an adapter that trains a module whole has in the place of one of its tensors."""
    base, held = base_tensor(owner, attribute), copies._parameters[attribute]
    if copies.missing:
        copies.check([*copies.parameters()], base, "computing with it")
    assert held is not None
    found = value_of(copies, attribute, held)
    if found is not held:
        found = found.detach().requires_grad_(held.requires_grad)
        refuse_gradients(copies, attribute, found)
    check_all_spread(found)
    return _as_base_is(found, base)


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
    addends: list[Addend] = []
    # there is no W while another is registered, and factors may have no memory then
    for branch in () if matrix is None else branches_beside(owner, attribute):
        addends += branch.addends(matrix, stored=True)
    if not addends:
        return matrix  # type: ignore[no-any-return]
    if not compiling:
        check_spread(matrix, [factor for addend in addends for factor in addend[:2]])
    if matrix.dtype not in NARROW and not any(addend.dropout for addend in addends):
        plain = compiling or is_transforming()
        if plain or answer is Answer.SUM and not _trains(addends):
            return whole(dense(matrix), addends)
    make = AdaptedWeight.of
    if compiling:  # the compiler cannot make the tensor: its graph ends here
        make = torch.compiler.disable(  # type: ignore[no-untyped-call]
            make, reason="Python reads an adapted weight of a narrow dtype, or with dropout")
    return make(matrix, addends, f"the {attribute} of a {type(owner).__name__}")


def _trains(addends: Sequence[Addend]) -> bool:
    """True if a gradient is to go through the addends."""
    return torch.is_grad_enabled() and any(addend.requires_grad for addend in addends)
