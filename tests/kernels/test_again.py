"""x is computed again only where that is right, whatever autograd is asked for; else it is kept."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lorafx._kernels import again, rows
from lorafx._kernels.again import Proof, Proven
from lorafx._kernels.linears import linears
from tests.support.internals import replace_internal
from tests.support.linear_calls import calls_of, factors
from tests.support.recomputed import WIDTH, check_same, gradients, keeps_x, leaf, produced, site


pytestmark = pytest.mark.usefixtures("recomputed_both_ways")


def test_the_gradients_are_the_same_bits():
    lean, full = site()
    for seed in range(3):
        z = leaf(3, 5, WIDTH, seed=seed)
        assert not keeps_x(linears(produced(z), [lean])[0])
        assert keeps_x(linears(produced(z), [full])[0])
        check_same(gradients(lean, z), gradients(full, z))


def test_several_inputs_that_live_at_once():
    lean, full = site()
    zs = [leaf(seed=seed) for seed in range(2)]
    xs = [produced(z) for z in zs]
    outputs = [linears(x, [lean])[0] for x in (*xs, *xs)]
    for z, y in zip((*zs, *zs), outputs):
        check_same(torch.autograd.grad(y.sin().sum(), [z, *factors([lean])], retain_graph=True),
                   gradients(full, z))


def test_a_recipe_that_does_not_give_x_is_not_used(monkeypatch):
    row = rows.ROWS["SiluBackward0"]
    monkeypatch.setitem(rows.ROWS, "SiluBackward0", row._replace(function=F.mish))
    lean, full = site()
    assert keeps_x(linears(produced(leaf()), [lean])[0])
    check_same(gradients(lean, leaf()), gradients(full, leaf()))


def test_it_is_tried_once_a_kind(monkeypatch):
    tried, proof = [], again._proof
    monkeypatch.setattr(again, "_proof", lambda *given: tried.append(0) or proof(*given))
    lean, _ = site()
    kinds = [leaf(), leaf(5, WIDTH), leaf(2, 2, WIDTH), leaf(WIDTH, 4).t()]
    for number, z in enumerate(kinds, 1):
        for _ in range(2):
            linears(produced(z), [lean])
            assert len(tried) == number
    other, _ = site()
    linears(produced(leaf()), [other])
    assert len(tried) == 5  # a site proves for itself
    for training in (False, True):
        linears(F.dropout(produced(leaf()), 0.5, training), [lean])
    assert len(tried) == 6  # and another mode of the model has other nodes


def test_few_kinds_are_remembered(monkeypatch):
    monkeypatch.setattr(again, "MOST_KINDS", 2)
    lean, _ = site()
    for length in range(1, 6):
        linears(produced(leaf(length, WIDTH)), [lean])
    assert len(lean.addends[0].proven._proofs) <= 2


KEPT = {
    "a leaf": lambda z: z,
    "no gradient": lambda z: F.silu(z.detach()),
    "a product of matrices": lambda z: z @ torch.eye(WIDTH),
    "a view of what is kept": lambda z: (z * 1).exp().view(4, WIDTH),
    "written into": lambda z: F.silu(z * 1).mul_(2),
    "written into unseen": lambda z: written_into(F.silu(z * 1)),
    "another class": lambda z: F.silu(z * 1).as_subclass(Sub),
    "computed from another class": lambda z: F.silu(z * 1) * torch.ones(WIDTH).as_subclass(Quiet),
}


class Sub(torch.Tensor):
    pass


class Quiet(torch.Tensor):
    """Of what is computed from it, nothing is of this class."""

    __torch_function__ = torch._C._disabled_torch_function_impl


def written_into(x):
    with torch.no_grad():
        x.mul_(2)
    return x


@pytest.mark.parametrize("make", KEPT.values(), ids=KEPT)
def test_x_is_kept(make):
    lean, full = site()
    z = leaf()
    if make is KEPT["written into unseen"]:  # proven before somebody comes to write
        linears(produced(z), [lean])
    if make is not KEPT["another class"]:
        assert keeps_x(linears(make(z), [lean])[0])
    inputs = factors([lean])
    got, wanted = (torch.autograd.grad(linears(make(z), [call])[0].sin().sum(), inputs)
                   for call in (lean, full))
    check_same(got, wanted)


def test_small_inputs_are_kept(monkeypatch):
    replace_internal(monkeypatch, "kept_below", 4 * (4 * WIDTH + 1))
    lean, _ = site()
    assert keeps_x(linears(produced(leaf()), [lean])[0])
    assert not keeps_x(linears(produced(leaf(5, WIDTH)), [lean])[0])


def test_frozen_factors_do_not_need_x():
    lean, full = site()
    for factor in factors([lean]):
        factor.requires_grad_(False)
    z = leaf()
    got, wanted = (torch.autograd.grad(linears(produced(z), [call])[0].sum(), z)
                   for call in (lean, full))
    check_same(got, wanted)


def test_who_writes_into_x_later_does_no_harm():
    """The gradient is that of x as it was."""
    lean, full = site()
    z = leaf()
    wanted = gradients(full, z)
    x = produced(z)
    y = linears(x, [lean])[0]
    with torch.no_grad():
        x.zero_()
    check_same(torch.autograd.grad(y.sin().sum(), [z, *factors([lean])]), wanted)


def test_who_writes_into_what_is_kept_is_told():
    lean, _ = site()
    inside = leaf() * 1
    y = linears(F.silu(inside), [lean])[0]
    inside.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation: a torch.float32"):
        torch.autograd.grad(y.sum(), factors([lean]))


def test_memory_that_is_freed():
    """As FSDP frees a norm's weight: before the call x is kept, after it the error says so."""
    lean, full = site()
    z, weight = leaf(), torch.ones(WIDTH)
    for freed_before in (False, True):
        x = F.layer_norm(z * 1, (WIDTH,), weight)
        if freed_before:
            weight.untyped_storage().resize_(0)
        y = linears(x, [lean])[0]
        assert keeps_x(y) == freed_before
        if not freed_before:
            weight.untyped_storage().resize_(0)
            with pytest.raises(RuntimeError, match="was freed before the backward pass: free it"):
                torch.autograd.grad(y.sum(), factors([lean]))
            weight.untyped_storage().resize_(weight.nbytes)
            weight.data.fill_(1)
    wanted = torch.autograd.grad(linears(x, [full])[0].sum(), factors([full]))
    check_same(torch.autograd.grad(y.sum(), factors([lean])), wanted)


