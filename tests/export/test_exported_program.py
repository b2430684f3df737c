"""inject, load, save, merge and eject of programs of torch.export, which give programs back."""

import copy
import functools

import pytest
import torch
import transformers
from torch import nn
from torch.export import Dim, ExportedProgram

import lorafx
from tests.support.oracle import oracle
from tests.support.transformers_models import SIZES

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


def bert():
    config = transformers.BertConfig(**SIZES | {"num_hidden_layers": 1})
    return Logits(transformers.BertForMaskedLM(config))


def gpt2():
    return Logits(transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=100, n_embd=32, n_layer=1, n_head=4, use_cache=False)))


MODELS = {"layers": Layers, "bert": bert, "gpt2": gpt2}


def batches(*, text):
    """Inputs of two sizes; programs are made with the first."""
    for size in ((3, 5), (4, 7)):
        yield torch.randint(3, 99, size) if text else torch.randn(*size, 6, dtype=torch.float64)


@functools.lru_cache
def made(name):
    """(float64 model, its program of any batch and length, inputs of two sizes)."""
    torch.manual_seed(0)
    model = MODELS[name]().eval().double()
    inputs = list(batches(text=name != "layers"))
    return model, exported(model, inputs[0]), inputs


@pytest.fixture(params=["layers", "bert", "gpt2"])
def case(request):
    return made(request.param)


@pytest.fixture(params=["layers", "bert"])  # torch itself cannot decompose this GPT-2
def decomposable(request):
    return made(request.param)


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


def check(model, program, inputs, folder):
    """The identity, W + s B A, files and the way back, with a program that stays as it is."""
    before, bits = nodes(program), {k: v.clone() for k, v in program.named_parameters()}
    adapted = lorafx.inject(program, rank=3, alpha=6, targets="linear")
    assert isinstance(adapted, ExportedProgram)
    assert adapted.range_constraints == program.range_constraints
    assert adapted.call_spec == program.call_spec
    for x in inputs:
        same(adapted.module()(x), program.module()(x), EXACTLY)
    randomised(adapted)
    read = again(adapted, folder)
    with torch.no_grad():
        wanted = [expected(model, adapted, x) for x in inputs]
        merged = lorafx.merge(read, untie=True)
        for each in (adapted, read, merged):
            for x, outputs in zip(inputs, wanted):
                same(each.module()(x), outputs, CLOSELY)
    assert nodes(lorafx.eject(adapted)) == before == nodes(program) != nodes(adapted)
    assert operators(lorafx.merge(adapted, untie=True)) == operators(program)
    for name, tensor in program.named_parameters():
        assert torch.equal(tensor, bits[name])
    return adapted, wanted


def test_branches_in_a_program(case, tmp_path):
    check(*case, tmp_path)


def test_branches_in_a_decomposed_program(decomposable, tmp_path):
    model, program, inputs = decomposable
    check(model, program.run_decompositions(), inputs, tmp_path)


def test_a_program_decomposed_with_its_branches(tmp_path):
    model, program, inputs = made("layers")
    adapted, wanted = check(model, program, inputs, tmp_path)
    decomposed = adapted.run_decompositions()
    for each in (decomposed, lorafx.merge(decomposed)):
        same(each.module()(inputs[1]), wanted[1], CLOSELY)


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


def step(program, optimizer):
    optimizer.zero_grad()
    loss(program.module()(made("layers")[2][0])).backward()
    optimizer.step()


def test_training_that_goes_on(tmp_path):
    _, program, _ = made("layers")
    path, runs = tmp_path / "run.safetensors", []
    adapted = randomised(lorafx.inject(program, rank=2, targets="linear"))
    optimizer = torch.optim.AdamW(lorafx.parameters(adapted), lr=0.1)
    step(adapted, optimizer)
    lorafx.save(adapted, path, optimizer=optimizer, step=1)
    resumed = lorafx.load(program, path)
    again = torch.optim.AdamW(lorafx.parameters(resumed))
    assert lorafx.resume(resumed, again, path) == 1
    for each, own in ((adapted, optimizer), (resumed, again)):
        step(each, own)
        runs.append([*lorafx.parameters(each)])
    same(*runs, EXACTLY)


