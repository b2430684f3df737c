"""Linear calls on one value are computed together, in regions."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._dynamo.testing import CompileCounter

import lorafx
from lorafx._model.lower import joined, lower
from tests.support.grouped_models import X, Attention, Functional, Gated, Twice, in_place_on_x
from tests.support.internals import never_plain, replace_internal, watch_linears
from tests.support.oracle import Oracle, factors_of, frozen, randomise


def joins(module):
    """How many calls each `joined` of a region's code computes."""
    lowered = lower(module, module.graph, True)
    assert lowered.python_code("self").src.strip() == module.code.strip()
    return [len(node.args) - 1 for node in lowered.find_nodes(op="call_function", target=joined)]


@pytest.mark.parametrize(
    "build, sizes", [(Attention, [3]), (Gated, [2]), (Functional, [3]), (Twice, [3])]
)
@pytest.mark.parametrize("merge_from", [0.0, float("inf")], ids=["merged", "factored"])
def test_joined(build, sizes, merge_from, monkeypatch):
    replace_internal(monkeypatch, "merge_from", merge_from)
    base = build().double()
    fresh = lorafx.inject(base, rank=2, targets="linear")
    assert joins(fresh) == sizes and torch.equal(fresh(X), frozen(base)(X))
    model = randomise(fresh)
    alone = randomise(lorafx.inject(base, rank=2, targets="linear", group=False))
    oracle = Oracle(base, lorafx.sites(base), factors_of(model, {"default": 1.0}))
    for x in (X, X[0, 0], X[:, :0]):
        torch.testing.assert_close(model(x), oracle.model(x))
        torch.testing.assert_close(alone(x), oracle.model(x))
    oracle.model(X).square().sum().backward()
    for twin in (model, alone, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin(X).square().sum().backward()
        found = factors_of(twin, {"default": 1.0})
        gradients = [
            factor.grad for site in lorafx.sites(base) for factor in found[site.name][0][:2]
        ]
        torch.testing.assert_close(gradients, oracle.gradients())
    assert type(lorafx.eject(model)) is build and type(lorafx.merge(model)) is build
    torch.testing.assert_close(lorafx.merge(model)(X), oracle.model(X))
    assert joins(copy.deepcopy(model)) == sizes


def test_the_graph_stays_as_it_was_written():
    model = lorafx.inject(Gated(), targets="linear")
    assert type(model) is not Gated
    assert isinstance(model, Gated)
    assert isinstance(model, fx.GraphModule)
    called = [str(node.target) for node in model.graph.find_nodes(op="call_module")]
    assert called == ["gate", "act", "up", "down"]
    alone = lorafx.inject(Gated(), targets="linear", group=False)
    assert isinstance(alone, Gated) and not isinstance(alone, fx.GraphModule)
    assert "adapted_linear(" in alone.gate.code
    lorafx.add(alone, "b", targets="linear")
    assert not isinstance(alone, fx.GraphModule)


def in_place_on_a_view(self, x):
    x = x * 1
    first = x[..., :4]
    gate = self.gate(x)
    first.mul_(2)
    return self.down(gate * self.up(x))


def in_place_flag(self, x):
    x = x * 1
    gate = self.gate(x)
    gate = gate + F.relu(x, True).sum()
    return self.down(gate * self.up(x))


def in_place_by_a_module(self, x):
    x = x * 1
    gate = self.gate(x)
    gate = gate + self.act(x).sum()
    return self.down(gate * self.up(x))


@pytest.mark.parametrize(
    "forward", [in_place_on_x, in_place_on_a_view, in_place_flag, in_place_by_a_module]
)
def test_a_value_that_changes_in_between_is_read_twice(forward):
    base = type("Changing", (Gated,), {"forward": forward})().double()
    model = randomise(lorafx.inject(base, rank=2, targets="linear"))
    oracle = Oracle(base, lorafx.sites(base), factors_of(model, {"default": 1.0}))
    torch.testing.assert_close(model(X), oracle.model(X))
    by_a_module = forward is in_place_by_a_module  # which is called in its turn, and watched
    assert isinstance(model, fx.GraphModule) is by_a_module
    assert not by_a_module or joins(model) == [3]


def test_what_changes_nothing_may_stand_in_between():
    """An attention of which only q and v are adapted."""
    base = Attention().double()
    model = randomise(lorafx.inject(base, rank=2, targets=["q", "v"]))
    assert joins(model) == [3]  # k is called in its turn
    oracle = Oracle(base, lorafx.sites(base, ["q", "v"]), factors_of(model, {"default": 1.0}))
    torch.testing.assert_close(model(X), oracle.model(X))


class TestOneByOne:
    """Whatever is done to a member by itself is done as if there were no group."""

    @pytest.fixture
    def model(self):
        model = randomise(lorafx.inject(Attention().double(), rank=2, targets="linear"))
        with watch_linears() as linears:
            model.linears = linears.call_args_list
            yield model

    def called(self, model):
        model.linears.clear()
        model(X)
        return [len(call.args[1]) for call in model.linears] or [0]

    def test_joined(self, model):
        assert self.called(model) == [3, 1]

    @pytest.mark.parametrize("part", ["k", "k.lora"])
    @pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook",
                                      "register_full_backward_hook"])
    def test_a_hook(self, model, part, hook):
        seen, wanted = [], model(X)
        handle = getattr(model.get_submodule(part), hook)(lambda *_: seen.append(1) and None)
        assert max(self.called(model)) < 2
        y = model(X.clone().requires_grad_())
        y.sum().backward()
        assert seen
        torch.testing.assert_close(y, wanted)
        handle.remove()
        assert self.called(model) == [3, 1]

    def test_a_global_hook(self, model):
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
        called = self.called(model)
        handle.remove()
        assert max(called) < 2

    def test_another_forward_or_module(self, model):
        wanted = model(X)
        k = model.k
        k.forward = lambda x: type(k).forward(k, x) * 2
        doubled = model(X)
        del k.forward
        model.k = nn.Sequential(k)
        torch.testing.assert_close(model(X), wanted)
        assert not torch.allclose(doubled, wanted)

    def test_a_member_called_directly_is_adapted(self, model):
        k = model.k
        factors = k.lora.default
        torch.testing.assert_close(
            k(X), F.linear(X, k.frozen_weight + factors.B @ factors.A, k.bias)
        )


