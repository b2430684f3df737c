"""What packed layers do besides: repacking, layers that are not linear, readers, compiling."""

import copy
import warnings
from typing import Any

import bitsandbytes
import pytest
import torch
import torchao.quantization as torchao
from torch import Tensor, nn

import lorafx
from tests.quantised.test_formats import far, fill
from tests.support.quantised import FORMATS, WIDTH, Grouped, network


def unpacked(layer: Any) -> Tensor:
    """W, as a copy of the layer says in its state_dict, which unpacks what was packed for a CPU."""
    twin = copy.deepcopy(layer)
    twin.state_dict()
    return bitsandbytes.functional.dequantize_4bit(twin.weight.data, twin.weight.quant_state)


def test_copies_share_what_is_packed_and_own_how() -> None:
    base = network("nf4")
    model = lorafx.inject(base, rank=2, targets="linear")
    ours, theirs = model[0].weight.quant_state, base[0].weight.quant_state
    assert ours is not theirs and model[0].quant_state is ours
    assert ours.absmax is theirs.absmax and ours.state2.absmax is theirs.state2.absmax
    assert model[0].weight.data_ptr() == base[0].weight.data_ptr()
    eight = network("int8")
    eight(torch.randn(2, WIDTH))  # moves what is packed into its state
    model = lorafx.inject(eight, rank=2, targets="linear")
    assert model[0].state is not eight[0].state and model[0].state.CB is eight[0].state.CB


@pytest.mark.parametrize("order", ["base first", "model first"])
def test_either_may_be_repacked_by_its_calls(order: str) -> None:
    """bitsandbytes packs anew, in place, when a CPU calls a layer in eval: each its own."""
    base, x = network("fp4"), torch.randn(4, WIDTH)
    trained = base(x)
    model = lorafx.inject(base, rank=2, targets="linear")
    models = [base, model] if order == "base first" else [model, base]
    results = [m.eval()(x) for m in models]
    assert torch.equal(*results) and far(results[0], trained) < 3e-2
    results = [m(x) for m in models]
    assert torch.equal(*results) and far(results[0], trained) < 3e-2
    again = lorafx.inject(base, rank=2, targets="linear")
    assert torch.equal(again(x), base(x)) and torch.equal(lorafx.eject(model)(x), base(x))
    assert far(unpacked(model[0]), unpacked(base[0])) == 0


def test_training_after_an_evaluation_has_the_whole_gradient() -> None:
    """Packed for a CPU, a layer's own product has no derivative any more."""
    base, x = network("nf4"), torch.randn(4, WIDTH)
    model = fill(lorafx.inject(base, rank=2, targets="linear"))
    gradients = []
    for _ in range(2):
        model.train().zero_grad()
        model(x).square().sum().backward()
        gradients.append([f.grad.clone() for f in lorafx.parameters(model)])
        with torch.no_grad():
            model.eval()(x)
    for before, after in zip(*gradients):
        assert far(after, before) < 3e-2


def test_what_merging_reads_of_a_repacked_layer() -> None:
    base, x = network("nf4"), torch.randn(4, WIDTH)
    model = fill(lorafx.inject(base, rank=2, targets="linear"))
    W = lorafx.merge(model)[0].weight
    with torch.no_grad():
        model.eval()(x)
    assert far(lorafx.merge(model)[0].weight, W) < 3e-3  # scales in bfloat16


def test_half_precision_loses_no_gradient() -> None:
    """Gradients of float32 A and B are summed in float32, beside a base in bfloat16."""
    base = network("nf4 in bfloat16")
    model = fill(lorafx.inject(base, rank=2, targets=["0"]))
    x = torch.randn(4096, WIDTH, dtype=torch.bfloat16)
    y = model[0](x)
    direction = torch.randn_like(y)
    y.backward(direction)
    A, B = lorafx.parameters(model)
    exact_B = direction.double().t() @ (x.double() @ A.detach().double().t())
    exact_A = (direction.double() @ B.detach().double()).t() @ x.double()
    assert far(B.grad, exact_B) < 1e-5 and far(A.grad, exact_A) < 1e-5


class Rectified(Grouped):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Detached(Grouped):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


class Narrow(Grouped):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., 1:]


class Raises(Grouped):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("no kernel")


@pytest.mark.parametrize("kind, reason", [
    (Rectified, "not affine"), (Detached, "no gradient"), (Narrow, r"no x W\^T \+ b"),
    (Raises, "no kernel")])
def test_a_layer_that_is_not_shown_to_be_linear_is_left_alone(kind: Any, reason: str) -> None:
    with pytest.raises(lorafx.NoSiteError, match=reason):
        lorafx.inject(nn.Sequential(kind(WIDTH, WIDTH)), targets="linear")


class Scaled(bitsandbytes.nn.Linear4bit):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_class_that_overrides_the_forward_of_a_known_one_is_left_alone() -> None:
    base = nn.Sequential(Scaled(WIDTH, WIDTH, compute_dtype=torch.float32).to("cpu"))
    with pytest.raises(lorafx.NoSiteError, match="not that of a Linear4bit"):
        lorafx.inject(base)
    relu = torch.ao.nn.intrinsic.quantized.dynamic.LinearReLU(WIDTH, WIDTH)
    with pytest.raises(lorafx.NoSiteError, match="not that of a Linear"):
        lorafx.inject(nn.Sequential(relu))


