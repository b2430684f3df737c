"""Set-ups of FSDP2 (fully_shard)."""

from typing import Any

from torch.distributed.fsdp import fully_shard

import lorafx
from tests.support.sharded import adapted, largest_difference, one_process, train
from tests.support.torchrun import setup


def shard(model: Any, **policy: Any) -> Any:
    """Each layer, then the root, as everybody does it."""
    for layer in model.layers:
        fully_shard(layer, **policy)
    return fully_shard(model, **policy)


@setup
def each_layer_then_the_root() -> float:
    alone = one_process(adapted())
    model = shard(adapted())
    found = largest_difference(train(model, lorafx.parameters(model)), alone)
    assert found < 1e-5
    return found
