"""Each row of a batch by adapters of its own, against a loop over rows in float64."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from common.counting import Operators
from torch import nn

from lorafx._kernels import mixed as kernels
from lorafx._kernels.addend import Addend
from lorafx._kernels.again import Proven
from lorafx._kernels.calls import AdaptedCall
from lorafx._kernels.mixed import Gates, gathers, mixed, stacked_factors
from lorafx._kernels.plain import by_operators
from tests.support.linear_calls import normal

RANKS, SCALES = (3, 1, 5, 2), (0.5, 2.0, 1.0, -1.5)
ROWS = [{0: 1.0}, {2: 0.5, 3: -0.3}, {}, {2: 1.0}, {1: 2.0, 0: 0.7, 3: 1.0}]  # {adapter: weight}


@pytest.fixture(params=["stacked", "gathered"])
def form(request, monkeypatch):
    """One form, whatever the shapes and whatever trains."""
    monkeypatch.setattr(kernels, "gathers", lambda x, gates: request.param == "gathered")
    if request.param == "stacked":
        stacked = kernels._stacked
        monkeypatch.setattr(
            kernels, "_gathered",
            lambda x, y, A, B, gates, into, proven: stacked(x, y, A, B, gates.dense, into))
    return request.param


def adapters(width, out, ranks=RANKS, dtype=torch.float64):
    """[A (rank, in)] and [B (out, rank)]."""
    As = [normal(rank, width, dtype=dtype) for rank in ranks]
    return As, [normal(out, rank, dtype=dtype) for rank in ranks]


def dense_gates(rows, ranks=RANKS, scales=SCALES, dtype=torch.float64):
    """(N, R), with the blank rank."""
    dense = torch.zeros(len(rows), 1 + sum(ranks), dtype=dtype)
    starts = [1 + sum(ranks[:adapter]) for adapter in range(len(ranks))]
    for row, weights in zip(dense, rows):
        for adapter, weight in weights.items():
            row[starts[adapter]:starts[adapter] + ranks[adapter]] = weight * scales[adapter]
    return dense


def alone(x, y, As, Bs, rows, scales=SCALES):
    """Each row by itself, by the definition."""
    outputs = []
    for row, output, weights in zip(x, y, rows):
        for adapter, weight in weights.items():
            output = output + weight * scales[adapter] * (row @ As[adapter].t() @ Bs[adapter].t())
        outputs.append(output)
    return torch.stack(outputs)


@pytest.mark.parametrize("middle", [(), (1,), (3,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("fresh", [False, True])
def test_each_row_and_each_gradient_is_that_of_the_row_alone(form, middle, fresh):
    x, y = normal(5, *middle, 7), normal(5, *middle, 11)
    As, Bs = adapters(7, 11)
    leaves = [x, y, *As, *Bs]
    got = mixed(x, y * 1, *stacked_factors(As, Bs), Gates.of(dense_gates(ROWS)), fresh)
    wanted = alone(x, y, As, Bs, ROWS)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(wanted)
    for found, true in zip(*(torch.autograd.grad(t, leaves, weights) for t in (got, wanted))):
        torch.testing.assert_close(found, true, rtol=1e-12, atol=1e-12)


def test_float32_is_that_of_the_row_alone_to_a_millionth(form):
    As, Bs = adapters(64, 48, dtype=torch.float32)
    x, y = normal(5, 16, 64, dtype=torch.float32), torch.randn(5, 16, 48)
    gates = Gates.of(dense_gates(ROWS, dtype=torch.float32))
    for got, wanted in zip(
        gradients(mixed(x, y, *stacked_factors(As, Bs), gates), [x, *As, *Bs]),
        gradients(alone(x, y, As, Bs, ROWS), [x, *As, *Bs])
    ):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6 * wanted.abs().max().item())


def gradients(output, leaves):
    torch.manual_seed(1)
    return [output, *torch.autograd.grad(output, leaves, torch.randn_like(output))]


def test_first_and_second_derivatives(form):
    rows = [{0: 1.0}, {1: 0.5, 0: 2.0}, {}]
    As, Bs = adapters(3, 2, ranks=(2, 1))
    gates = Gates.of(dense_gates(rows, ranks=(2, 1)))

    def function(x, y, *factors):
        return mixed(x, y, *stacked_factors(factors[:2], factors[2:]), gates)

    inputs = normal(3, 2, 3), normal(3, 2, 2), *As, *Bs
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_adapters_without_rows_have_gradients_of_exact_zeros(form):
    As, Bs = adapters(7, 11)
    gates = Gates.of(dense_gates([{0: 1.0}, {}, {2: 0.0}, {3: 1.0}]))
    y = mixed(normal(4, 3, 7), normal(4, 3, 11), *stacked_factors(As, Bs), gates)
    y.square().sum().backward()
    used = [bool(A.grad.any()) and bool(B.grad.any()) for A, B in zip(As, Bs)]
    assert used == [True, False, False, True]
    for adapter in (1, 2):
        assert not As[adapter].grad.any() and not Bs[adapter].grad.any()


def test_rows_of_the_base_stay_as_they_are_bit_by_bit(form):
    x, y = torch.randn(3, 4, 7), torch.randn(3, 4, 11)
    As, Bs = adapters(7, 11, dtype=torch.float32)
    gates = Gates.of(dense_gates([{}, {0: 1.0}, {}], dtype=torch.float32))
    found = mixed(x, y, *stacked_factors(As, Bs), gates)
    assert torch.equal(found[::2], y[::2]) and not torch.equal(found[1], y[1])
    gates = Gates.of(dense_gates([{}] * 3, dtype=torch.float32))
    assert torch.equal(mixed(x, y, *stacked_factors(As, Bs), gates), y)


@pytest.mark.parametrize("spoilt", ["the adapter", "the row"])
def test_what_is_not_finite_stays_with_its_rows_where_adapters_train(spoilt):
    """Row 0 is adapter 0's, which diverged; rows 1 and 2 are adapter 1's and the base's."""
    As, Bs = adapters(7, 11)
    x, y = normal(3, 2, 7), torch.randn(3, 2, 11, dtype=torch.float64)
    with torch.no_grad():
        (As[0] if spoilt == "the adapter" else x)[0] = torch.inf
    gates = Gates.of(dense_gates([{0: 1.0}, {1: 1.0}, {}]))
    found = mixed(x, y, *stacked_factors(As, Bs), gates)
    (found * torch.randn_like(found)).sum().backward()
    assert not found[0].isfinite().any() and not Bs[0].grad.isfinite().all()
    assert found[1:].isfinite().all() and x.grad[1:].isfinite().all()
    assert As[1].grad.isfinite().all() and Bs[1].grad.isfinite().all() and As[1].grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_wider_than_x(form, dtype):
    As, Bs = adapters(7, 11, dtype=torch.float32)
    x, y = torch.randn(5, 3, 7).to(dtype), torch.randn(5, 3, 11).to(dtype)
    found = mixed(x, y, *stacked_factors(As, Bs), Gates.of(dense_gates(ROWS, dtype=torch.float32)))
    assert found.dtype == dtype
    wanted = alone(x.double(), y.double(), [A.double() for A in As], [B.double() for B in Bs], ROWS)
    error = (found.double() - wanted).norm() / wanted.norm()
    assert error < 2 * torch.finfo(dtype).eps
    assert {g.dtype for g in torch.autograd.grad(found.sum(), [*As, *Bs])} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_under_autocast_the_result_has_the_dtype_of_y(form, dtype):
    """It is that of a call without autocast, bit by bit."""
    As, Bs = adapters(7, 11, dtype=torch.float32)
    x, y = torch.randn(5, 3, 7), torch.randn(5, 3, 11).to(dtype)
    gates = Gates.of(dense_gates(ROWS, dtype=torch.float32))
    wanted = mixed(x, y, *stacked_factors(As, Bs), gates)
    with torch.autocast("cpu", torch.bfloat16):
        found = mixed(x, y, *stacked_factors(As, Bs), gates)
    assert found.dtype == dtype and torch.equal(found, wanted)


