"""Models that call linear layers in every way, with their sites counted by hand."""

import contextlib
import dataclasses
import enum

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.zoo.rows import X, drawn, row


class Two(nn.Module):
    """Two layers, of which most rows make use."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)


@row(2)
class Mode(Two):
    def forward(self, x):
        x = F.dropout(self.up(x), 0.3, self.training)
        return self.down(x) if self.training else self.down(x) * 2


@row(3)
class DropoutInAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return F.scaled_dot_product_attention(
            self.q(x), self.k(x), self.v(x), dropout_p=0.2 if self.training else 0.0
        )


@row(2, (X,), (X, drawn(2, 5, 12)), {"x": X, "bias": None})
class OptionalInput(Two):
    def forward(self, x, bias=None):
        x = self.up(x)
        return self.down(x if bias is None else x + bias)


class Kind(enum.Enum):
    PLAIN = 1
    SQUARED = 2


@row(2, (X, 2, True, "mean", Kind.PLAIN), (X, 3, False, "sum", Kind.SQUARED))
class PythonInputs(Two):
    def forward(self, x, times, negate, reduction, kind):
        for _ in range(times):
            x = self.down(self.up(x))
        x = x**2 if kind is Kind.SQUARED else x
        return getattr(x * (-1 if negate else 1), reduction)(-1)


@row(2, (X, X), {"x": X, "scale": 2.0})
class AnyArguments(Two):
    def forward(self, *args, **kwargs):
        x = kwargs.get("x", sum(args))
        return self.down(self.up(x)) * kwargs.get("scale", 1.0)


@row(2, (X,), ([X, X],), (X.tolist(),))
class TypeOfInput(Two):
    def forward(self, x):
        if isinstance(x, list):
            x = x[0] if hasattr(x[0], "dtype") else torch.tensor(x, dtype=self.up.weight.dtype)
        return self.down(self.up(x))


@row(2, (X,), (X[0],), (X[0, 0],), (drawn(0, 8),), (X.mT.contiguous().mT,), (X[:, ::2],))
class ShapeOfInput(Two):
    def forward(self, x):
        if x.ndim == 3 and x.shape[0] > 1:
            x = x + x.mean(1, keepdim=True)
        *lead, _ = x.shape
        return self.down(self.up(x)).reshape(*lead, 2, 4)


@row(3)
class Cache(nn.Module):
    """Prefill of four tokens, then one token that sees them all."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8, bias=False) for _ in range(3))

    def step(self, x, past):
        keys, values = self.k(x), self.v(x)
        if past:
            keys, values = torch.cat([past[-1][0], keys], 1), torch.cat([past[-1][1], values], 1)
        past.append((keys, values))
        return F.scaled_dot_product_attention(self.q(x), keys, values)

    def forward(self, x):
        past = []
        return self.step(x[:, :4], past), self.step(x[:, 4:], past)


@row(2)
class State(Two):
    def forward(self, x):
        self.count = getattr(self, "count", 0) + 1
        self.aux_loss = self.up(x).square().mean()
        return self.down(self.up(x)), self.aux_loss


@dataclasses.dataclass
class Output:
    last: Tensor
    nothing: None = None
    all: tuple[Tensor, ...] = ()


@row(2, (X, "dict"), (X, "dataclass"), (X, "tuple"), (X, "none"))
class Outputs(Two):
    def forward(self, x, kind):
        h = self.up(x)
        y = self.down(h)
        made = {
            "dict": {"y": y, "h": h},
            "dataclass": Output(y, all=(h, y)),
            "tuple": (y, None, (h,)),
            "none": None,
        }
        return made[kind]


@row(2)
class InPlace(Two):
    def forward(self, x):
        x = x.clone()
        h = self.up(x)
        h += 1
        h.mul_(2).relu_()
        if not torch.is_grad_enabled():  # else the layer may need its input again
            x.add_(1)
        y = self.down(h)
        y[..., 0] = 0
        y += x
        return y


@row(2)
class Blocks(Two):
    """no_grad, autocast and try blocks inside of forward."""

    def forward(self, x):
        with torch.no_grad():
            gate = self.up(x).sigmoid()
        with torch.autocast("cpu", enabled=False):
            h = self.up(x) * gate
        try:
            h = h @ torch.ones(3, dtype=x.dtype)
        except RuntimeError:
            h = self.down(h)
        with contextlib.suppress(ValueError):
            return h + self.down.bias


@row(2)
class Checkpointed(Two):
    def both(self, x):
        return self.down(F.dropout(self.up(x), 0.2, self.training))

    def forward(self, x):
        x = checkpoint(self.both, x, use_reentrant=False)
        return checkpoint(self.both, x.requires_grad_() if x.is_leaf else x, use_reentrant=True)


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


@row(2)
class GradientReversal(Two):
    def forward(self, x):
        return self.down(Reversal.apply(self.up(x)))


