"""inject, load, save, merge and eject of programs of torch.export, which give programs back."""

import copy

import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

import lorafx
from tests.support.oracle import oracle
from tests.support.transformers_models import bert, gpt2

EXACTLY = dict(rtol=0, atol=0)
CLOSELY = dict(rtol=1e-9, atol=1e-9)
FREE = {0: Dim("rows", max=64), 1: Dim("length", max=32)}


class Layers(nn.Module):
    """With a weight that two calls share, a buffer that forward writes, and a constant."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6, bias=False)
        self.again = nn.Linear(6, 9, bias=False)
        self.again.weight = self.up.weight
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        y = self.down(self.up(x).relu() + torch.arange(9))
        return {"y": y, "z": [self.again(y)]}


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, return_dict=True).logits


MODELS = {"bert": bert, "gpt2": gpt2}


def batches(*, text):
    """Inputs of two sizes; programs are made with the first."""
    for size in ((3, 5), (4, 7)):
        yield torch.randint(3, 99, size) if text else torch.randn(*size, 6, dtype=torch.float64)


@pytest.fixture(scope="module", params=["layers", "bert", "gpt2"])
def case(request):
    """(float64 model, its program of any batch and length, inputs of two sizes)."""
    torch.manual_seed(0)
    model = Layers() if request.param == "layers" else Logits(MODELS[request.param]())
    model = model.eval().double()
    inputs = list(batches(text=request.param != "layers"))
    return model, exported(model, inputs[0]), inputs


def exported(model, x):
    return torch.export.export(copy.deepcopy(model), (x,), dynamic_shapes=(FREE,), strict=False)


def nodes(program):
    return [(node.op, node.name, str(node.target), str(node.args), str(node.kwargs))
            for node in program.graph.nodes]


def operators(program):
    return [(node.name, node.target) for node in program.graph.nodes]


def same(found, expected, tolerances):
    found, expected = map(torch.utils._pytree.tree_leaves, (found, expected))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerances)


def randomised(program):
    """The same program with other values of A and B."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lorafx.parameters(program):
            value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(value / parameter.shape[1] ** 0.5)
    return program


def expected(model, program, x):
    """The model's output with W + s B A, A and B being the program's and s 2."""
    factors, state = {}, program.state_dict
    for name in state:
        site, found, half = name.partition(".lora.default.")
        if found and half == "A":
            factors[site] = [(state[name], state[name[:-1] + "B"], 2.0)]
    sites = [site for site in lorafx.sites(model) if site.name in factors]
    assert len(sites) == len(factors) > 1
    return oracle(model, sites, factors, x)


def again(program, folder):
    """The program, written to a file and read again."""
    torch.export.save(program, folder / "program.pt2")
    return torch.export.load(folder / "program.pt2")


@pytest.mark.parametrize("decomposed", [False, True], ids=["", "decomposed"])
def test_branches_in_a_program(case, decomposed, tmp_path):
    model, program, inputs = case
    if decomposed:
        program = program.run_decompositions()
    before, bits = nodes(program), {k: v.clone() for k, v in program.state_dict.items()}
    adapted = lorafx.inject(program, rank=3, alpha=6, targets="linear")
    assert isinstance(adapted, ExportedProgram)
    assert adapted.range_constraints == program.range_constraints
    assert adapted.call_spec == program.call_spec
    for x in inputs:
        same(adapted.module()(x), program.module()(x), EXACTLY)
    randomised(adapted)
    read = again(adapted, tmp_path)
    with torch.no_grad():
        for each in (adapted, read, adapted.run_decompositions()):
            merged = lorafx.merge(each, untie=True)
            for x in inputs:
                wanted = expected(model, adapted, x)
                same(each.module()(x), wanted, CLOSELY)
                same(merged.module()(x), wanted, CLOSELY)
    for each in (adapted, read):
        assert nodes(lorafx.eject(each)) == before
        assert operators(lorafx.merge(each, untie=True)) == operators(program)
    assert nodes(program) == before and before != nodes(adapted)
    for name, tensor in program.named_parameters():
        assert torch.equal(tensor, bits[name])


def test_a_program_trains_a_and_b_alone(case):
    model, program, inputs = case
    adapted = randomised(lorafx.inject(program, rank=2, alpha=4, targets="linear"))
    module = adapted.module()
    trained = dict(lorafx.named_parameters(adapted))
    assert trained.keys() == {k for k in adapted.state_dict if ".lora.default." in k}
    found = torch.autograd.grad(loss(module(inputs[1])), list(trained.values()))
    wanted = torch.autograd.grad(
        loss(expected(model, adapted, inputs[1])), list(trained.values()))
    same(found, wanted, CLOSELY)
    assert {k for k, p in module.named_parameters() if p.requires_grad} == trained.keys()
    assert all(p.requires_grad for p in program.parameters())


def loss(outputs):
    return sum(leaf.sin().sum() for leaf in torch.utils._pytree.tree_leaves(outputs))


def test_files_go_from_a_model_to_its_program_and_back(case, tmp_path):
    model, program, inputs = case
    path = tmp_path / "adapter.safetensors"
    adapted = randomised(lorafx.inject(program, rank=2, alpha=4, targets="linear"))
    lorafx.save(adapted, path)
    loaded = lorafx.load(model, path)
    with torch.no_grad():
        same(loaded(inputs[0]), adapted.module()(inputs[0]), CLOSELY)
        lorafx.save(loaded, path)
        same(lorafx.load(program, path).module()(inputs[0]), adapted.module()(inputs[0]), EXACTLY)
    names = [[name for name, _ in lorafx.named_parameters(each)] for each in (loaded, adapted)]
    assert sorted(names[0]) == sorted(names[1])
