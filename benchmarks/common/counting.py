"""Exact counts of what a call does: operators, bytes saved for backward, bytes held at its peak."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

# Operators that compute nothing: allocation, and one view that its schema does not call a view.
_FREE = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty",
         "new_empty_strided", "_unsafe_view"}


class Operators(TorchDispatchMode):
    """Counts the operators that compute: not views, questions about a tensor, or allocation."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        gives_tensors = any("Tensor" in str(value.type) for value in func._schema.returns)
        if gives_tensors and not func.is_view and name not in _FREE:
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        """All that were counted."""
        return sum(self.counts.values())


@contextmanager
def saved(model: nn.Module) -> Iterator[dict[int, int]]:
    """{address: bytes} of each distinct storage that autograd saves inside, but the model's own.

    Exact as long as what is saved lives on until the context ends: then no address is used twice.
    Weights that FSDP gathered and let go of again do not count; the dict is filled at the end.
    """
    tensors = (*model.parameters(), *model.buffers())
    own = {local(tensor).untyped_storage().data_ptr() for tensor in tensors}
    sizes: dict[int, int] = {}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = local(tensor).untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes
    sizes.update({address: storage.nbytes() for address, storage in storages.items()})


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Held(NamedTuple):
    """Bytes that torch's allocator holds beyond those that it held before a call."""

    after: int  # the call, as long as its result lives
    most: int  # at one time during the call


def held_bytes(call: Callable[[], Any], device: torch.device) -> Held:
    """What is held for a call, whoever holds it: a graph of autograd, a closure, the result.

    Exact for tensors, from the allocator's own events; what a library (oneDNN, MKL) allocates by
    itself is not seen.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        after, most = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        del result
        return Held(after - before, most - before)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        result = call()
    events = list(profiler.profiler.kineto_results.experimental_event_tree())
    allocations = []  # (time, bytes, negative where they are freed)
    while events:
        event = events.pop()
        events += event.children
        if event.typed[0] == torch._C._profiler._EventType.Allocation:
            allocations.append((event.start_time_ns, event.typed[1].alloc_size))
    held = most = 0
    for _, count in sorted(allocations, key=lambda allocation: allocation[0]):
        held += count
        most = max(most, held)
    del result
    return Held(held, most)
