"""Every invariant on every model of the zoo."""

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorafx
import tests.zoo.calls  # noqa: F401 (adds its rows to the table)
from tests.support.oracle import Oracle, factors_of, fingerprint, frozen, randomise
from tests.zoo.all_architectures import ROWS as TRANSFORMERS
from tests.zoo.outputs import outputs
from tests.zoo.rows import ROWS, Row


def total(found: Any) -> Tensor:
    squares = sum(tensor.double().square().sum() for tensor in found)
    return squares / sum(tensor.numel() for tensor in found)


def assert_close(row: Row, got: Any, wanted: Any) -> None:
    """To rounding, relative to the largest output: deep models multiply it, CPUs differ in it."""
    for a, b in zip(got, wanted, strict=True):
        largest = float(b.detach().abs().max()) if b.numel() else 0
        allowed = (1e-9 if a.dtype == torch.float64 else 5e-4) * max(largest, 1)
        torch.testing.assert_close(a, b, rtol=0, atol=allowed)


EVERY = [*ROWS, *TRANSFORMERS]


@pytest.fixture(params=EVERY, ids=[row.name for row in EVERY])
def row(request: Any) -> Row:
    return request.param


@functools.cache
def sites_of(row: Row) -> list[Any]:
    """The sites of a row's model, traced once for all tests."""
    return lorafx.sites(row.build())


def test_sites_are_those_counted_by_hand(row):
    assert len(sites_of(row)) == row.sites - row.missed
    if row.missed:
        assert (
            len(lorafx.summary(lorafx.inject(row.build(), targets="linear")).skipped) >= row.missed
        )


def test_identity_and_the_callers_model(row, tmp_path):
    """Injected equals the frozen original bitwise, random numbers too; training leaves it."""
    base = row.build().eval()
    before, expected = fingerprint(base), frozen(base)
    model = lorafx.inject(base, rank=2, targets="linear")
    for training in (True, False):
        for grad in (True, False):
            wanted = outputs(row, expected, training, grad)
            state = torch.get_rng_state()
            got = outputs(row, model, training, grad)
            assert torch.equal(torch.get_rng_state(), state)
            if grad and not training and not row.exact:
                # torch's fused kernels are for weights that train nothing
                assert_close(row, got, wanted)
            else:
                assert all(map(torch.equal, got, wanted)), (training, grad)
    assert all(map(torch.equal, outputs(row, frozen(lorafx.eject(model))), outputs(row, expected)))
    optimizer = torch.optim.SGD(lorafx.parameters(model), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        total(outputs(row, model, training=True)).backward()
        optimizer.step()
    assert fingerprint(base) == before


def test_no_silent_site(row):
    """Each B gets its weight's gradient, and changes the outputs when it alone is not zero."""
    base = row.build().eval()
    model = lorafx.inject(base, rank=2, targets="linear")
    reference = outputs(row, model, grad=False)
    total(outputs(row, model)).backward()
    check_gradients(row, base, model)
    for name, parameter in lorafx.named_parameters(model):
        if name.endswith(".B"):
            with torch.no_grad():
                parameter.normal_(std=100)  # by a B of 1 some change less than float32 tells apart
                assert not all(map(torch.equal, outputs(row, model, grad=False), reference)), name
                parameter.zero_()


def check_gradients(row: Row, base: nn.Module, model: nn.Module) -> Oracle | None:
    """Compare the gradients of A and B with the oracle's, if the base's weights are Parameters."""
    if any(nn.utils.parametrize.is_parametrized(module) for module in base.modules()):
        assert all(
            p.grad.any() for name, p in lorafx.named_parameters(model) if name.endswith(".B")
        )
        return None
    sites, factors = sites_of(row), factors_of(model, {"default": 1.0})
    twin = Oracle(base, sites, factors)
    twin.outputs = outputs(row, twin.model)
    total(twin.outputs).backward()
    tensors = [tensor for site in sites for part in factors[site.name] for tensor in part[:2]]
    expected = twin.gradients()
    assert_close(
        row, [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors], expected
    )
    dead = [site.name for site, gradient in zip(sites, expected[1::2]) if not gradient.any()]
    assert set(dead) <= row.no_gradient
    return twin


def test_adapted_outputs_and_gradients(row, tmp_path):
    """With B not zero: the oracle's outputs and gradients; merged, copied, pickled, loaded too."""
    base = row.build().eval()
    model = randomise(lorafx.inject(base, rank=2, targets="linear"))
    result = outputs(row, model)
    total(result).backward()
    twin = check_gradients(row, base, model)
    if twin is not None:
        assert_close(row, result, twin.outputs)
    result = outputs(row, model)
    for grad in (True, False):
        merged = lorafx.merge(model, untie=True)
        assert_close(row, outputs(row, merged, grad=grad), outputs(row, model, grad=grad))
    assert all(map(torch.equal, outputs(row, copy.deepcopy(model)), result))
    lorafx.save(model, tmp_path / "adapter.safetensors")
    assert all(
        map(torch.equal, outputs(row, lorafx.load(base, tmp_path / "adapter.safetensors")), result)
    )
    try:
        plain = pickle.dumps(base)
    except (pickle.PicklingError, AttributeError, RuntimeError):
        plain = None  # nor does the original
    if plain is not None:
        assert all(map(torch.equal, outputs(row, pickle.loads(pickle.dumps(model))), result))