def test_shapes_choose_the_form():
    def chosen(rows, tokens, ranks, rank):
        dense = torch.zeros(rows, ranks)
        gates = Gates(dense, torch.zeros(rows, rank, dtype=torch.int64), dense[:, :rank])
        return gathers(torch.zeros(rows, tokens, 3), gates)

    assert not chosen(16, 1, 8 * 8, 8)  # one token of each of 8 adapters
    assert chosen(32, 1, 32 * 8, 8)  # of 32
    assert chosen(16, 16, 8 * 8, 8)  # a prompt
    assert not chosen(16, 128, 24, 24)  # each row by all ranks


def test_a_fresh_y_is_written_into_and_another_is_not(form):
    As, Bs = adapters(7, 11)
    factors = [factor.detach() for factor in stacked_factors(As, Bs)]
    x, gates = torch.randn(5, 3, 7, dtype=torch.float64), Gates.of(dense_gates(ROWS))
    y = torch.randn(5, 3, 11, dtype=torch.float64)
    before = y.clone()
    wanted = mixed(x, y, *factors, gates)
    assert torch.equal(y, before)
    found = mixed(x, y, *factors, gates, fresh=True)
    assert found.data_ptr() == y.data_ptr()
    torch.testing.assert_close(found, wanted, rtol=1e-14, atol=1e-14)


