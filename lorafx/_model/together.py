"""Processes that hold one model together: what the first of them does for all."""

import pickle
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from .._errors import LorafxError
from .._graph.loaded import loaded
from .._graph.modules import unwrapped
from .._kernels.private import tree_map
from .record import find_injection, is_cut
from .shards import is_sharded


T = TypeVar("T")

# (module, class, attribute): a wrapper that spreads tensors over the processes of this group.
# A class is looked up only where its module is loaded, so that nothing is imported for it.
SPREADERS = (
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel",
     "process_group"),
)


def first_of_all(model: nn.Module, action: Callable[[], None]) -> None:
    """Do something in the first of the processes that hold a model together.

    Each of them must call this; it returns, or raises, in all as it does in the first. A model that
    one process holds whole, as DDP's do, is nobody else's business.
    """
    groups = groups_of(model)
    error: Exception | None = None
    if all(rank == 0 for _, rank in groups):
        try:
            action()
        except Exception as raised:
            error = raised
    for group, rank in groups:
        error = _from_first(group, error if rank == 0 else None)
    if error is not None:
        raise error


def groups_of(model: nn.Module) -> list[tuple[Any, int]]:
    """(process group, this process's rank in it) of those that hold a model together.

    One for each dimension of the largest mesh that its tensors are spread over; none for a model
    that is whole here. Of a pipeline's stage, all processes.
    """
    if find_injection(model) is not None and is_cut(model):
        world = _world()
        return [] if world is None else [(world, world.rank())]
    for where, name, attribute in SPREADERS:
        cls = loaded(where, name)
        for module in model.modules():
            if cls is not None and isinstance(module, cls):
                group = getattr(module, attribute)
                return [(group, group.rank())]
    meshes = [tensor.device_mesh for tensor in unwrapped(model).parameters()  # type: ignore
              if is_sharded(tensor)]
    if not meshes:
        return []
    mesh = max(meshes, key=lambda mesh: mesh.size())
    return [(mesh.get_group(axis), mesh.get_local_rank(axis)) for axis in range(mesh.ndim)]


def from_all(own: T, group: Any = None) -> list[T]:
    """What each process of a group, or of all, has there, in their order."""
    group = group or _world()
    if group is None:
        return [own]
    from torch import distributed

    found: list[Any] = [None] * group.size()
    distributed.all_gather_object(found, own, group=group)
    return found


def _world() -> Any:
    """The group of all processes; None where there is none."""
    module: Any = sys.modules.get("torch.distributed")
    if module is None or not module.is_available() or not module.is_initialized():
        return None
    return module.group.WORLD


def on_cpu(tree: Any) -> Any:
    """The same, with tensors that another process can hold: on the CPU, apart from autograd."""
    return tree_map(
        lambda leaf: leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf, tree)


def _from_first(group: Any, error: Exception | None) -> Exception | None:
    """The error of a group's first process, in all of them."""
    from torch import distributed

    sent = [None if error is None else _picklable(error)]
    distributed.broadcast_object_list(sent, group=group, group_src=0)
    return sent[0] if error is None else error


def _picklable(error: Exception) -> Exception:
    """The error as another process can raise it, of the same class where that is possible."""
    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    except Exception:  # whatever a class's own pickling raises
        pass
    return LorafxError(f"{type(error).__name__} in the first process: {error}")