def test_hooks_on_what_is_kept():
    """They see x, as ever; and x is kept where they were set around its producer only."""
    lean, full = site()
    z, unpacked = leaf(), []

    def unpack(tensor):
        unpacked.append(tensor)
        return tensor.clone()

    packed = []
    with saved_tensors_hooks(lambda t: packed.append(t) or t, unpack):
        x = produced(z)
        y = linears(x, [lean])[0]
    assert any(tensor.data_ptr() == x.data_ptr() for tensor in packed) and not unpacked
    check_same(torch.autograd.grad(y.sin().sum(), [z, *factors([lean])]), gradients(full, z))
    x = produced(z)
    with saved_tensors_hooks(lambda t: t, unpack):
        y = linears(x, [lean])[0]
    check_same(torch.autograd.grad(y.sin().sum(), [z, *factors([lean])]), gradients(full, z))
    unpacked.clear()
    with saved_tensors_hooks(lambda t: t, unpack):
        x = produced(z)
    y = linears(x, [lean])[0]
    assert not unpacked and keeps_x(y)
    check_same(torch.autograd.grad(y.sin().sum(), [z, *factors([lean])]), gradients(full, z))


def offloaded(function, z):
    with save_on_cpu():
        return function(z)


RUNS = {
    "checkpointed": lambda function, z: checkpoint(function, z, use_reentrant=False),
    "offloaded": offloaded,
    "differentiated twice": lambda function, z: function(z),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_contexts(run):
    lean, full = site()
    for seed in range(2):
        z = leaf(seed=seed)
        check_same(gradients(lean, z, run=run), gradients(full, z, run=run))


def test_reentrant_checkpoints():
    lean, full = site()
    found = []
    for call in (lean, lean, full):
        z = leaf()
        checkpoint(lambda z: linears(produced(z), [call])[0], z, use_reentrant=True).sin().sum(
        ).backward()
        found.append([tensor.grad.clone() for tensor in (z, *factors([call]))])
        for tensor in factors([call]):
            tensor.grad = None
    check_same(found[0], found[2])
    check_same(found[1], found[2])


def test_a_call_behind_a_checkpoint_does_not_run_it():
    lean, full = site()
    runs, z = [], leaf()

    def layer(z):
        runs.append(0)
        return produced(z)

    x = checkpoint(layer, z, use_reentrant=False)
    y = linears(x, [lean])[0]
    assert len(runs) == 1 and keeps_x(y)
    check_same(torch.autograd.grad(y.sin().sum(), [z, *factors([lean])]), gradients(full, z))


def test_double_backward():
    lean, full = site(dtype=torch.float64)
    z = leaf(dtype=torch.float64)

    def twice(y, inputs):
        first = torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    def scaled(z):
        return produced(z) * torch.linspace(1, 2, WIDTH, dtype=torch.float64)

    for make in (produced, scaled):
        assert not keeps_x(linears(make(z), [lean])[0])
        found = [gradients(call, z, make, backward=twice) for call in (lean, full)]
        for got, wanted in zip(*found):
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)

    def by_factors(z, *values):
        [addend] = lean.addends
        given = addend._replace(left=values[0], right=values[1])
        return linears(produced(z), [lean._replace(addends=[given])])[0]

    assert torch.autograd.gradgradcheck(by_factors, (z, *factors([lean])))