@row(2)
class GradientInside(Two):
    """A gradient penalty: double backward."""

    def forward(self, x):
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(
                self.down(self.up(x).tanh()).sum(), x, create_graph=True
            )
        return gradient


@row(2)
class Transforms(Two):
    """torch.func inside of forward."""

    def one(self, x):
        return self.down(self.up(x).tanh()).sum()

    def forward(self, x):
        x = x.flatten(0, 1)
        return (torch.func.vmap(torch.func.grad(self.one))(x), torch.func.jvp(self.one, (x,), (x,)),
                torch.func.vmap(self.up)(x))


@row(2)
class Recursive(Two):
    def forward(self, x, depth=3):
        return x if depth == 0 else self.forward(self.down(self.up(x)).tanh(), depth - 1)


@row(1)
class SeveralCalls(nn.Module):
    """One layer under two names, called by both, functionally, and transposed."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.again = self.layer

    def forward(self, x):
        for layer in (self.layer, self.again):
            x = layer(x)
        return F.linear(x, self.layer.weight) + x @ self.again.weight


@row(2)
class Questions(Two):
    def forward(self, x):
        if x.dtype in (torch.float32, torch.float64) and x.device.type == "cpu" and x is not None:
            x = x.to(self.up.weight.dtype)
        if isinstance(self.down.weight, nn.Parameter) and self.down.weight.shape[0] == 8:
            return self.down(self.up(x))
        return x


@row(1)
class TiedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 8), nn.Linear(8, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.embedding(torch.arange(5)) + x)


@row(5)
class Functional(nn.Module):
    """Parameters as weights in both orientations, in straight-line code."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(6, 8))
        self.c, self.d = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))
        self.e, self.bias = nn.Parameter(torch.randn(3, 8)), nn.Parameter(torch.randn(8))

    def forward(self, x):
        x = F.linear(x, self.a) @ self.b
        x = torch.addmm(self.bias, x.flatten(0, 1), self.c).view_as(x)
        return torch.matmul(x, self.d.T) * 2 + (self.e @ x.mT).sum(-2, keepdim=True).mT


@row(5)
class FunctionalInPython(Functional):
    """The same in a graph break."""

    def forward(self, x):
        return super().forward(x) if self.training or x.ndim else x


@row(1)
class Masked(nn.Linear):
    """A linear layer with a forward of its own."""

    def __init__(self):
        super().__init__(8, 6)
        self.register_buffer("mask", torch.rand(6, 8) > 0.5)

    def forward(self, x):
        return F.linear(x, self.weight * self.mask, self.bias) * 2


@row(1)
class Standardised(nn.Linear):
    """Another, in a graph break."""

    def __init__(self):
        super().__init__(8, 6)

    def forward(self, x):
        weight = self.weight
        if x.ndim > 1:
            weight = (weight - weight.mean(1, keepdim=True)) / weight.std(1, keepdim=True)
        return F.linear(x, weight, self.bias)


@row(2)
class FunctionalAttention(nn.Module):
    """One weight of three blocks, split in the graph: one site, unless blocks are asked for."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out(F.scaled_dot_product_attention(q, k, v))


@row(4)
class FunctionalMultihead(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.out = nn.Parameter(torch.randn(24, 8) / 3), nn.Linear(8, 8)

    def forward(self, x):
        return F.multi_head_attention_forward(
            x, x, x, 8, 2, self.w, None, None, None, False, 0.0, self.out.weight, self.out.bias,
            training=self.training
        )[0]


@row(1 + 4 * 2)
class RoutedExperts(nn.Module):
    """A list of experts; which of them sees a token depends on the token."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(8, 4)
        self.experts = nn.ModuleList(
            [nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8)) for _ in range(4)]
        )

    def forward(self, x):
        tokens = x.flatten(0, 1)
        weights, chosen = self.router(tokens).softmax(-1).topk(3)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            at, slot = (chosen == number).nonzero(as_tuple=True)
            out = out.index_add(0, at, expert(tokens[at]) * weights[at, slot, None])
        return out


@row(1 + 3)
class StackedExperts(nn.Module):
    """Three stacks of experts' weights: used one by one, all at once, and in groups."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(8, 4)
        self.one, self.all = nn.Parameter(torch.randn(4, 8, 8) / 3), nn.Parameter(
            torch.randn(4, 8, 8) / 3
        )
        self.chosen = nn.Parameter(torch.randn(4, 6, 8) / 3)

    def forward(self, x):
        tokens = x.flatten(0, 1)
        gate = self.router(tokens).softmax(-1)
        first = [F.linear(tokens, self.one[e]) * gate[:, e, None] for e in range(len(self.one))]
        second = torch.bmm(torch.stack(first), self.all).sum(0)
        return torch.bmm(self.chosen[torch.arange(len(tokens)) % 4], second.unsqueeze(-1)).squeeze(
            -1
        )
