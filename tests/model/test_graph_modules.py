"""The injected model as a program: regions, copies, GraphModules, export, compile, summary."""

import copy
import html
import io
import pickle

import pytest
import torch
import torch._dynamo.testing
from torch import fx, nn
from torch.fx.passes.infra.pass_manager import PassManager

import lorafx
from tests.support.models import TOKENS, Block
from tests.support.oracle import factors_of, frozen, oracle, randomise


def test_a_region_is_a_graph_module_of_its_class():
    model = lorafx.inject(
        nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, bias=False), nn.Linear(3, 4))
    )
    assert isinstance(model[0], nn.Linear) and isinstance(model[0], fx.GraphModule)
    assert "lora = self.lora(input_1, linear)" in model[0].print_readable(False)
    assert "adapted_linear(input_1, weight, bias, lora_1)" in model[0].code
    assert type(model[0]) is type(model[1]) and type(model[2]) is nn.Linear
    assert repr(model[1]).startswith("Linear(") and model[0].in_features == 3
    model[1].graph.lint()
    assert lorafx.summary(model).code.count("def forward") == 1


def test_the_original_bias_may_come_later():
    base = nn.Linear(3, 3, bias=False)
    model = lorafx.inject(base)
    model.bias = nn.Parameter(torch.ones(3))
    x = torch.randn(2, 3)
    torch.testing.assert_close(model(x), base(x) + 1)


@pytest.mark.parametrize(
    "model", [Block(), nn.Linear(4, 4), fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4)))],
    ids=["break", "region", "graph module"]
)
def test_copies(model):
    x = TOKENS if isinstance(model, Block) else torch.randn(3, 4)
    model = randomise(lorafx.inject(model.eval()))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(twin(x), model(x))
        lorafx.add(twin, "b")
        torch.testing.assert_close(lorafx.merge(twin, "default")(x), model(x))
        assert torch.equal(lorafx.eject(twin)(x), lorafx.eject(model)(x))


def test_state_dict_round_trip(block):
    model, other = randomise(lorafx.inject(block)), lorafx.inject(Block().double().eval())
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(TOKENS), model(TOKENS))


def test_a_graph_module_keeps_its_hooked_or_shared_layers_as_regions():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
            self.leaf = nn.TransformerDecoder(nn.Identity(), 1)
            self.leaf.extra = self.c

        def forward(self, x):
            return self.c(self.b(self.a(x)))

    outer = Outer()
    outer.b.register_forward_hook(lambda module, args, output: output * 2)
    graph = fx.GraphModule(outer, fx.symbolic_trace(outer).graph)
    graph.leaf = outer.leaf
    model = lorafx.inject(graph)
    assert "self.a.lora(" in model.code
    assert "self.b.lora" not in model.code
    assert "self.c.lora" not in model.code
    assert isinstance(model.b, fx.GraphModule) and isinstance(model.c, fx.GraphModule)
    randomise(model)
    x = torch.randn(2, 3)
    torch.testing.assert_close(lorafx.merge(model)(x), model(x), rtol=1e-4, atol=1e-4)


def test_an_exported_program():
    base = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3, bias=False))
    x = torch.randn(2, 3)
    graph = torch.export.export(base, (x,)).module()
    assert [site.kind for site in lorafx.sites(graph)] == ["aten.linear", "aten.linear"]
    model = lorafx.inject(graph)
    assert torch.equal(model(x), base(x))
    randomise(model)
    factors = factors_of(model, {"default": 1.0})
    torch.testing.assert_close(model(x), oracle(frozen(base), lorafx.sites(base), factors, x))


def test_passes_run_in_torchs_pass_manager():
    base = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    graph, x = fx.symbolic_trace(base), torch.randn(2, 3)
    result = PassManager([lorafx.InjectLoRA(rank=2)], run_checks_after_each_pass=True)(graph)
    assert result.modified and "lora" in result.graph_module.code and "lora" not in graph.code
    randomise(result.graph_module)
    merged = PassManager([lorafx.MergeLoRA()])(result.graph_module).graph_module
    assert merged.code == graph.code
    torch.testing.assert_close(merged(x), result.graph_module(x))


def test_compile_and_export(block):
    model = randomise(lorafx.inject(block, targets="linear"))
    expected = model(TOKENS)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(TOKENS), expected)
    for strict in (False, True):
        program = torch.export.export(model, (TOKENS,), strict=strict)
        torch.testing.assert_close(program.module()(TOKENS), expected)
        assert not program.constants and {*program.state_dict} == {*model.state_dict()}


