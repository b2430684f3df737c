"""Small promises that larger tests would not miss: each was broken once on purpose and is caught here."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from oracle import factors_of, fingerprint, frozen, oracle, randomise
from torch import fx, nn

import lorafx
from lorafx._trace import trace
from lorafx._watch import Unsound


def test_no_copy_of_an_activation_is_saved():
    """A bfloat16 base with float32 adapters saves x and the narrow h for backward: no float32 copy of x."""
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


def test_cached_tensors_of_a_graph_are_copied_by_value():
    base = nn.Sequential(nn.Linear(3, 3))
    base.cache = base[0].weight * 2
    model = lorafx.inject(base)
    assert torch.equal(model.cache, base.cache) and model.cache is not base.cache and not model.cache.requires_grad


def test_parameters_keep_their_own_attributes():
    base = nn.Linear(3, 3)
    base.weight.no_decay = True
    model = lorafx.inject(base)
    assert model.weight.no_decay and lorafx.merge(model).weight.no_decay


def test_a_buffer_on_a_parameter_stays_one():
    base = nn.Linear(3, 3)
    base.register_buffer("view", base.weight.data)
    base.register_buffer("own", torch.ones(2))
    model = lorafx.inject(base)
    with torch.no_grad():
        base.weight.mul_(2)
        base.own.mul_(2)
    assert torch.equal(model.view, base.weight) and model.own.sum() == 2


def test_node_meta_is_copied():
    graph = fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3)))
    for node in graph.graph.nodes:
        node.meta["mark"] = node.name
    nodes = list(lorafx.inject(graph).graph.nodes)
    assert [node.meta["mark"] for node in nodes] == ["input_1", "_0", "_0", "output"]


def test_regions_of_one_code_but_other_functions_differ():
    def edited(function):
        model = lorafx.inject(nn.Linear(3, 3))
        output = next(node for node in model.graph.nodes if node.op == "output")
        with model.graph.inserting_before(output):
            output.args = (model.graph.call_function(function, output.args),)
        model.recompile()
        return model

    def make(factor):
        def function(x):
            return x * factor
        return function

    x, (twice, thrice) = torch.randn(2, 3), (edited(make(2)), edited(make(3)))
    assert twice.code == thrice.code and type(twice) is not type(thrice)
    torch.testing.assert_close(twice(x) / 2, frozen(lorafx.eject(twice))(x))
    torch.testing.assert_close(thrice(x) / 3, frozen(lorafx.eject(thrice))(x))


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 3))

    def forward(self, x):
        return F.linear(x, self.w.transpose(dim0=0, dim1=1))


def helper(x, scales=[1.0, 2.0]):  # noqa: B006 (a default that may change is the point)
    return x * scales[0]


class Defaults(Keywords):
    def forward(self, x):
        return helper(F.linear(x, self.w))


class Signed(Keywords):
    def forward(self, x):
        return F.linear(x, self.w)

    forward.__signature__ = "(self, x, y=None)"


class Named(Keywords):
    @property
    def matrix(self):
        return self.w

    def forward(self, x):
        for _ in range(1):
            x = F.linear(x, self.matrix)
        return x


def test_traps_of_other_kinds():
    assert not trace(Keywords()).find_nodes(op="placeholder")[0].users == {}
    for cls, reason in ((Defaults, "is given `scales`, a list"), (Signed, "declares another signature")):
        with pytest.raises(Unsound, match=reason):
            trace(cls())
    patched = Keywords()
    patched.forward = lambda x: x
    with pytest.raises(Unsound, match="this instance has a forward of its own"):
        trace(patched)


def test_a_metaclass_is_not_woken():
    known = {}

    class Meta(type):
        def __init__(cls, name, bases, space):
            known[name] = cls

    class Layer(nn.Linear, metaclass=Meta):
        pass

    assert not lorafx.sites(nn.Sequential(Layer(3, 3), nn.Linear(3, 3)), "1")[0].aliases and known["Layer"] is Layer


def test_copies_within_disabled_are_refused():
    model = lorafx.inject(nn.Linear(3, 3))
    with lorafx.disabled(model):
        for call in (copy.deepcopy, pickle.dumps, lorafx.merge, lorafx.eject):
            with pytest.raises(lorafx.AdapterError, match="adapters are disabled: copy, pickle, merge or eject"):
                call(model)
    copy.deepcopy(model)


def test_a_model_that_grows_after_injection():
    model = randomise(lorafx.inject(nn.Sequential(nn.Linear(3, 3))))
    model.append(nn.Linear(3, 2))
    x = torch.randn(4, 3)
    torch.testing.assert_close(lorafx.merge(model)(x), model(x))
    assert len(lorafx.eject(model)) == 2
    with pytest.raises(RuntimeError):  # a parametrization keeps what it reads
        nn.utils.parametrizations.weight_norm(model[0])
    model[0] = nn.Linear(3, 3)


def test_a_module_trained_whole_survives_assignment():
    model = lorafx.inject(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), targets="0", trainable="1")
    model.load_state_dict({key: value + 1 for key, value in model.state_dict().items()}, assign=True)
    tensors = dict(lorafx.named_parameters(model))
    model(torch.randn(2, 3)).sum().backward()
    assert all(tensor.grad is not None for tensor in tensors.values())


def test_composition_of_narrow_adapters_is_wide():
    base = nn.Linear(17, 17).bfloat16()
    model = randomise(lorafx.inject(base, 4, alpha=3, dtype=torch.bfloat16, adapter="a"))
    lorafx.compose(model, {"a": 0.7}, "c")
    (A, B, s), = factors_of(model, {"a": 0.7})[""]
    (C, D, t), = factors_of(model, {"c": 1.0})[""]
    assert C.dtype == torch.float32
    torch.testing.assert_close(t * D.double() @ C.double(), s * B.double() @ A.double(), rtol=1e-6, atol=1e-6)


def test_inference_mode_does_not_reach_the_adapters():
    base = nn.Linear(3, 3)
    before = fingerprint(base)
    with torch.inference_mode():
        model = lorafx.inject(base)
        lorafx.add(model, "b")
    lorafx.activate(model, ["default", "b"])
    model(torch.randn(2, 3)).sum().backward()
    assert all(p.grad is not None for p in lorafx.parameters(model)) and fingerprint(base) == before


def test_one_parameter_under_two_attributes():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))
            self.b = self.a

        def forward(self, x):
            return F.linear(F.linear(x, self.b), self.a)

    base = Two()
    model, x = randomise(lorafx.inject(base)), torch.randn(2, 3, dtype=torch.float64)
    [site] = lorafx.sites(base)
    assert site.names == ("a", "b")
    torch.testing.assert_close(model(x), oracle(frozen(base), [site], factors_of(model, {"default": 1.0}), x))
    torch.testing.assert_close(lorafx.merge(model)(x), model(x))
    assert lorafx.merge(model).a is not None and str(lorafx.summary(model))
