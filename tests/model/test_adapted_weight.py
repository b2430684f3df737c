"""A weight that is W + s B A to whatever Python does with it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lorafx
from lorafx._kernels.addend import Addend
from lorafx._kernels.weights import whole
from lorafx._model.adapted_weight import AdaptedWeight

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))

W = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ROWS = [
    Addend(torch.randn(2, 3).double(), torch.randn(3, 4).double(), 0.5, -2, start)
    for start in (0, 2)
]
COLUMNS = [Addend(torch.randn(6, 1).double(), torch.randn(1, 2).double(), -1.0, -1, 1)]
Z = X.double()[..., :4]
USES = {  # what Python does with a weight, and whether that is computed in parts
    "linear": (lambda w: F.linear(Z, w, torch.ones(6).double()), True),
    "T": (lambda w: Z @ w.T, True),
    "t": (lambda w: Z.matmul(w.t()), True),
    "left": (lambda w: w @ Z[0].T, True),
    "addmm": (lambda w: torch.addmm(torch.ones(6).double(), Z[0], w.transpose(0, 1)), True),
    "chunk": (lambda w: [F.linear(Z, part) for part in w.chunk(3)], True),
    "split": (lambda w: [F.linear(Z, part) for part in torch.split(w, [1, 5])], True),
    "rows": (lambda w: F.linear(Z, w[1:4]), True),
    "vector": (lambda w: F.linear(Z[0, 0], w), True),
    "cast": (lambda w: F.linear(Z.float(), w.float()), True),
    "detach": (lambda w: F.linear(Z, w.detach()), True),
    "columns": (lambda w: F.linear(Z[..., :2], w[:, :2]), False),
    "scaled": (lambda w: F.linear(Z, w * 2), False),
    "einsum": (lambda w: torch.einsum("bti,oi->bto", Z, w), False),
    "norm": (lambda w: w.norm(), False),
    "both": (lambda w: w @ w.T, False),
    "cat": (lambda w: F.linear(Z, torch.cat([w, w])), False),
}


class TestAdaptedWeight:
    @pytest.mark.parametrize(
        "parts", [ROWS, COLUMNS, ROWS + COLUMNS], ids=["rows", "columns", "both"]
    )
    @pytest.mark.parametrize("use", USES)
    def test_is_the_sum_in_values_and_gradients(self, use, parts, monkeypatch):
        sums = []
        monkeypatch.setattr(
            AdaptedWeight, "whole",
            lambda self, made=AdaptedWeight.whole: sums.append(1) or made(self)
        )
        run, in_parts = USES[use]
        factors = [
            [t.clone().requires_grad_() for part in parts for t in part[:2]] for _ in range(2)
        ]
        grown = [
            [part._replace(left=f[2 * i], right=f[2 * i + 1]) for i, part in enumerate(parts)]
            for f in factors
        ]
        results = [run(AdaptedWeight.of(W, grown[0], "w")), run(whole(W, grown[1]))]
        assert bool(sums) != in_parts
        tight = dict(rtol=1e-5, atol=1e-5) if use == "cast" else dict(rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(*results, **tight)
        if use != "detach":
            totals = [
                sum(t.square().sum() for t in (r if isinstance(r, list) else [r])) for r in results
            ]
            gradients = [
                torch.autograd.grad(t, f, materialize_grads=True) for t, f in zip(totals, factors)
            ]
            torch.testing.assert_close(
                *gradients, **(dict(rtol=1e-4, atol=1e-4) if use == "cast" else tight)
            )

    @pytest.mark.parametrize(
        "write",
        [
            lambda w: w.zero_(), lambda w: nn.init.normal_(w), lambda w: w.data.copy_(W),
            lambda w: w.__setitem__(0, 1), lambda w: w.__iadd__(1),
            lambda w: torch.add(w, 1, out=w), lambda w: w.requires_grad_(),
            lambda w: setattr(w, "data", W), lambda w: torch._foreach_mul_([w], 2.0),
            lambda w: w.detach().mul_(2)
        ]
    )
    def test_writing_is_refused(self, write):
        with pytest.raises(
            lorafx.AdaptedWeightError, match="writes into the weight"
        ), torch.no_grad():
            write(AdaptedWeight.of(W, ROWS, "the weight"))

    def test_memory_is_refused(self):
        with pytest.raises(lorafx.AdaptedWeightError, match="asks for the memory of the weight"):
            AdaptedWeight.of(W, ROWS, "the weight").data_ptr()

    def test_a_function_of_its_own_gets_the_sum_and_gives_a_gradient(self):
        class Times(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, w):
                ctx.save_for_backward(x, w)
                return x @ w.t()

            @staticmethod
            def backward(ctx, gradient):
                x, w = ctx.saved_tensors
                return gradient @ w, gradient.mT @ x

        parts = [part._replace(left=part.left.clone().requires_grad_()) for part in ROWS]
        for weight in (AdaptedWeight.of(W, parts, "w"), whole(W, parts)):
            Times.apply(Z[0], weight).sum().backward()
        first = [part.left.grad.clone() for part in parts]
        assert all(gradient.abs().max() > 0 for gradient in first)
        for part in parts:
            part.left.grad = None
        Times.apply(Z[0], whole(W, parts)).sum().backward()
        torch.testing.assert_close(first, [2 * part.left.grad for part in parts])
