"""Linear calls with branches on tensors alone, against x (W + sum s B A)^T + b."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import lorafx
from lorafx._kernels import linears as kernels
from lorafx._kernels.addend import Addend
from lorafx._kernels.calls import AdaptedCall
from lorafx._kernels.linears import linears
from tests.support.internals import replace_internal
from tests.support.linear_calls import calls_of, check, expected, factors, normal

FORMS = {
    "merged": (0.0, 0.0),
    "factored": (float("inf"), 0.0),
    "in place": (float("inf"), float("inf")),
}


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """W + s B A always, or never, formed; or torch's own derivative, where it can be."""
    merge_from, small_below = FORMS[request.param]
    replace_internal(monkeypatch, "merge_from", merge_from)
    monkeypatch.setattr(kernels, "SMALL_BELOW", small_below)
    return request.param


SHAPES = [(4, 7), (3, 5, 7), (2, 3, 2, 7), (7,), (0, 7), (2, 0, 7), (1, 7)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("outs", [(11,), (7, 5), (11, 13, 5)], ids=str)
def test_outputs_and_gradients(form, shape, outs):
    check(normal(*shape), calls_of(7, outs))
    with torch.no_grad():
        x, calls = normal(*shape), calls_of(7, outs)
        for y, target in zip(linears(x, calls), expected(x, calls)):
            torch.testing.assert_close(y, target, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rows", [512, 513])
def test_wide_inputs(form, rows):
    """dA is summed over rows that fit a cache, where their number can be divided."""
    check(normal(rows, 1030), calls_of(1030, (5, 1040)))


@given(st.data())
def test_any_group(data):
    torch.manual_seed(data.draw(st.integers(0, 9)))
    width, outs = data.draw(st.integers(1, 9)), data.draw(
        st.lists(st.integers(4, 9), min_size=1, max_size=4)
    )
    shape = data.draw(st.lists(st.integers(0, 4), max_size=3))
    used = data.draw(st.lists(st.sampled_from(range(len(outs))), min_size=1, unique=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "MERGE_FROM", data.draw(st.sampled_from([0.0, 2.0, float("inf")])))
        patch.setattr(kernels, "SMALL_BELOW", data.draw(st.sampled_from([0, 100])))
        check(normal(*shape, width), calls_of(width, outs, bias=data.draw(st.booleans())), used)


LAYOUTS = {
    "transposed": lambda: normal(7, 6).mT,
    "sliced": lambda: normal(6, 14)[:, ::2],
    "expanded": lambda: normal(1, 7).expand(6, 7),
    "permuted": lambda: normal(3, 7, 2).permute(0, 2, 1),
    "a view": lambda: normal(42).view(6, 7),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("outs", [(7,), (7, 7)], ids=str)
def test_layouts_of_inputs_and_gradients(form, layout, outs):
    x, calls = LAYOUTS[layout](), calls_of(7, outs)
    check(x, calls)
    for y, target in zip(linears(x, calls), expected(x, calls)):
        for use in (
            torch.sum,
            lambda t: (t.transpose(0, -1).contiguous() * torch.arange(len(t))).sum(),
        ):
            got, wanted = (
                torch.autograd.grad(
                    use(t), factors(calls)[:2], retain_graph=True, allow_unused=True
                )
                for t in (y, target)
            )
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("outs", [(4,), (4, 5)], ids=str)
def test_second_derivatives(form, outs):
    x, calls = normal(2, 3), calls_of(3, outs, rank=1)

    def function(x, *tensors):
        rest = iter(tensors)
        return tuple(
            linears(
                x,
                [
                    call._replace(
                        addends=[
                            addend._replace(left=next(rest), right=next(rest))
                            for addend in call.addends
                        ]
                    )
                    for call in calls
                ],
            )
        )

    assert torch.autograd.gradcheck(function, (x, *factors(calls)))
    assert torch.autograd.gradgradcheck(function, (x, *factors(calls)))


@pytest.mark.parametrize("outs", [(7,), (7, 5)], ids=str)
def test_written_into_afterwards(form, outs):
    """Outputs may be; what is saved for backward may not, and says so."""
    x, calls = normal(4, 7), calls_of(7, outs)
    y, target = linears(x, calls)[0], expected(x, calls)[0]
    y += 1
    y.relu_()
    torch.testing.assert_close(*(torch.autograd.grad(t.sum(), [x, *factors(calls)[:2]])
                                 for t in (y, (target + 1).relu())))
    for tensor in (calls[0].weight, *calls[0].addends[0][:2]):
        y = linears(x, calls)[0]
        with torch.no_grad():
            tensor.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_the_weight_may_be_away_between_forward_and_backward(form):
    """As FSDP has it: the memory of W is freed after forward and filled again before backward."""
    x, calls = normal(4, 7), calls_of(7, (7,))
    weight = calls[0].weight
    wanted = torch.autograd.grad(expected(x, calls)[0].sin().sum(), [x, *factors(calls)])
    y = linears(x, calls)[0]
    values, size = weight.clone(), weight.untyped_storage().size()
    with torch.autograd._unsafe_preserve_version_counter(weight):
        weight.untyped_storage().resize_(0)
        loss = y.sin().sum()
        weight.untyped_storage().resize_(size)
        weight.copy_(values)
    torch.testing.assert_close(torch.autograd.grad(loss, [x, *factors(calls)]), wanted)


def test_base_weights_that_train(form):
    x, call = normal(4, 7), calls_of(7, (5,))[0]
    call = call._replace(weight=call.weight.requires_grad_(), bias=call.bias.requires_grad_())
    inputs = [x, call.weight, call.bias, *factors([call])]
    torch.testing.assert_close(*(torch.autograd.grad(y[0].sin().sum(), inputs)
                                 for y in (linears(x, [call]), expected(x, [call]))))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("outs", [(7,), (7, 5)], ids=str)
def test_checkpointing_and_offloading(reentrant, dropout, outs):
    x, calls = normal(4, 7), calls_of(7, outs)
    calls = [
        call._replace(addends=[a._replace(dropout=dropout) for a in call.addends]) for call in calls
    ]

    def run(around):
        torch.manual_seed(5)
        return torch.autograd.grad(
            around(lambda x: sum(y.sin().sum() for y in linears(x, calls))), factors(calls)
        )

    plain = run(lambda f: f(x))
    with save_on_cpu():
        torch.testing.assert_close(run(lambda f: f(x)), plain)
    leaves = [factor.grad for factor in factors(calls)]
    assert leaves == [None] * len(leaves)
    torch.manual_seed(5)
    checkpoint(
        lambda x: sum(y.sin().sum() for y in linears(x, calls)), x, use_reentrant=reentrant
    ).backward()
    torch.testing.assert_close([factor.grad for factor in factors(calls)], list(plain))


def test_several_addends_of_a_small_call(form):
    x, (call,) = normal(3, 4, 7), calls_of(7, (5,))
    more = [
        Addend(normal(5, rank), normal(rank, 7), scale) for rank, scale in ((1, -2.0), (3, 0.0))
    ]
    check(x, [call._replace(addends=[*call.addends, *more])])


@pytest.mark.parametrize("outs", [(7,), (7, 5)], ids=str)
@pytest.mark.parametrize("shape", [(4, 7), (2, 4, 7)], ids=str)
def test_selective_checkpointing(form, outs, shape):
    """It keeps the results of some operators, and takes them up again in the backward pass."""
    x, calls = normal(*shape), calls_of(7, outs)
    keep = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    loss = checkpoint(
        lambda x: sum(y.pow(3).sum() for y in linears(x, calls)), x, use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(keep)
    )
    wanted = sum(y.pow(3).sum() for y in expected(x, calls))
    torch.testing.assert_close(
        *(torch.autograd.grad(total, [x, *factors(calls)]) for total in (loss, wanted))
    )


def test_dropout():
    torch.manual_seed(0)
    x = torch.ones(200, 300, dtype=torch.float64, requires_grad=True)
    A, B = torch.eye(300).double(), torch.eye(300).double()
    A, B = A.requires_grad_(), B.requires_grad_()
    call = AdaptedCall(torch.zeros(300, 300).double(), None, [Addend(B, A, 1.0, dropout=0.2)])
    one, two = linears(x, [call, call])
    for y in (one, two):
        assert set(y.detach().flatten().tolist()) == {0.0, 1.25} and abs(y.mean() - 1) < 0.01
    assert not torch.equal(one, two)
    shared = call._replace(addends=[call.addends[0]._replace(shared=True)])
    one, two = linears(x, [shared, shared])
    assert torch.equal(one, two)


@pytest.mark.parametrize("shared", [True, False])
def test_gradients_with_dropout(shared):
    """The mask of forward is that of backward: the function is linear in what is left of x."""
    x, calls = normal(5, 11), calls_of(11, (7, 5))
    calls = [
        call._replace(addends=[a._replace(dropout=0.4, shared=shared) for a in call.addends[:1]])
        for call in calls
    ]

    def function(x, *tensors):
        torch.manual_seed(3)
        rest = iter(tensors)
        return tuple(
            linears(
                x,
                [
                    call._replace(
                        addends=[
                            a._replace(left=next(rest), right=next(rest)) for a in call.addends
                        ]
                    )
                    for call in calls
                ],
            )
        )

    assert torch.autograd.gradcheck(function, (x, *factors(calls)))
    assert torch.autograd.gradgradcheck(function, (x, *factors(calls)))


def test_autocast(form):
    x, calls = torch.randn(6, 32, requires_grad=True), calls_of(32, (32, 16), torch.float32)
    exact = torch.autograd.grad(
        sum(y.sin().sum() for y in expected(x, calls)), [x, *factors(calls)]
    )
    with torch.autocast("cpu", torch.bfloat16):
        outputs = linears(x, calls)
        assert {y.dtype for y in outputs} == {torch.bfloat16}
        loss = sum(y.float().sin().sum() for y in outputs)
        inside = torch.autograd.grad(loss, [x, *factors(calls)], retain_graph=True)
    outside = torch.autograd.grad(loss, [x, *factors(calls)])
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)
    for got, wanted in zip(outside, exact):
        assert got.dtype == torch.float32 and (got - wanted).norm() < 0.1 * wanted.norm()


def test_mixed_precision_is_as_close_as_float32_branches():
    """bfloat16 base, float32 adapters: the gradients' error beside branches all in float32."""
    torch.manual_seed(0)
    base = nn.Sequential(
        *[layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.Tanh())]
    ).bfloat16()
    model, x = lorafx.inject(base, rank=4), torch.randn(256, 64).bfloat16()
    for parameter in lorafx.parameters(model):
        nn.init.normal_(parameter, std=0.1)
    exact = copy.deepcopy(model).double()
    exact(x.double()).square().sum().backward()
    model(x).float().square().sum().backward()
    wanted = [parameter.grad for parameter in lorafx.parameters(exact)]
    ours = [parameter.grad for parameter in lorafx.parameters(model)]
    theirs = torch.autograd.grad(
        _in_float32(model, x).float().square().sum(), list(lorafx.parameters(model))
    )
    errors = [sum(((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, wanted))
              for found in (ours, theirs)]
    assert errors[0] < errors[1]


def _in_float32(model, x):
    """The same model as others compute it: y + (s (x.float() A^T) B^T).to(y.dtype)."""
    for layer in model:
        if isinstance(layer, nn.Linear):
            factors = layer.lora.default
            y = F.linear(x, layer.frozen_weight, layer.bias)
            x = (y + F.linear(F.linear(x.float(), factors.A), factors.B) * factors.scale).to(
                y.dtype
            )
        else:
            x = layer(x)
    return x
