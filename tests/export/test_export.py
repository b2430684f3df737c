"""What export refuses, what its adapters' files hold, and that a merged model is the base again."""

import sys

import pytest
import safetensors.torch
import torch
from torch import nn

import lorafx
from tests.support.models import TOKENS
from tests.support.oracle import randomise

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def layers():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def adapted():
    model = lorafx.inject(layers(), rank=2, targets="linear", alpha=6, adapter="a")
    lorafx.add(model, "b", rank=1, targets="0")
    return randomise(model)


def refused(path, error, match, model=None, args=(X,)):
    with pytest.raises(error, match=match):
        lorafx.export(adapted() if model is None else model, path, args)
    assert not [*path.parent.iterdir()] or path.is_dir()


def test_an_unknown_ending(tmp_path):
    refused(tmp_path / "m.pb", lorafx.FormatError,
            r"no kind of program by its ending: use \.aoti\.pt2 \(AOTInductor\), \.pt2 \(torch")


def test_a_folder_in_the_way(tmp_path):
    (tmp_path / "m.pt2").mkdir()
    refused(tmp_path / "m.pt2", lorafx.FormatError, "is a folder: name a file in it")


def test_a_path_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="cannot be written, and stays as it was"):
        lorafx.export(adapted(), tmp_path / "file" / "m.pt2", (X,))


def test_a_path_of_no_file():
    with pytest.raises(lorafx.FormatError, match="No path has a NUL character"):
        lorafx.export(adapted(), "a\0.pt2", (X,))


def test_a_program_instead_of_a_model(tmp_path):
    program = torch.export.export(layers(), (X,))
    refused(tmp_path / "m.pt2", lorafx.UnsupportedModelError,
            r"start from its module, lorafx\.inject\(program\.module", program)
    model = randomise(lorafx.inject(program.module(), targets="linear"))
    lorafx.export(model, tmp_path / "m.pt2", (X,))
    check(tmp_path, model, (X,), {})


def test_a_model_without_adapters(tmp_path):
    refused(tmp_path / "m.pt2", lorafx.NotInjectedError, "lorafx.inject", layers())
    model = adapted()
    lorafx.remove(model, "a")
    lorafx.remove(model, "b")
    refused(tmp_path / "m.pt2", lorafx.AdapterError, "has no adapter, so that nothing", model)


def test_a_module_trained_whole(tmp_path):
    model = lorafx.inject(layers(), targets="0", trainable="2", adapter="a")
    refused(tmp_path / "m.pt2", lorafx.UnsupportedModelError,
            r"'a' trains '2\.weight' whole.*lorafx\.merge", model)
    for name in ("a.onnx_adapter", "a.safetensors"):
        asked = {"format": "exported"} if name.endswith("safetensors") else {}
        if name.endswith("onnx_adapter"):
            pytest.importorskip("onnxruntime")
        with pytest.raises(lorafx.FormatError, match=r"no other tensors such as the trained '2\."):
            lorafx.save(model, tmp_path / name, **asked)