def test_a_member_that_is_compiled_by_itself_is_called():
    torch._dynamo.reset()
    model = randomise(lorafx.inject(Attention().double(), rank=2, targets="linear"))
    counter = CompileCounter()
    wanted = model(X)
    model.k.compile(backend=counter)
    torch.testing.assert_close(model(X), wanted)
    assert counter.frame_count == 1


def test_several_adapters_in_a_group():
    base = Attention().double()
    model = lorafx.inject(base, rank=2, targets="linear", adapter="a")
    lorafx.add(model, "b", rank=3, alpha=2.0, targets=["q", "v"])
    lorafx.activate(model, {"a": 0.7, "b": -1.3})
    randomise(model)
    found = factors_of(model, {"a": 0.7, "b": -1.3})
    oracle = Oracle(base, lorafx.sites(base), found)
    torch.testing.assert_close(model(X), oracle.model(X))
    with lorafx.disabled(model):
        assert torch.equal(model(X), frozen(base)(X))
    lorafx.remove(model, "a")
    lorafx.remove(model, "b")
    assert torch.equal(model(X), frozen(base)(X))


def two_derivatives(model, x):
    """The gradients of the norm of dX, with respect to all factors."""
    [dx] = torch.autograd.grad(model(x).sin().sum(), x, create_graph=True)
    return torch.autograd.grad(dx.square().sum(), list(lorafx.parameters(model)))


@pytest.mark.parametrize("build", [Attention, Twice])
def test_second_derivatives_of_a_layer_used_twice(build):
    """A factor in several places, or one from which x is computed, is counted once in each."""
    base = nn.Sequential(build(), nn.Tanh(), build()).double()
    base[2] = base[0]
    model = randomise(lorafx.inject(base, rank=2, targets="linear"))
    x = X.clone().requires_grad_()
    with never_plain():
        wanted = two_derivatives(model, x)
    torch.testing.assert_close(two_derivatives(model, x), wanted)


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.actor, self.critic = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.actor(x), self.critic(x)