class Constant(nn.Module):
    """Without an input."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self):
        return self.layer(torch.ones(1, 6))


def test_a_program_without_inputs():
    program = torch.export.export(Constant(), ())
    adapted = randomised(lorafx.inject(program, rank=2))
    same(lorafx.merge(adapted).module()(), adapted.module()(), dict(rtol=1e-5, atol=1e-5))
    assert nodes(lorafx.eject(adapted)) == nodes(program)


class Narrow(nn.Module):
    """bfloat16, a fused projection of which rows are adapted, and one layer called twice."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 6)

    def forward(self, x):
        q, k, v = self.qkv(self.out(x)).chunk(3, dim=-1)
        return self.out(q * k + v)


@functools.lru_cache
def narrow():
    torch.manual_seed(0)
    model, x = Narrow().bfloat16(), torch.randn(4, 6, dtype=torch.bfloat16)
    return model, torch.export.export(model, (x,), strict=False), x


def test_rows_of_a_narrow_weight():
    model, program, x = narrow()
    targets = ["qkv[0:6]", "qkv[12:18]", "out"]
    adapted = lorafx.inject(program, rank=2, targets=targets)
    assert torch.equal(adapted.module()(x), model(x))
    assert {tensor.dtype for tensor in lorafx.parameters(adapted)} == {torch.float32}
    randomised(adapted)
    module = lorafx.inject(model, rank=2, targets=targets)
    for one, other in zip(lorafx.parameters(module), lorafx.parameters(adapted), strict=True):
        one.data.copy_(other)
    torch.testing.assert_close(adapted.module()(x), module(x), rtol=0.05, atol=0.05)
    assert torch.equal(lorafx.merge(adapted).module()(x), lorafx.merge(module)(x))
    assert [site.name for site in lorafx.sites(adapted)] == ["qkv", "out"]
    assert str(lorafx.summary(adapted)).count("qkv[") == 2


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # by torch
def test_submodules_of_a_program_with_branches():
    _, program, x = narrow()
    program = torch.export.export(
        narrow()[0], (x,), strict=False, preserve_module_call_signature=("qkv",))
    adapted = randomised(lorafx.inject(program, rank=2, targets="linear"))
    parts = torch.export.unflatten(adapted)
    assert torch.equal(parts(x), adapted.module()(x))
    whole = lorafx.eject(adapted)
    assert torch.equal(torch.export.unflatten(whole)(x), program.module()(x))


def test_what_a_program_cannot_take(tmp_path):
    _, program, _ = narrow()
    adapted = lorafx.inject(program, targets="out", adapter="french")
    lorafx.save(adapted, tmp_path / "a.safetensors")
    before = nodes(adapted)
    for match, fails in {
        "cannot drop out: use dropout=0": lambda: lorafx.inject(program, dropout=0.1),
        "'out' would be trained whole": lambda: lorafx.inject(
            program, targets="qkv", trainable="out"),
        "'german' would come second: lorafx.eject": lambda: lorafx.load(
            adapted, tmp_path / "a.safetensors", "german"),
        "no adapter 'german'; it has 'french'": lambda: [*lorafx.parameters(adapted, "german")],
        "is injected already": lambda: lorafx.inject(adapted),
        "This GraphModule is not an injected model": lambda: lorafx.merge(program),
        "start from its module, lorafx.inject\\(program.module": lambda: lorafx.activate(
            adapted, "french"),
    }.items():
        with pytest.raises(lorafx.LorafxError, match=match):
            fails()
    assert nodes(adapted) == before
    assert lorafx.adapters(adapted) == ["french"]