class Deciding(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        y = self.layer(x)
        return y if y.sum() > 0 else -y


def test_what_torch_cannot_trace(tmp_path):
    refused(tmp_path / "m.pt2", lorafx.UnsupportedModelError,
            "torch.export cannot trace this Deciding: .*data-dependent",
            lorafx.inject(Deciding()))


class Unusual(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return torch.special.bessel_j0(self.layer(x))


def test_an_operator_that_onnx_lacks(tmp_path):
    pytest.importorskip("onnxscript")
    refused(tmp_path / "m.onnx", lorafx.UnsupportedModelError,
            "cannot be a program of ONNX: .*bessel_j0",
            lorafx.inject(Unusual()))


def test_a_missing_example(tmp_path):
    refused(tmp_path / "m.pt2", lorafx.ConfigError,
            "example of what the forward of this Sequential takes.*missing.*'input'", args=())
    refused(tmp_path / "m.pt2", lorafx.ConfigError, "too many positional", args=(X, X))
    refused(tmp_path / "m.pt2", lorafx.ConfigError, "such as .x,., not a Tensor and", args=X)


def test_which_sizes_vary(tmp_path):
    rows = {0: torch.export.Dim("rows", max=9)}
    for wrong in ({}, {"x": rows}, [rows, rows]):
        with pytest.raises(lorafx.ConfigError, match="dynamic_shapes says of each .*are input"):
            lorafx.export(adapted(), tmp_path / "m.pt2", (X,), dynamic_shapes=wrong)
    for right in ({"input": rows}, [rows], ((rows[0], None),)):
        lorafx.export(adapted(), tmp_path / "m.pt2", (X,), dynamic_shapes=right)
        *_, found = torch.export.load(tmp_path / "m.pt2").range_constraints.values()
        assert found.upper == 9


class Unlike(nn.Module):
    """With rows that are adapted by themselves, and arguments that have no name of their own."""

    def __init__(self):
        super().__init__()
        self.rows, self.out = nn.Linear(4, 9), nn.Linear(9, 4)

    def forward(self, adapter, *others, **more):
        return self.out(self.rows(adapter)) + others[0] * more["factor"]


def test_rows_and_arguments_of_any_name(tmp_path):
    model = lorafx.inject(Unlike(), targets=["rows[0:4]", "out"], adapter="a")
    lorafx.add(model, "b", rank=1, targets="rows[2:9]")
    model = randomise(model)
    lorafx.export(model, tmp_path / "m.pt2", (X, X), {"factor": X})
    check(tmp_path, model, (X, X), {"factor": X})
    check(tmp_path, model, (X[:1], X[:1]), {"factor": X[:1]})
    assert torch.export.load(tmp_path / "m.pt2").example_inputs[0][0].keys() == {
        f"{site}.lora.{half}" for site in ("rows[0:4]", "rows[2:9]", "out") for half in "AB"}


def check(folder, model, args, kwargs):
    """The program computes what the model does, with each of its adapters."""
    program = torch.export.load(folder / "m.pt2").module()
    for adapter in lorafx.adapters(model):
        path = folder / f"{adapter}.safetensors"
        lorafx.save(model, path, adapter, format="exported")
        lorafx.activate(model, adapter)
        found = program(safetensors.torch.load_file(path), *args, **kwargs)
        torch.testing.assert_close(found, model(*args, **kwargs), rtol=1e-5, atol=1e-5)


class Returns(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.change = change

    def forward(self, x):
        return self.change(self, self.layer(x))


def count(model, y):
    model.calls.add_(1)
    return y + model.calls


class Cache:
    pass


def test_what_a_program_cannot_return(tmp_path):
    model = lorafx.inject(Returns(lambda model, y: [y, Cache()]))
    refused(tmp_path / "m.pt2", lorafx.UnsupportedModelError,
            "The model returns a Cache, and .* tensors and numbers.*use_cache=False", model)


def test_what_onnx_would_lose(tmp_path):
    pytest.importorskip("onnxscript")
    for change, match in [(count, r"forward writes into 'model\.calls', which would be lost"),
                          (lambda model, y: (y, 5), "forward returns the number 5, and ONNX has")]:
        model = lorafx.inject(Returns(change))
        refused(tmp_path / "m.onnx", lorafx.UnsupportedModelError, match, model)


def test_names_of_outputs_that_are_not_all_tensors(tmp_path):
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    model = lorafx.inject(Returns(lambda model, y: (y, None, {"z": y + 1})))
    lorafx.export(model, tmp_path / "m.onnx", (X,))
    assert [out.name for out in onnx.load(tmp_path / "m.onnx").graph.output] == ["0", "2.z"]


@pytest.mark.parametrize("package, path", [
    ("onnx", "m.onnx"), ("onnxscript", "m.onnx"), ("onnxruntime", "a.onnx_adapter")])
def test_a_missing_package(tmp_path, monkeypatch, package, path):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(lorafx.FormatError, match=rf"{package}.*pip install 'lorafx\[export\]'"):
        if path == "m.onnx":
            lorafx.export(adapted(), tmp_path / path, (X,))
        else:
            lorafx.save(adapted(), tmp_path / path, "a")
    assert not [*tmp_path.iterdir()]


def test_an_adapter_for_exported_programs(tmp_path):
    """It has the scale in B, zeros where only other adapters are, and can be loaded again."""
    model = adapted()
    lorafx.save(model, tmp_path / "a.safetensors", "a", format="exported")
    lorafx.save(model, tmp_path / "b.safetensors", "b", format="exported")
    a, b = (safetensors.torch.load_file(tmp_path / f"{name}.safetensors") for name in "ab")
    names = {f"{site}.lora.{half}" for site in "02" for half in "AB"}
    assert a.keys() == b.keys() == names
    assert torch.equal(a["0.lora.A"], model[0].lora.a.A)
    assert torch.equal(a["0.lora.B"], 3 * model[0].lora.a.B)
    assert b["2.lora.A"].shape == (1, 6) and not b["2.lora.A"].any()
    assert b["2.lora.B"].shape == (3, 1) and not b["2.lora.B"].any()
    for name in "ab":
        lorafx.activate(model, name)
        again = lorafx.load(lorafx.eject(model), tmp_path / f"{name}.safetensors")
        torch.testing.assert_close(again(X), model(X))


def test_an_adapter_of_onnxruntime(tmp_path):
    pytest.importorskip("onnxruntime")
    model = adapted()
    lorafx.activate(model, "a")
    lorafx.save(model, tmp_path / "a.onnx_adapter")
    again = lorafx.load(lorafx.eject(model), tmp_path / "a.onnx_adapter")
    assert torch.equal(again[0].lora.default.A, model[0].lora.a.A)
    torch.testing.assert_close(again(X), model(X))


def test_bytes_that_are_no_adapter_of_onnxruntime(tmp_path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "a.onnx_adapter").write_bytes(b"no flatbuffer")
    with pytest.raises(lorafx.FormatError, match="is damaged or not an adapter of onnxruntime"):
        lorafx.load(layers(), tmp_path / "a.onnx_adapter")


def nodes(model):
    graph = torch.export.export(model, (TOKENS,)).graph
    return [(node.op, node.name, str(node.target), str(node.args), str(node.kwargs))
            for node in graph.nodes]


def test_a_merged_model_exports_node_for_node_as_the_base(block):
    model = randomise(lorafx.inject(block, targets=["square", "up", "down"]))
    assert nodes(lorafx.merge(model)) == nodes(block) != nodes(model)


def onnx_nodes(model):
    """Operators, attributes and values of an ONNX program, in their order."""
    program = torch.onnx.export(model.eval(), (X,), dynamo=True, verbose=False).model
    graph = program.graph
    nodes = []
    for node in graph:
        values = [value and value.name for value in (*node.inputs, *node.outputs)]
        attributes = {name: str(attribute.value) for name, attribute in node.attributes.items()}
        nodes.append((node.domain, node.op_type, values, attributes))
    return nodes, [(name, value.shape) for name, value in graph.initializers.items()]


def test_a_merged_model_is_in_onnx_node_for_node_as_the_base():
    pytest.importorskip("onnxscript")
    model = adapted()
    lorafx.activate(model, "a")
    found = onnx_nodes(lorafx.merge(model))
    assert found == onnx_nodes(layers()) != onnx_nodes(model)
    assert [node[1] for node in found[0]] == ["Gemm", "Relu", "Gemm"]


def test_nothing_of_the_model_changes(tmp_path):
    model = adapted()
    before, state = model(X), {name: t.clone() for name, t in model.state_dict().items()}
    lorafx.export(model.train(), tmp_path / "m.pt2", (X,))
    assert model.training and torch.equal(model(X), before)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