def test_each_output_may_have_a_backward_pass_of_its_own():
    model = randomise(lorafx.inject(Heads().double()))
    for output in model(X):
        output.sum().backward()
    assert all(parameter.grad is not None for parameter in lorafx.parameters(model))


def test_outputs_without_an_active_adapter_need_no_gradient():
    model = lorafx.inject(Heads(), targets=["actor"])
    lorafx.add(model, "b", targets=["critic"])
    assert [y.requires_grad for y in model(X.float())] == [True, False]


def test_a_layer_with_a_call_of_its_own_is_called():
    class Loud(nn.Linear):
        def __call__(self, x):
            return super().__call__(x) * 2

    base = Heads()
    base.actor = Loud(8, 8)
    assert torch.equal(lorafx.inject(base)(X.float())[0], frozen(base)(X.float())[0])


def test_traced_and_mapped():
    model = randomise(lorafx.inject(Heads().double()))
    with pytest.warns((DeprecationWarning, torch.jit.TracerWarning)):
        traced = torch.jit.trace(model, X, check_trace=False)
    more = torch.cat([X, X])
    torch.testing.assert_close(traced(more), model(more))
    x = X.clone().requires_grad_()
    y, basis = model(x)[0], torch.eye(X.numel(), dtype=X.dtype).view(-1, *X.shape)[:5]
    [batched] = torch.autograd.grad(y, x, basis, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(y, x, v, retain_graph=True)[0] for v in basis]
    torch.testing.assert_close(batched, torch.stack(single))


class TestDropout:
    def test_only_in_training_and_only_in_the_branch(self):
        base = Attention().double()
        model = randomise(lorafx.inject(base, rank=2, targets="linear", dropout=0.5))
        oracle = Oracle(base, lorafx.sites(base), factors_of(model, {"default": 1.0})).model
        torch.testing.assert_close(model.eval()(X), oracle(X))
        assert not torch.equal(model.train()(X), model(X))
        with lorafx.disabled(model):
            assert torch.equal(model(X), frozen(base)(X))
        torch.testing.assert_close(lorafx.merge(model)(X), oracle(X))
        q = model.q
        mean = torch.stack([q(X) for _ in range(3000)]).mean(0)
        torch.testing.assert_close(mean, q.eval()(X), rtol=0, atol=0.2)

    def test_shared_in_a_group_only_when_asked(self):
        for share in (False, True):
            model = randomise(
                lorafx.inject(
                    Attention().double(), rank=2, targets="linear", dropout=0.5, share_dropout=share
                )
            )
            model.k.load_state_dict(model.v.state_dict())
            _, k, v = joined(X.clone().requires_grad_(), model.q, model.k, model.v)
            assert torch.allclose(k, v) is share

    def test_saved_with_the_adapter(self, tmp_path):
        base = Attention()
        lorafx.save(
            lorafx.inject(base, dropout=0.25, share_dropout=True), tmp_path / "a.safetensors"
        )
        factors = lorafx.load(base, tmp_path / "a.safetensors").q.lora.default
        assert (factors.dropout, factors.share_dropout) == (0.25, True)
        assert "dropout=0.25" in repr(factors)

    def test_where_python_reads_the_weight(self):
        """torch's attention multiplies by it, in parts; what needs the sum cannot drop out."""
        base = nn.MultiheadAttention(8, 2, batch_first=True).double()
        model = randomise(lorafx.inject(base, rank=2, targets="linear", dropout=0.5))
        oracle = Oracle(base, lorafx.sites(base), factors_of(model, {"default": 1.0})).model
        outputs = [model(X, X, X)[0] for _ in range(2)]
        assert not torch.equal(*outputs)
        with pytest.raises(lorafx.AdaptedWeightError, match="as a whole, where there is no input"):
            model.in_proj_weight.sum()
        torch.testing.assert_close(model.eval()(X, X, X)[0], oracle.eval()(X, X, X)[0])
