"""Each row of the table gives what its node gave, bit for bit, and again for other numbers."""

import types

import pytest
import torch
import torch.nn.functional as F

from lorafx._kernels.again import Proof, Proven
from lorafx._kernels.recipes import Step, recipe_of
from lorafx._kernels.rows import ROWS, Operand

W = torch.linspace(0.5, 2, 8)
SPLIT = torch.ops.aten.split_with_sizes.default


def norm(z, weight=W, bias=W - 1, eps=1e-5):
    return F.layer_norm(z, (8,), weight, bias, eps)


def attention(z):
    q = z.view(1, 2, 3, 8)
    return F.scaled_dot_product_attention(q, q + 1, q * 2)


# {node: (x of a z (6, 8) that has a producer, in which that node is the last)}
CASES = {
    "AddBackward0": lambda z: torch.add(z.exp(), z.tanh(), alpha=2),
    "SubBackward0": lambda z: torch.sub(z.exp(), z.tanh(), alpha=3),
    "MulBackward0": lambda z: z.exp() * W,
    "DivBackward0": lambda z: z.exp() / W,
    "NegBackward0": lambda z: -z.exp(),
    "SiluBackward0": F.silu,
    "GeluBackward0": lambda z: F.gelu(z, approximate="tanh"),
    "PowBackward0": lambda z: z.pow(3),
    "LogBackward0": lambda z: z.abs().log(),
    "AbsBackward0": torch.abs,
    "EluBackward0": F.selu,
    "LeakyReluBackward0": lambda z: F.leaky_relu(z, 0.3),
    "HardswishBackward0": F.hardswish,
    "HardtanhBackward0": F.relu6,
    "MishBackward0": F.mish,
    "SoftplusBackward0": lambda z: F.softplus(z, 2, 0.5),
    "GluBackward0": lambda z: F.glu(z, -1),
    "ReluBackward0": torch.relu,
    "TanhBackward0": torch.tanh,
    "SigmoidBackward0": torch.sigmoid,
    "ExpBackward0": torch.exp,
    "RsqrtBackward0": lambda z: z.abs().rsqrt(),
    "SqrtBackward0": lambda z: z.abs().sqrt(),
    "SoftmaxBackward0": lambda z: z.softmax(0),
    "LogSoftmaxBackward0": lambda z: z.log_softmax(-1),
    "ScaledDotProductFlashAttentionForCpuBackward0": attention,
    "NativeLayerNormBackward0": norm,
    "NativeDropoutBackward0": lambda z: torch.native_dropout(
        z.exp().unsqueeze(1).expand(6, 4, 8), 0.4, True)[0],
    "ToCopyBackward0": lambda z: z.exp().bfloat16(),
    "CloneBackward0": lambda z: z.exp().t().contiguous(),
    "AliasBackward0": lambda z: torch.ops.aten.alias(z.exp()),
    "ViewBackward0": lambda z: z.exp().view(2, -1, 8),
    "UnsafeViewBackward0": lambda z: z.exp().t().reshape(-1, 3),
    "ReshapeAliasBackward0": lambda z: torch.ops.aten._reshape_alias(z.exp(), (12, 4), (4, 1)),
    "SqueezeBackward0": lambda z: z.exp().view(1, 6, 8).squeeze(),
    "SqueezeBackward1": lambda z: z.exp().view(1, 6, 8).squeeze(-3),
    "UnsqueezeBackward0": lambda z: z.exp().unsqueeze(-2),
    "ExpandBackward0": lambda z: z.exp().view(6, 1, 8).expand(-1, 3, -1),
    "TBackward0": lambda z: z.exp().t(),
    "TransposeBackward0": lambda z: z.exp().view(2, 3, 8).transpose(-3, 1),
    "PermuteBackward0": lambda z: z.exp().view(2, 3, 8).permute(1, -1, 0),
    "SliceBackward0": lambda z: z.exp()[:, -6:-1:2],
    "SelectBackward0": lambda z: z.exp().view(2, 3, 8)[-1],
    "SplitBackward0": lambda z: z.exp().split(4, -1)[1],
    "SplitWithSizesBackward0": lambda z: SPLIT(z.exp(), [1, 3, 2])[1],
    "RollBackward0": lambda z: z.exp().roll((1, -2), (0, -1)),
    "ConstantPadNdBackward0": lambda z: F.pad(z.exp(), (0, 0, 0, 0)),
    "UnbindBackward0": lambda z: z.exp().view(2, 3, 8).unbind(-2)[2],
}


def value(name, seed=0):
    z = torch.randn(6, 8, generator=torch.Generator().manual_seed(seed)).mul_(2).requires_grad_()
    return CASES[name](z * 1)


def same(got, wanted):
    assert got.dtype == wanted.dtype and got.stride() == wanted.stride()
    assert got.shape == wanted.shape and torch.equal(got, wanted)