# Dynamo itself looks at .grad.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_layers_compiled_one_by_one_share_a_graph():
    torch._dynamo.reset()
    model = lorafx.inject(nn.Sequential(*(nn.Linear(4, 4) for _ in range(12))))
    counter = torch._dynamo.testing.CompileCounter()
    for layer in model:
        layer.compile(backend=counter)
    model(torch.randn(2, 4))
    assert counter.frame_count <= 2


def test_summary(block):
    model = lorafx.inject(block, rank=2, targets=["square", "up"])
    found = lorafx.summary(model)
    assert (
        found.trainable
        == 2 * (5 + 5) + 2 * (3 + 5)
        == sum(p.numel() for p in lorafx.parameters(model))
    )
    assert found.total == sum(p.numel() for p in model.parameters())
    assert [site.name for site in found.sites] == ["square", "up"]
    assert found.sites[1].ranks == {"default": 2}
    assert str(found).splitlines()[0].startswith("2 sites adapted, active: default x 1; 36 of ")
    assert ">square</td>" in found._repr_html_()
    lorafx.remove(model, "default")
    assert str(lorafx.summary(model)).startswith("0 sites adapted, active: none; 0 of ")


def test_a_summary_shows_what_was_skipped_and_graph_breaks_on_request():
    class Net(nn.Sequential):
        pass

    found = lorafx.summary(lorafx.inject(Net(nn.Linear(3, 3), nn.Conv1d(3, 3, 1))))
    assert list(found.breaks) == [""] and found.breaks[""].startswith("Net: forward loops")
    assert list(found.skipped) == ["1"] and "Conv1d" in found.skipped["1"]
    text, page = str(found), found._repr_html_()
    assert f"skipped:\n  1: {found.skipped['1']}" in text
    row = [">why</th>", ">1</td>", f">{html.escape(found.skipped['1'])}</td>"]
    assert all(cell in page for cell in row)
    assert "Net: forward" not in text and "Net: forward" not in page
    whole = lorafx.summary(lorafx.inject(nn.Sequential(nn.Linear(3, 3))))
    assert "skipped" not in str(whole) and "skipped" not in whole._repr_html_()


def test_breaks_and_skipped_are_named():
    model = nn.Sequential(
        nn.Linear(3, 3), nn.Conv1d(3, 3, 1), nn.LSTM(3, 3), nn.MultiheadAttention(4, 2)
    )
    found = lorafx.summary(lorafx.inject(model))
    assert {"1", "2.weight_ih_l0", "2.weight_hh_l0"} == set(found.skipped)
    assert "Sequential: forward loops" in found.breaks[""]
    assert (
        found.skipped["2.weight_ih_l0"]
        == "a recurrent layer (LSTM), which lorafx does not adapt yet"
    )


@pytest.mark.filterwarnings(
    "ignore:torch.quantize_per_tensor, torch.quantize_per_channel and other"
)
def test_quantised_layers_are_named():
    model = nn.Sequential(torch.ao.nn.quantized.Linear(4, 4), nn.Linear(4, 4))
    assert "its weight is packed" in lorafx.summary(lorafx.inject(model)).skipped["0"]
    with pytest.raises(lorafx.NoSiteError, match="'0' cannot be adapted: its weight is packed"):
        lorafx.inject(model, targets="0")


class Partly(nn.Module):
    """One weight read by a linear call and by something else in one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.other = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.layer(x)) + self.layer.weight.norm() * self.layer.weight.shape[0]


def test_what_else_reads_a_weight_reads_it_adapted():
    model = randomise(lorafx.inject(Partly(), targets="linear"))
    x = torch.randn(4, 3)
    torch.testing.assert_close(lorafx.merge(model)(x), model(x))


def test_replicas_and_new_instances():
    """What data-parallel training, and code that calls type(layer)(...), do with a layer."""
    layer = randomise(lorafx.inject(nn.Linear(3, 3)))
    replica = layer._replicate_for_data_parallel()
    for name, parameter in layer._parameters.items():
        setattr(replica, name, parameter.clone())
    x = torch.randn(2, 3)
    assert torch.equal(replica(x), layer(x)) and not list(replica.parameters(recurse=False))
    assert type(type(layer)(3, 4, bias=False)) is nn.Linear


def test_lint_finds_what_is_not_there():
    model = lorafx.inject(nn.Linear(3, 3, bias=False))
    model.graph.lint()
    del model.lora
    with pytest.raises(AttributeError, match="lora"):
        model.graph.lint()


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
