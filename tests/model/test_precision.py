"""Narrow dtypes: what is summed, saved and composed in which."""

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn

import lorafx
from tests.support.attention import X, attention
from tests.support.oracle import factors_of, frozen, randomise


class Scaled(nn.Linear):
    """Python that needs its weight as a whole."""

    def forward(self, x):
        return F.linear(x, self.weight * 2 if x.ndim else self.weight, self.bias)


class TestNarrow:
    def test_a_sum_that_would_round_the_adapter_away_is_refused_unless_asked(self):
        base = Scaled(8, 8).bfloat16()
        with pytest.raises(
            lorafx.AdaptedWeightError, match="the weight of a Scaled as a whole.*rounding=True"
        ):
            lorafx.inject(base)(X.bfloat16())
        model = lorafx.inject(base, rounding=True)
        assert torch.equal(model(X.bfloat16()), frozen(base)(X.bfloat16()))
        lorafx.inject(base.float())(X)
        with pytest.raises(lorafx.ConfigError, match="rounding must be True or False"):
            lorafx.inject(base, rounding="yes")

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
    def test_compiled_programs_leave_to_python_what_reads_the_weight(self):
        model = randomise(lorafx.inject(attention().bfloat16(), targets="linear"))
        x = X.bfloat16()
        counter = torch._dynamo.testing.CompileCounter()
        torch.testing.assert_close(
            torch.compile(model, backend=counter)(x, x, x)[0], model(x, x, x)[0]
        )
        assert not counter.frame_count  # torch gives the whole call to what it reads
        with pytest.raises(Exception, match="disable"):
            torch.compile(model, backend="eager", fullgraph=True)(x, x, x)


def test_no_copy_of_an_activation_is_saved():
    """A bfloat16 base with float32 adapters saves x and the narrow h: no float32 copy of x."""
    model = randomise(lorafx.inject(nn.Linear(64, 64, bias=False).bfloat16(), 4))
    x = torch.randn(256, 64, dtype=torch.bfloat16, requires_grad=True)
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = (tuple(tensor.shape), tensor.dtype)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x).sum().backward()
    large = {shape: dtype for shape, dtype in saved.values() if 256 in shape}
    assert large == {(256, 64): torch.bfloat16, (256, 4): torch.float32}


def test_composition_of_narrow_adapters_is_wide():
    base = nn.Linear(17, 17).bfloat16()
    model = randomise(lorafx.inject(base, 4, alpha=3, dtype=torch.bfloat16, adapter="a"))
    lorafx.compose(model, {"a": 0.7}, "c")
    (A, B, s), = factors_of(model, {"a": 0.7})[""]
    (C, D, t), = factors_of(model, {"c": 1.0})[""]
    assert C.dtype == torch.float32
    torch.testing.assert_close(
        t * D.double() @ C.double(), s * B.double() @ A.double(), rtol=1e-6, atol=1e-6
    )