@pytest.mark.parametrize("name", CASES)
def test_a_row_gives_what_its_node_gave(name):
    x, other = value(name), value(name, seed=1)
    assert type(x.grad_fn).__name__ == name
    first, second = recipe_of(x), recipe_of(other)
    assert first.key == second.key and first.tree.node == name
    with torch.no_grad():
        for recipe, wanted in ((first, x), (second, other)):
            kept = recipe.tensors()
            before = [tensor.clone() for tensor in kept]
            same(recipe.computed(kept), wanted.detach())
            assert all(map(torch.equal, kept, before))  # nothing is written into them


class Raw:
    unpack_hook = None


def stand_in(name, **kept):
    """A node as torch makes it elsewhere, such as on a GPU."""
    attributes = {f"_saved_{key}": found for key, found in kept.items()}
    return type(name, (), attributes | {f"_raw_saved_{key}": Raw for key in kept})()


def output_of(node, x, number=0):
    """A stand-in for a tensor like x that a node has made."""
    return types.SimpleNamespace(grad_fn=node, output_nr=number, shape=x.shape, stride=x.stride,
                                 dtype=x.dtype, device=x.device)


ATTENTIONS = [name for name in ROWS if name.startswith("ScaledDot") and name not in CASES]


@pytest.mark.parametrize("name", [*ATTENTIONS, "FusedRmsNormBackward0"])
def test_rows_of_nodes_of_other_devices(name):
    z = torch.randn(6, 8)
    if name in ATTENTIONS:
        x, node = z, stand_in(name, output=z)
    else:
        x = F.rms_norm(z, (8,), W, 1e-5)
        rstd = (z.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
        node = stand_in(name, input=z, result1=rstd, weight=W, normalized_shape=[8])
    recipe = recipe_of(output_of(node, x))
    same(recipe.computed(recipe.tensors()), x)


def test_another_output_of_a_node_is_not_its_value():
    z = torch.randn(6, 8)
    node = stand_in(ATTENTIONS[0], output=z)
    assert recipe_of(output_of(node, z)) and recipe_of(output_of(node, z, number=1)) is None


def test_every_row_is_tried():
    assert {*CASES, *ATTENTIONS, "FusedRmsNormBackward0"} == set(ROWS)


def test_dropout_that_does_not_drop_is_told_from_dropout():
    z = torch.randn(40, 40, requires_grad=True) * 1
    kinds = set()
    for training in (True, False, True):
        x = torch.native_dropout(z.exp(), 0.3, training)[0]
        recipe = recipe_of(x)
        kinds.add(recipe.key)
        with torch.no_grad():
            same(recipe.computed(recipe.tensors()), x.detach())
    assert len(kinds) == 1


@pytest.mark.parametrize("p", [1e-3, 1.0])
def test_dropout_of_which_a_mask_tells_little_is_not_computed(p):
    x = torch.native_dropout((torch.randn(6, 8, requires_grad=True) * 1).exp(), p, True)[0]
    assert Proven().proof(recipe_of(x), x) is None


def test_a_recipe_goes_as_far_up_as_it_must():
    """Llama's: weight * (h * rsqrt(mean(h^2) + eps)).to(dtype), then gate and residual views."""
    h = torch.randn(2, 6, 8).bfloat16().requires_grad_() * 1
    wide = h.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    x = W.bfloat16() * normed.to(torch.bfloat16)
    recipe = recipe_of(x)
    assert [name for _, name in recipe.places] == ["self", "self", "other"]  # W, h, its norm
    with torch.no_grad():
        same(recipe.computed(recipe.tensors()), x.detach())


def test_what_was_computed_for_a_value_becomes_its_memory(monkeypatch):
    made, row = [], ROWS["SiluBackward0"]

    def silu(z):
        made.append(F.silu(z))
        return made[-1]

    monkeypatch.setitem(ROWS, "SiluBackward0", row._replace(function=silu))
    z = torch.randn(6, 8).requires_grad_() * 1
    narrow = z[:1] * 1
    for x, reused in ((F.silu(z) * W, True), (F.silu(narrow) * W.expand(6, 8), False)):
        recipe = recipe_of(x)
        with torch.no_grad():
            found = recipe.computed(recipe.tensors())
        same(found, x.detach())
        assert (found.data_ptr() == made[-1].data_ptr()) == reused


WITHOUT = {
    "a leaf": lambda z: torch.zeros(3, requires_grad=True),
    "a product of matrices": lambda z: z @ z.t(),
    "what a product is added to": lambda z: z.exp() + z @ torch.eye(8),
    "a constant that no node keeps": lambda z: z.exp() + 1,
    "a sum over many": lambda z: z.sum(0) * W,
    "too many nodes": lambda z: negated(z),
    "a bias that group_norm does not keep": lambda z: F.group_norm(z, 2, W, W),
}


def negated(z):
    z = z.exp()
    for _ in range(40):
        z = -z
    return z


@pytest.mark.parametrize("make", WITHOUT.values(), ids=WITHOUT)
def test_no_recipe(make):
    assert recipe_of(make(torch.randn(6, 8, requires_grad=True) * 1)) is None


def test_what_was_written_into_or_freed_is_no_beginning():
    z = torch.randn(6, 8, requires_grad=True) * 1
    x = F.silu(z)
    x.sum().backward()
    assert recipe_of(x) is None
    x = F.silu(z := z.detach().requires_grad_() * 1)
    z.add_(1)
    assert recipe_of(x) is None


NARROW = {"bfloat16": torch.bfloat16, "float16": torch.float16}
NORMS = {
    **{f"{affine}, {dtype}": (affine, dtype, dtype) for affine in ("both", "weight", "none")
       for dtype in (torch.float32, torch.float64)},
    **{f"{affine}, {name}, its weight float32": (affine, dtype, torch.float32)
       for affine in ("both", "weight") for name, dtype in NARROW.items()},
}


@pytest.mark.parametrize("affine, dtype, wide", NORMS.values(), ids=NORMS)
def test_a_layer_norm_needs_no_eps(affine, dtype, wide):
    """Not even where its input hardly varies, after it was proven where it does."""
    weight = None if affine == "none" else torch.randn(256, dtype=wide)
    bias = torch.randn(256, dtype=wide) if affine == "both" else None
    for eps in (1e-12, 3.7e-4):
        proven = Proven()
        for spread in (1.0, 1e-5):
            z = (torch.randn(70, 256) * spread).to(dtype).requires_grad_() * 1
            x = F.layer_norm(z, (256,), weight, bias, eps)
            recipe = recipe_of(x)
            assert proven.proof(recipe, x) == Proof()
            with torch.no_grad():
                same(recipe.computed(recipe.tensors()), x.detach())


def test_what_is_padded_with_an_unknown_number_is_not_computed():
    x = F.pad(torch.randn(6, 8, requires_grad=True).mul(1).exp(), (0, 0, 1, -1))
    assert Proven().proof(recipe_of(x), x) is None


def test_dropout_of_few_elements_may_drop_none_in_training():
    """What one mask that all rows share proves does not hold for the next."""
    proven, all_kept = Proven(), []
    for seed in (0, 0, 1, 2, 3, 4):
        torch.manual_seed(seed)
        z = torch.randn(40, 8, requires_grad=True) * 1
        gate, mask = torch.native_dropout(z[:1].exp(), 0.1, True)
        all_kept.append(bool(mask.all()))
        x = z.exp() + gate
        recipe = recipe_of(x)
        if proven.proof(recipe, x) is not None:
            with torch.no_grad():
                same(recipe.computed(recipe.tensors()), x.detach())
    assert not all_kept[0] and any(all_kept)


GUESSED = {
    "torch's default": (1e-5, (), True), "the model's": (1e-12, (1e-12,), True),
    "unknown": (1e-6, (1e-12,), False), "one of two that x does not tell": (
        1e-12, (1e-12, 1e-11), False)}


@pytest.mark.parametrize("eps, numbers, found", GUESSED.values(), ids=GUESSED)
def test_the_eps_of_rounded_statistics_is_a_guess_that_gives_x(eps, numbers, found):
    z = torch.randn(700, 256).bfloat16().requires_grad_() * 1
    x = F.layer_norm(z, (256,), torch.randn(256).bfloat16(), torch.randn(256).bfloat16(), eps)
    recipe = recipe_of(x)
    proof = Proven(numbers).proof(recipe, x)
    assert proof == (Proof(eps) if found else None)
    if proof is not None:
        with torch.no_grad():
            same(recipe.computed(recipe.tensors(), proof.guess), x.detach())


def test_torch_s_eps_is_none_where_x_does_not_tell_it():
    """Of what varies much, any eps gives x; of what comes later, only the right one."""
    z = (torch.randn(700, 256) * 30).bfloat16().requires_grad_() * 1
    x = F.layer_norm(z, (256,), torch.ones(256).bfloat16(), eps=1e-6)
    assert Proven().proof(recipe_of(x), x) is None
    x = F.layer_norm(z, (256,), torch.ones(256).bfloat16(), eps=1e-5)
    assert Proven([1e-5]).proof(recipe_of(x), x) == Proof(1e-5)  # which the model holds


def test_steps_tell_functions_apart():
    """The tree says all that decides what is computed."""
    z = torch.randn(6, 8, requires_grad=True) * 1
    keys = {recipe_of(make(z)).key for make in (
        F.gelu, lambda z: F.gelu(z, approximate="tanh"), F.silu, lambda z: z.pow(2),
        lambda z: z.pow(3), lambda z: z.exp()[1:], lambda z: z.exp()[:-1], lambda z: z.exp().t())}
    assert len(keys) == 8
    assert recipe_of(F.silu(z)).tree == Step("SiluBackward0", (), (0,))
    assert ROWS["SiluBackward0"].operands == (Operand("self"),)


def test_keys_tell_tensors_apart():
    """By dtype, shape and layout, of what is kept and of the value."""
    z = torch.randn(6, 8, requires_grad=True) * 1
    by_columns = z.t().contiguous().t()
    values = [F.silu(z), F.silu(z.double()), F.silu(z[1:]), F.silu(by_columns).contiguous(),
              F.silu(z).clone(memory_format=torch.contiguous_format),
              F.silu(z).t().contiguous(), F.silu(z).t().clone()]
    assert len({recipe_of(value).key for value in values}) == len(values)
