"""Linear calls on an x that can be computed again, and whether autograd keeps it."""

import torch
import torch.nn.functional as F

from lorafx._kernels.again import Proven
from lorafx._kernels.linears import linears
from tests.support.linear_calls import calls_of, factors

WIDTH = 16


def site(seed=0, dtype=torch.float32):
    """A call that may compute x again, and the same one, on the same tensors, that keeps it."""
    torch.manual_seed(seed)
    [call] = calls_of(WIDTH, (WIDTH,), dtype)
    [addend] = call.addends
    return call._replace(addends=[addend._replace(proven=Proven())]), call


def leaf(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (4, WIDTH)), generator=generator).to(dtype).requires_grad_()


def produced(z):
    """An x whose producer keeps what is before it."""
    return F.silu(z * 1)


def keeps_x(y):
    """True if the node that computed y, or its half, keeps x itself; of y, or of its node."""
    nodes, raws = [y.grad_fn if isinstance(y, torch.Tensor) else y], []
    while nodes:
        node = nodes.pop()
        if type(node).__name__ == "_LinearsBackward":
            raws.append(node._raw_saved_tensors[0])
        elif type(node).__name__ == "MmBackward0":
            raws.append(node._raw_saved_self)
        else:
            nodes += [below for below, _ in node.next_functions if below is not None]
    assert raws
    return all(raw.unpack_hook is None for raw in raws)


def gradients(call, z, make=produced, run=None, backward=None):
    """z's gradient and those of the factors, and whether x was kept."""
    def function(z):
        return linears(make(z), [call])[0]

    y, inputs = function(z) if run is None else run(function, z), [z, *factors([call])]
    found = torch.autograd.grad(y.sin().sum(), inputs) if backward is None else backward(y, inputs)
    return list(found)


def check_same(got, wanted):
    assert len(got) == len(wanted)
    for mine, theirs in zip(got, wanted):
        assert torch.equal(mine, theirs)