def test_transforms():
    lean, full = site(dtype=torch.float64)
    z = leaf(dtype=torch.float64)

    def function(call):
        return lambda z: linears(produced(z), [call])[0].sin().sum()

    def by_rows(function):
        return torch.func.vmap(torch.func.grad(lambda row: function(row[None])))

    for transform in (torch.func.grad, torch.func.hessian, by_rows):
        torch.testing.assert_close(transform(function(lean))(z), transform(function(full))(z))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(z.detach(), torch.ones_like(z))
        tangents = [torch.autograd.forward_ad.unpack_dual(function(call)(dual)).tangent
                    for call in (lean, full)]
    torch.testing.assert_close(*tangents)
    batch = torch.eye(4 * WIDTH, dtype=torch.float64).view(-1, 4, WIDTH)
    found = []
    for call in (lean, full):
        y = linears(produced(z), [call])[0]
        found += torch.autograd.grad(y, z, batch, is_grads_batched=True)
    torch.testing.assert_close(*found)


def test_several_backward_passes_and_no_more():
    lean, full = site()
    z = leaf()
    wanted = gradients(full, z)
    y = linears(produced(z), [lean])[0].sin().sum()
    inputs = [z, *factors([lean])]
    for _ in range(3):
        check_same(torch.autograd.grad(y, inputs, retain_graph=True), wanted)
    torch.autograd.grad(y, inputs)
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        torch.autograd.grad(y, inputs)


def test_a_part_of_the_graph():
    """The gradients of A and B alone; and those after the nodes above have been run and freed."""
    lean, full = site()
    z = leaf()
    wanted = gradients(full, z)
    x = produced(z)
    y = linears(x, [lean])[0].sin().sum()
    check_same(torch.autograd.grad(y, factors([lean]), retain_graph=True), wanted[1:])
    torch.autograd.grad(x.sum(), z)  # frees what silu keeps
    check_same(torch.autograd.grad(y, factors([lean])), wanted[1:])


def test_autocast():
    found = []
    for call in site():
        z = leaf()
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                x = F.layer_norm(z * 1, (WIDTH,)) * torch.ones(WIDTH)
                y = linears(x, [call])[0]
            assert y.dtype == torch.bfloat16
        found.append(torch.autograd.grad(y.float().sin().sum(), [z, *factors([call])]))
    check_same(*found)


def test_nans_and_signs_of_zeros():
    lean, full = site()
    z = leaf()
    with torch.no_grad():
        z[0, :4] = torch.tensor([float("nan"), float("inf"), -0.0, 0.0])
    assert not keeps_x(linears(produced(z), [lean])[0])
    for got, wanted in zip(gradients(lean, z), gradients(full, z)):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


def test_hooks_on_tensors():
    found = []
    for call in site():
        z = leaf()
        x = produced(z)
        x.register_hook(lambda g: 2 * g)
        x.retain_grad()
        y = linears(x, [call])[0]
        found.append([*torch.autograd.grad(y.sin().sum(), [z, x, *factors([call])])])
    check_same(*found)


def test_a_joined_call():
    """q, k and v: one node, one value."""
    torch.manual_seed(0)
    full = calls_of(WIDTH, (WIDTH, 8, 8), torch.float32)
    proven = Proven()
    lean = [call._replace(addends=[a._replace(proven=proven) for a in call.addends])
            for call in full]
    found, z = [], leaf()
    for calls in (lean, full):
        outputs = linears(produced(z), calls)
        assert keeps_x(outputs[0]) == (calls is full)
        total = sum(y.sin().sum() for y in outputs)
        found.append(torch.autograd.grad(total, [z, *factors(calls)]))
    check_same(*found)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("shape", [(4, WIDTH), (2, 3, WIDTH)])
def test_a_product_beside_one_that_is_python_s(shape, autocast):
    """x M + s x A^T B^T where Python multiplies by an adapted weight that it has read."""
    z, found = leaf(*shape), []
    for call in site():
        [addend] = call.addends
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # keeps x cast
            y = addend.transposed.add_right_product(torch.zeros(*shape[:-1], WIDTH), produced(z))
        product = y.grad_fn.next_functions[1][0]  # of h with B^T, after views where there are more
        while type(product).__name__ != "MmBackward0":
            product = product.next_functions[0][0]
        if not autocast:
            assert keeps_x(product.next_functions[0][0]) == (addend.proven is None)
        found.append(torch.autograd.grad(y.sin().sum(), [z, *factors([call])]))
    check_same(*found)


def test_branches_that_drop_out():
    lean, full = (call._replace(addends=[a._replace(dropout=0.5) for a in call.addends])
                  for call in site())
    found, z = [], leaf()
    for call in (lean, full):
        torch.manual_seed(1)
        found.append(gradients(call, z))
    check_same(*found)


def test_copies_prove_again():
    proven = Proven([1e-6])
    proven._proofs["kind"] = Proof()
    for twin in (copy.deepcopy(proven), pickle.loads(pickle.dumps(proven))):
        assert not twin._proofs and twin.guesses == (1e-6,)