def test_looking_at_a_layer_draws_no_random_numbers() -> None:
    base = nn.Sequential(Grouped(WIDTH, WIDTH))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert [site.kind for site in lorafx.sites(base)] == ["layer"]
    assert torch.equal(torch.get_rng_state(), before)


def test_quantising_its_input_without_a_derivative_is_said() -> None:
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    torchao.quantize_(net, torchao.Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(lorafx.NoSiteError, match="quantises its input too"):
        lorafx.inject(net)


def test_quantising_after_injection_leaves_the_adapter_beside_it() -> None:
    base, x = nn.Sequential(nn.Linear(WIDTH, WIDTH)), torch.randn(3, WIDTH)
    model = fill(lorafx.inject(base, rank=2), 0.3)
    added = model(x) - base(x)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    torchao.quantize_(base, torchao.Int8WeightOnlyConfig())
    assert far(model(x) - base(x), added) < 1e-5
    read = nn.functional.linear(x, model[0].weight)
    assert far(read, x @ lorafx.merge(model)[0].weight.t()) < 1e-5


class Elsewhere(nn.Module):
    """Multiplies with the packed weight of a layer by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = FORMATS["nf4"].make(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        W = bitsandbytes.functional.dequantize_4bit(
            self.layer.weight.data, self.layer.weight.quant_state)
        return nn.functional.linear(x, W) + self.layer(x)


def test_a_packed_weight_that_is_read_outside_of_its_layer_is_left_alone() -> None:
    with pytest.raises(lorafx.NoSiteError, match="read outside of its layer"):
        lorafx.inject(Elsewhere())


def test_what_cannot_be_done_is_said() -> None:
    base = network("gptq")
    model = lorafx.inject(base, rank=2, targets="linear")
    with pytest.raises(lorafx.UnsupportedModelError, match="how it packs"):
        lorafx.merge(model, requantize=True)
    with pytest.raises(lorafx.UnsupportedModelError, match="packed"):
        lorafx.inject(network("nf4"), targets=["0"], trainable=["2"])


def test_state_dicts_go_back_and_forth() -> None:
    base, x = network("nf4"), torch.randn(3, WIDTH)
    model = fill(lorafx.inject(base, rank=2, targets="linear"))
    y, state = model(x), model.state_dict()
    assert base.state_dict().keys() < state.keys()
    own = {key: value.clone() for key, value in state.items() if ".lora." in key}
    with torch.no_grad():
        for factor in lorafx.parameters(model):
            factor.zero_()
    model.load_state_dict(own, strict=False)
    assert torch.equal(model(x), y)


def test_tied_packed_layers_share_one_branch() -> None:
    layer = FORMATS["nf4"].make(WIDTH, WIDTH)
    base, x = nn.Sequential(layer, nn.Tanh(), layer), torch.randn(3, WIDTH)
    model = fill(lorafx.inject(base, rank=2, targets="linear"), 0.3)
    assert len(lorafx.summary(model).sites) == 1
    merged = lorafx.merge(model)
    assert merged[0] is merged[2] and far(merged(x), model(x)) < 1e-5


class Leaves(torch.fx.Tracer):
    """Calls every child as it is."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def test_a_layer_by_itself_and_a_graph_module() -> None:
    layer, x = FORMATS["nf4"].make(WIDTH, WIDTH), torch.randn(3, WIDTH)
    model = fill(lorafx.inject(layer, rank=2), 0.3)
    assert far(lorafx.merge(model)(x), model(x)) < 1e-5
    base = nn.Sequential(nn.Tanh(), layer)
    graph = torch.fx.GraphModule(base, Leaves().trace(base))
    model = fill(lorafx.inject(graph, rank=2), 0.3)
    assert far(lorafx.merge(model)(x), model(x)) < 1e-5
    assert torch.equal(lorafx.eject(model)(x), graph(x)) and far(model(x), graph(x)) > 1e-2


class Odd(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv1d(x[..., None], self.weight[..., None])[..., 0]


def test_most_layers_left_alone_is_a_warning() -> None:
    base = nn.Sequential(nn.Linear(4, 4), Odd(4, 4), Odd(4, 4))
    with pytest.warns(UserWarning, match="2 of the 3 linear layers .* '1', since") as caught:
        lorafx.inject(base)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        lorafx.inject(base, targets=["0"])  # the user's own choice
        lorafx.inject(base[:2])  # half of them


def test_compiled_as_far_as_the_layer_is() -> None:
    model = fill(lorafx.inject(network("gptq"), rank=2, targets="linear"))
    x = torch.randn(3, WIDTH)
    compiled = torch.compile(model, backend="aot_eager")
    assert far(compiled(x), model(x)) < 1e-5
    compiled(x).square().sum().backward()
    gradients = [f.grad.clone() for f in lorafx.parameters(model)]
    model.zero_grad()
    model(x).square().sum().backward()
    for factor, gradient in zip(lorafx.parameters(model), gradients):
        assert far(gradient, factor.grad) < 1e-5


# dynamo asks it of what the graph before a break gave
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_where_the_product_has_no_derivative() -> None:
    base = network("nf4")
    model = fill(lorafx.inject(base, rank=2, targets="linear"))
    x = torch.randn(3, WIDTH)
    with torch.no_grad():
        model.eval()(x)  # packs it for a CPU
    model.train()
    gradients = []
    for run in (model, torch.compile(model, backend="eager")):
        model.zero_grad()
        run(x).square().sum().backward()
        gradients.append([f.grad.clone() for f in lorafx.parameters(model)])
    assert all(far(a, b) < 1e-5 for a, b in zip(*gradients))