def test_strided_rows(form):
    """A batch that is not the first dimension, viewed as if it were."""
    As, Bs = adapters(7, 11)
    gates, factors = Gates.of(dense_gates(ROWS)), stacked_factors(As, Bs)
    x, y = normal(4, 3, 5, 7), normal(4, 3, 5, 11)
    found = mixed(x.permute(2, 0, 1, 3), y.permute(2, 0, 1, 3), *factors, gates)
    wanted = alone(x.permute(2, 0, 1, 3), y.permute(2, 0, 1, 3), As, Bs, ROWS)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_gates_name_the_ranks_of_each_row():
    gates = Gates.of(torch.tensor([[0, 0, 3.0, 4.0], [0, 5.0, 0, 0], [0, 0, 0, 0]]))
    assert gates.ranks.tolist() == [[2, 3], [1, 0], [0, 0]]
    assert gates.values.tolist() == [[3, 4], [5, 0], [0, 0]]
    assert Gates.of(torch.zeros(0, 4)).ranks.shape == (0, 2)
    assert Gates.of(torch.zeros(3, 1)).ranks.tolist() == [[0], [0], [0]]
    beams = gates.repeated(2)
    assert beams.ranks.tolist() == [[2, 3], [2, 3], [1, 0], [1, 0], [0, 0], [0, 0]]
    assert torch.equal(beams.dense, gates.dense[[0, 0, 1, 1, 2, 2]])


@pytest.mark.parametrize("shape", [(10, 3, 7), (1, 5, 7), (5,)], ids=str)
def test_another_number_of_rows_is_refused(shape):
    As, Bs = adapters(7, 11)
    with pytest.raises(ValueError, match=r"rows of a batch of 5 .* first dimension must be"):
        mixed(torch.randn(shape), torch.randn(*shape[:-1], 11), *stacked_factors(As, Bs),
              Gates.of(dense_gates(ROWS)))


def test_x_is_computed_again_and_not_kept():
    """What autograd keeps in the place of an x that a recipe gives is the recipe's beginning."""
    As, Bs = adapters(64, 48)
    before, gates = normal(5, 256, 64), Gates.of(dense_gates(ROWS))
    y, addresses, found = torch.zeros(5, 256, 48, dtype=before.dtype), [], []
    for proven in (None, Proven()):
        x = F.silu(before)
        result = mixed(x, y, *stacked_factors(As, Bs), gates, proven=proven)
        alive = weakref.ref(x)
        del x
        addresses.append(alive() is not None)
        found.append(torch.autograd.grad(result.sin().sum(), [before, *As, *Bs]))
    assert addresses == [True, False]
    assert all(torch.equal(*pair) for pair in zip(*found))


