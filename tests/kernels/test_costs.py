"""What a linear call with branches saves for backward, which operators it runs, in which form."""

from collections import Counter

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from lorafx._kernels import linears as kernels
from lorafx._kernels.addend import Addend
from lorafx._kernels.calls import AdaptedCall
from lorafx._kernels.linears import linears
from lorafx._kernels.plain import by_operators
from tests.support.internals import internal, replace_internal
from tests.support.linear_calls import calls_of, factors, normal


class Saved:
    """The bytes that autograd saves, each tensor once, without the model's own."""

    def __init__(self, *own):
        self.own, self.found = {t.untyped_storage().data_ptr() for t in own}, {}

    def __enter__(self):
        self.hooks = saved_tensors_hooks(self.pack, lambda t: t)
        self.hooks.__enter__()
        return self

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.found[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    @property
    def bytes(self):
        return sum(size for size, _ in self.found.values())


def own(calls):
    return [
        *factors(calls), *(tensor for call in calls for tensor in call[:2] if tensor is not None)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_x_and_the_ranks_are_saved(dtype):
    """Of q, k and v under float32 adapters: bytes(x) and 3 ranks a row, in float32."""
    x = torch.randn(2, 64, 256, dtype=dtype, requires_grad=True)
    calls = [
        AdaptedCall(
            torch.randn(out, 256, dtype=dtype), None,
            [Addend(normal(out, 8, dtype=torch.float32), normal(8, 256, dtype=torch.float32), 1.0)]
        )
        for out in (256, 64, 64)
    ]
    with Saved(*own(calls)) as saved:
        outputs = linears(x, calls)
    assert saved.bytes == x.nbytes + 2 * 64 * 24 * 4 <= 1.2 * x.nbytes
    assert all(y.dtype == dtype for y in outputs)


SMALL = {
    "in place": (torch.randn(2, 64, 256), 16, True),
    "few rows of low rank": (torch.randn(2, 64, 256), 4, True),
    "many rows of low rank": (torch.randn(4, 64, 256), 4, False),
    "rows that are no view": (torch.randn(2, 256, 64).transpose(1, 2), 16, False),
    "a matrix by columns": (torch.randn(256, 128).t(), 16, True),
    "half precision": (torch.randn(2, 64, 256).bfloat16(), 16, False),
    "large": (torch.randn(2048, 256), 16, False),
}


@pytest.mark.parametrize("x, rank, in_place", SMALL.values(), ids=SMALL)
def test_a_small_call_saves_the_same(x, rank, in_place):
    """x once, and its ranks a row, whichever way it is computed."""
    x, calls = x.detach().requires_grad_(), calls_of(256, (256,), x.dtype, rank=rank)
    with Saved(*own(calls)) as saved:
        y = linears(x, calls)[0]
    assert (type(y.grad_fn).__name__ != "_LinearsBackward") == in_place
    assert saved.bytes == x.nbytes + x.numel() // 256 * rank * x.itemsize


def test_dropout_saves_a_bit_an_element():
    x, calls = torch.randn(64, 256, requires_grad=True), calls_of(256, (256,), torch.float32)
    calls = [
        call._replace(addends=[a._replace(dropout=0.1) for a in call.addends]) for call in calls
    ]
    with Saved(*own(calls)) as saved:
        linears(x, calls)
    assert saved.bytes == x.nbytes + 64 * 2 * 4 + 64 * 256 // 8


class Operators(TorchDispatchMode):
    """Counts the operators that compute: no views, and no memory that is only reserved."""

    SILENT = {
        "view", "_unsafe_view", "t", "detach", "narrow", "slice", "split_with_sizes", "empty",
        "new_empty", "alias", "empty_like", "transpose"
    }

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in self.SILENT:
            self.counts[name] += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("rank, copies", [(4, 3), (16, 2)])
def test_operators_of_a_group(rank, copies):
    """q, k and v: 26 or 27; the frozen model needs 8 (3 products forward, 5 operators backward)."""
    rows = 256
    x = torch.randn(rows, 256, requires_grad=True)
    calls = [
        AdaptedCall(
            torch.randn(out, 256), None,
            [
                Addend(
                    normal(out, rank, dtype=torch.float32), normal(rank, 256, dtype=torch.float32),
                    1.0
                )
            ]
        )
        for out in (256, 128, 128)
    ]
    gradients = [torch.ones(rows, out) for out in (256, 128, 128)]
    with Operators() as count:
        torch.autograd.grad(linears(x, calls), [x, *factors(calls)], gradients)
    assert count.counts == {"mm": 12, "addmm_": 6, "cat": copies, "_to_copy": 6}
    assert count.counts.total() - 8 <= 19


@pytest.mark.parametrize("in_cache", [0, internal("in_cache")])
@pytest.mark.parametrize("rows, into, rank, outs", [
    (256, 24, 4, (40,)), (255, 24, 4, (40,)), (256, 24, 16, (40,)), (300, 24, 5, (40, 8)),
    (2048, 1024, 3, (7,)),
])
def test_any_layout_gives_the_same(rows, into, rank, outs, in_cache, monkeypatch):
    """Output and gradients are those of plain operators, by which columns ranks may be laid out."""
    replace_internal(monkeypatch, "in_cache", in_cache)
    replace_internal(monkeypatch, "small_below", 0)
    replace_internal(monkeypatch, "merge_from", float("inf"))
    x = torch.randn(rows, into, dtype=torch.float64, requires_grad=True)
    calls = calls_of(into, outs, torch.float64, rank=rank)
    gradients = [torch.randn(rows, out, dtype=torch.float64) for out in outs]
    found, true = linears(x, calls), by_operators(x, calls)
    torch.testing.assert_close(found, true, rtol=1e-10, atol=1e-10)
    h = found[0].grad_fn.saved_tensors[1]  # (rows, ranks)
    few = rows >= 256 and h.shape[1] < 16 and rows * into < in_cache
    assert h.stride() == ((1, rows) if few else (h.shape[1], 1))
    leaves = [x, *factors(calls)]
    ours, theirs = (torch.autograd.grad(y, leaves, gradients) for y in (found, true))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-9)


def test_a_product_that_rounds_its_operands_is_never_merged(monkeypatch):
    replace_internal(monkeypatch, "merge_from", 0.0)
    x, calls = torch.randn(6, 32), calls_of(32, (32,), torch.float32)
    assert kernels.merges(x, calls)
    assert not kernels.merges(x.bfloat16(), calls)
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        assert not kernels.merges(x, calls)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"


def test_the_form_is_chosen_by_shapes():
    # MERGE_FROM = 2.5: rows (in + out) >= 5 in out
    for rows, merged in ((639, False), (640, True)):
        x = torch.empty(rows, 256)
        assert kernels.merges(x, calls_of(256, (256,), torch.float32)) is merged
