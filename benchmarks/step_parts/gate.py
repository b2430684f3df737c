"""Whether a contender computes what it should: outputs and gradients against float64, untimed.

The reference knows nothing of branches: it is the base in float64 with W + s B A in the place of
each weight W, and autograd's chain rule through that sum. (Where a model's own code computes in
float32, so does the reference.)
"""

import copy
import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from common.contenders import Adapters, Contender
from common.models import loss_of

# The largest relative error of a tensor, |found - true| / |true|. bfloat16's roundings add up over
# the layers.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1}


@dataclasses.dataclass(frozen=True)
class Errors:
    """Relative errors: of the outputs, of dX at the first layer, the largest of dA and of dB."""

    output: float
    dx: float
    da: float | None
    db: float | None


@dataclasses.dataclass(frozen=True)
class Result:
    """Of one step: logits, dX, and {layer: dA} and {layer: dB}."""

    output: Tensor
    dx: Tensor
    da: Mapping[str, Tensor]
    db: Mapping[str, Tensor]


def reference(base: nn.Module, adapters: Adapters | None, x: Tensor, labels: Tensor) -> Result:
    """What a step must give, in float64; of the base alone without adapters."""
    wide = copy.deepcopy(base).double()
    x = x.detach().double().requires_grad_()
    tensors = dict(wide.named_parameters())
    leaves, sums = [x], {}
    if adapters is not None:
        for name, pair in adapters.values.items():
            A, B = (tensor.detach().double().requires_grad_() for tensor in pair)
            sums[f"{name}.weight"] = tensors[f"{name}.weight"] + adapters.scale * (B @ A)
            leaves += [A, B]
    output = functional_call(wide, sums, (x,))
    dx, *rest = torch.autograd.grad(loss_of(output, labels), leaves)
    names = () if adapters is None else tuple(adapters.values)
    return Result(output.detach(), dx, dict(zip(names, rest[::2])), dict(zip(names, rest[1::2])))


def clear(contender: Contender, x: Tensor) -> None:
    """Forget the gradients of the step before."""
    x.grad = None
    for parameter in contender.parameters:
        parameter.grad = None


def step(contender: Contender, x: Tensor, labels: Tensor) -> Tensor:
    """Forward, loss and backward; the logits. The rest of a training step is the same for all."""
    output: Tensor = contender.model(x)
    loss_of(output, labels).backward()
    return output


def gradient(tensor: Tensor) -> Tensor:
    """A tensor's gradient; one that is missing is not a number."""
    return torch.full_like(tensor, float("nan")) if tensor.grad is None else tensor.grad


def result(contender: Contender, x: Tensor, output: Tensor) -> Result:
    """The outputs and gradients that a step left."""
    da, db = {}, {}
    for name, (A, B) in contender.pairs.items():
        da[name], db[name] = gradient(A), gradient(B)
    return Result(output.detach(), gradient(x), da, db)


def distance(found: Tensor, true: Tensor) -> float:
    """|found - true| / |true| in float64, by the Euclidean norm."""
    return float((found.double() - true).norm() / true.norm())


def errors(found: Result, true: Result) -> Errors:
    """The errors of what was found; of A and of B that of the worst layer."""
    da = [distance(found.da[name], true.da[name]) for name in true.da]
    db = [distance(found.db[name], true.db[name]) for name in true.db]
    return Errors(distance(found.output, true.output), distance(found.dx, true.dx),
                  largest(da), largest(db))


def largest(values: list[float]) -> float | None:
    """The largest, not a number if one is not; None of none."""
    return max(values, key=lambda value: (value != value, value), default=None)


NAMES = {"output": "output", "dx": "gradient of x", "da": "gradient of an A",
         "db": "gradient of a B"}


def verdict(found: Errors, dtype: torch.dtype) -> str:
    """Why the contender's row is void, or nothing. An error that is not a number is too large."""
    limit = TOLERANCE[dtype]
    for name, value in vars(found).items():
        if value is not None and not value <= limit:
            return f"its {NAMES[name]} has a relative error of {value:.1e}, above {limit:g}"
    return ""