class Layer(nn.Module):
    """A linear layer under a gate."""

    def forward(self, x, weight, A, B, gates):
        return mixed(x, F.linear(x, weight), A, B, gates, fresh=True)


@pytest.mark.parametrize("tokens, trains", [(1, False), (4, True)])
def test_one_graph_for_all_assignments_and_ranks(tokens, trains):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step = torch.compile(Layer(), fullgraph=True, backend="aot_eager")
    x, weight = torch.randn(5, tokens, 7), torch.randn(11, 7)
    cases = [(RANKS, ROWS), (RANKS, [{}] * 5), (RANKS, [{3: 1.0}] * 5), ((1, 9), [{1: 1.0}] * 5),
             ((1,) * 60, [{3: 1.0}] * 5), ((64, 32), [{0: 1.0, 1: 1.0}] * 5)]
    for ranks, rows in cases:
        As, Bs = adapters(7, 11, ranks, dtype=torch.float32)
        gates = Gates.of(dense_gates(rows, ranks, dtype=torch.float32))
        A, B = (factor.detach() for factor in stacked_factors(As, Bs))
        for tensor, axis in ((A, 0), (B, 0), *((part, 1) for part in gates)):
            torch._dynamo.mark_dynamic(tensor, axis)
        leaves = [A.requires_grad_(trains), B.requires_grad_(trains)]
        found, wanted = step(x, weight, A, B, gates), alone(x, F.linear(x, weight), As, Bs, rows)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
        if trains:
            got = torch.autograd.grad(found.sin().sum(), leaves)
            true = torch.autograd.grad(mixed(x, F.linear(x, weight), A, B, gates).sin().sum(),
                                       leaves)
            torch.testing.assert_close(got, true, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_transforms(form):
    """Mapped over models and over assignments, and differentiated forward."""
    As, Bs = adapters(7, 11)
    A, B = (factor.detach() for factor in stacked_factors(As, Bs))
    gates = Gates.of(dense_gates(ROWS))
    x, y = torch.randn(2, 5, 3, 7).double(), torch.randn(2, 5, 3, 11).double()
    wanted = torch.stack([mixed(*pair, A, B, gates) for pair in zip(x, y)])
    found = torch.func.vmap(lambda x, y: mixed(x, y, A, B, gates, fresh=True))(x, y)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    both = [torch.stack([one, one.flip(0)]) for one in gates]
    wanted = torch.stack([mixed(x[0], y[0], A, B, Gates(*one)) for one in zip(*both)])
    found = torch.func.vmap(lambda *one: mixed(x[0], y[0], A, B, Gates(*one)))(*both)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    _, tangent = torch.func.jvp(lambda A: mixed(x[0], y[0], A, B, gates), (A,), (A,))
    expected = mixed(x[0], torch.zeros_like(y[0]), A, B, gates)
    torch.testing.assert_close(tangent, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_calls_own_result_is_written_into(trains, bias):
    """But for one that autograd takes for a view, as it does the result of x W^T + b."""
    As, Bs = adapters(7, 11)
    A, B = stacked_factors(As, Bs)
    gates = Gates.of(dense_gates(ROWS))
    x, weight = normal(5, 3, 7).detach(), normal(11, 7).detach()
    call = AdaptedCall(weight, normal(11).detach() if bias else None,
                       [Addend(B.t(), A, 1.0, gates=gates)])
    with torch.set_grad_enabled(trains), Operators() as operators:
        [found] = by_operators(x, [call])
    into = not operators.counts.keys().isdisjoint({"addmm_", "baddbmm_"})
    assert into == (not (trains and bias))
    wanted = alone(x, F.linear(x, weight, call.bias), As, Bs, ROWS)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
