"""Each public function on hand-made models: what it changes, what it returns, what it leaves."""

import copy
import io
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from oracle import factors_of, fingerprint, frozen, oracle, randomise
from torch import fx, nn
from torch.fx.passes.infra.pass_manager import PassManager

import lorafx


class Block(nn.Module):
    """A square and two other layers, a tied head, batch norm's buffers, dropout, and a hook's counter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 5)
        self.square = nn.Linear(5, 5)
        self.down = nn.Linear(5, 3)
        self.up = nn.Linear(3, 5)
        self.norm = nn.BatchNorm1d(5)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        x = self.drop(self.norm(x + self.square(x)))
        return self.head(self.up(torch.tanh(self.down(x))))


class Tied(nn.Module):
    """One matrix for an embedding and a functional head, in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.linear(self.embedding(tokens), self.embedding.weight)


TOKENS = torch.tensor([1, 4, 9, 2])


@pytest.fixture
def block() -> nn.Module:
    return Block().double().eval()


def names(model: nn.Module) -> list[str]:
    return [name.removesuffix(".lora.default.A") for name, _ in lorafx.named_parameters(model) if name.endswith(".A")]


class TestTargets:
    @pytest.mark.parametrize("targets, expected", [
        ("square", ["square"]),
        ("linear", ["square", "down", "up", "head"]),
        ("down", ["down"]),
        (["up", "d*n"], ["down", "up"]),
        (re.compile("up|head"), ["up", "head"]),
        (lambda site: site.out_features == 5, ["square", "up"]),
        (["square", lambda site: site.name == "up"], ["square", "up"]),
    ])
    def test_forms(self, block, targets, expected):
        assert names(lorafx.inject(block, targets=targets)) == expected
        assert [site.name for site in lorafx.sites(block, targets)] == expected

    def test_a_dotted_suffix_is_no_substring(self):
        model = nn.ModuleDict({"a_proj": nn.Linear(3, 3), "proj": nn.Linear(3, 3)})
        assert names(lorafx.inject(nn.Sequential(model), targets="proj")) == ["0.proj"]

    def test_exclude(self, block):
        assert names(lorafx.inject(block, targets="linear", exclude=["up", "square"])) == ["down", "head"]

    def test_sites_say_what_is_tied(self, block):
        *_, head = lorafx.sites(block)
        assert (head.name, head.in_features, head.out_features, head.kind) == ("head", 5, 11, "linear")
        assert head.tied_to == ("embedding",) and not head.read_by and len(head.calls) == 1
        [site] = lorafx.sites(Tied())
        assert site.name == "embedding" and site.read_by == ("`embedding` in embedding",)


class TestConfig:
    def test_a_is_gaussian_and_seeded(self):
        torch.manual_seed(3)
        first = lorafx.inject(nn.Linear(400, 400), 50).lora.default
        torch.manual_seed(3)
        second = lorafx.inject(nn.Linear(400, 400), 50).lora.default
        assert torch.equal(first.A, second.A)
        assert abs(first.A.std() - 0.02) < 3e-4 and abs(first.A.mean()) < 6e-4 and first.B.abs().max() == 0

    def test_kaiming(self):
        A = lorafx.inject(nn.Linear(400, 400), 50, init="kaiming").lora.default.A
        assert 0.99 / 20 < A.abs().max() <= 1 / 20  # uniform within sqrt(6 / ((1 + 5) * in))

    def test_rank_and_alpha_patterns(self, block):
        model = lorafx.inject(block, 4, alpha=8, targets="linear", rank_pattern={"up|down": 2, "up": 3},
                              alpha_pattern={r"h.*d": 1.0})
        held = {name: model.get_submodule(f"{name}.lora.default") for name in ("square", "down", "up", "head")}
        assert [module.A.shape[0] for module in held.values()] == [4, 2, 2, 4]
        assert [module.scale for module in held.values()] == [2, 4, 4, 0.25]

    def test_rslora(self):
        assert lorafx.inject(nn.Linear(3, 3), 16, alpha=8, rslora=True).lora.default.scale == 2

    @pytest.mark.parametrize("base, asked, expected", [
        (torch.float16, None, torch.float32), (torch.bfloat16, None, torch.float32),
        (torch.float32, None, torch.float32), (torch.float64, None, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16), (torch.float32, torch.float64, torch.float64)])
    def test_dtype(self, base, asked, expected):
        model = lorafx.inject(nn.Linear(3, 3).to(base), dtype=asked)
        assert {p.dtype for p in lorafx.parameters(model)} == {expected}
        x = torch.randn(2, 3).to(base)
        randomise(model)(x).sum().backward()
        assert model(x).dtype == base and model.lora.default.B.grad.dtype == expected

    def test_mode_device_and_hooks_carry_over(self, block):
        calls = []
        block.square.register_forward_hook(lambda module, args, output: calls.append(module))
        block.train()
        model = lorafx.inject(block.to("meta"))
        assert model.training and model.square.lora.training
        assert {p.device.type for p in lorafx.parameters(model)} == {"meta"}
        model(TOKENS.to("meta"))
        assert calls == [model.square]


class TestTrainable:
    def test_copied_trained_saved_and_switched(self, block, tmp_path):
        before, base = fingerprint(block), frozen(block)
        model = lorafx.inject(block, targets="square", trainable="down")
        assert {name for name, _ in lorafx.named_parameters(model)} == {
            "square.lora.default.A", "square.lora.default.B",
            "down.trained.default.weight", "down.trained.default.bias"}
        optimizer = torch.optim.SGD(lorafx.parameters(model), lr=1.0)
        model(TOKENS).sum().backward()
        optimizer.step()
        assert fingerprint(block) == before
        trained = model(TOKENS)
        assert not torch.equal(trained, base(TOKENS))
        assert torch.equal(model.state_dict()["down.weight"], model.down.trained.default.weight)
        with lorafx.disabled(model):
            assert torch.equal(model(TOKENS), base(TOKENS))
        assert torch.equal(model(TOKENS), trained)
        lorafx.save(model, tmp_path / "a.safetensors")
        assert torch.equal(lorafx.load(block, tmp_path / "a.safetensors")(TOKENS), trained)
        torch.testing.assert_close(lorafx.merge(model)(TOKENS), trained)
        assert torch.equal(lorafx.eject(model)(TOKENS), base(TOKENS))
        assert torch.equal(copy.deepcopy(model)(TOKENS), trained)
        lorafx.add(model, "plain")
        lorafx.activate(model, "plain")
        assert torch.equal(model(TOKENS), base(TOKENS))
        lorafx.compose(model, {"default": 1.0, "plain": 1.0}, adapter="both")
        lorafx.activate(model, "both")
        torch.testing.assert_close(model(TOKENS), trained)
        lorafx.remove(model, "both")
        assert torch.equal(model(TOKENS), base(TOKENS))

    def test_a_tied_module_stays_tied(self, block):
        model = lorafx.inject(block, targets="square", trainable="head")
        assert model.head.weight is model.embedding.weight is not block.head.weight
        assert [name for name, _ in lorafx.named_parameters(model)] == [
            "embedding.trained.default.weight", "square.lora.default.A", "square.lora.default.B"]
        merged = lorafx.merge(model)
        assert merged.head.weight is merged.embedding.weight

    def test_two_adapters_that_train_one_module(self, block):
        model = lorafx.inject(block, trainable="down")
        lorafx.add(model, "other", trainable=["down"])
        with pytest.raises(lorafx.AdapterError, match="'default' and 'other' both train 'down' whole.*activate one of"):
            lorafx.activate(model, ["default", "other"])

    def test_what_is_trained_whole_is_not_adapted(self, block):
        assert names(lorafx.inject(block, targets="linear", trainable="down")) == ["square", "up", "head"]
        with pytest.raises(lorafx.NoSiteError, match="'down' cannot be adapted: it is trained whole"):
            lorafx.inject(block, targets="down", trainable="down")


class TestSwitching:
    def test_activate_decides_what_forward_uses_and_what_trains(self, block):
        model = randomise(lorafx.inject(block, adapter="a", targets="linear"))
        lorafx.add(model, "b", rank=3, targets=["up", "down"])
        assert lorafx.adapters(model) == ["a", "b"]
        assert not any(".b." in name for name, _ in lorafx.named_parameters(model))
        only_a = model(TOKENS)
        randomise(model)
        assert torch.equal(model(TOKENS), only_a)
        lorafx.activate(model, "b")
        sites = lorafx.sites(block)
        zero = {site.name: [] for site in sites}
        expected = oracle(block, sites, {**zero, **factors_of(model, {"b": 1.0})}, TOKENS)
        torch.testing.assert_close(model(TOKENS), expected, rtol=1e-10, atol=1e-10)
        trains = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trains == {name for name, _ in lorafx.named_parameters(model)} == {
            f"{site}.lora.b.{factor}" for site in ("up", "down") for factor in "AB"}
        lorafx.activate(model, [])
        assert torch.equal(model(TOKENS), block(TOKENS)) and not list(lorafx.parameters(model))

    def test_add_can_bring_new_sites(self, block):
        model = lorafx.inject(block, adapter="a", targets="square")
        lorafx.add(model, "b", targets="linear")
        lorafx.activate(model, ["a", "b"])
        randomise(model)
        sites = lorafx.sites(block)
        factors = {site.name: [] for site in sites} | factors_of(model, {"a": 1.0, "b": 1.0})
        torch.testing.assert_close(model(TOKENS), oracle(block, sites, factors, TOKENS), rtol=1e-10, atol=1e-10)
        assert [type(m) for m in lorafx.eject(model).modules()] == [type(m) for m in block.modules()]

    def test_a_failed_add_changes_nothing(self, block):
        model = lorafx.inject(block)
        before = fingerprint(model)
        for config in ({"targets": "nope"}, {"rank": 0}, {"trainable": "nope"}, {"rank_pattern": {"nope": 2}}):
            with pytest.raises(lorafx.LorafxError):
                lorafx.add(model, "b", **config)
        model.down.lora = nn.Identity()
        with pytest.raises(lorafx.UnsupportedModelError, match="'down' has an attribute 'lora' already"):
            lorafx.add(model, "b", targets="linear")
        del model.down.lora
        assert fingerprint(model) == before and lorafx.adapters(model) == ["default"]

    def test_remove_frees_the_tensors(self, block):
        model = lorafx.inject(block, adapter="a")
        lorafx.add(model, "b")
        lorafx.activate(model, ["a", "b"])
        lorafx.remove(model, "a")
        assert [name for name, _ in lorafx.named_parameters(model)] == ["square.lora.b.A", "square.lora.b.B"]
        assert set(model.state_dict()) == {*block.state_dict(), "square.lora.b.A", "square.lora.b.B"}

    def test_disabled_survives_an_error(self, block):
        model = randomise(lorafx.inject(block))
        expected = model(TOKENS)
        with pytest.raises(RuntimeError, match="inside"), lorafx.disabled(model):
            raise RuntimeError("inside")
        assert torch.equal(model(TOKENS), expected)

    def test_load_onto_an_injected_model_adds(self, block, tmp_path):
        first, second = (randomise(lorafx.inject(block, targets=t), seed) for seed, t in enumerate(("square", "up")))
        lorafx.save(first, tmp_path / "a.safetensors")
        lorafx.save(second, tmp_path / "b.pth")
        model = lorafx.load(block, tmp_path / "a.safetensors", adapter="a")
        assert lorafx.load(model, tmp_path / "b.pth", adapter="b") is model
        assert torch.equal(model(TOKENS), first(TOKENS))
        lorafx.activate(model, "b")
        torch.testing.assert_close(model(TOKENS), second(TOKENS), rtol=1e-2, atol=1e-2)


class TestMerge:
    def test_a_tied_weight_is_refused_or_untied(self, block):
        model = randomise(lorafx.inject(block, targets="linear"))
        with pytest.raises(lorafx.TiedWeightError, match=r"'head' is tied to 'embedding'.*merge\(model, untie=True\)"):
            lorafx.merge(model)
        merged = lorafx.merge(model, untie=True)
        torch.testing.assert_close(merged(TOKENS), model(TOKENS), rtol=1e-10, atol=1e-10)
        assert merged.embedding.weight.data_ptr() == block.embedding.weight.data_ptr()
        with pytest.raises(lorafx.TiedWeightError, match="read by `embedding` in embedding, through the same module"):
            lorafx.merge(lorafx.inject(Tied(), targets="linear"), untie=True)
        lorafx.add(model, "square only", targets="square")
        assert lorafx.merge(model, "square only").head.weight.data_ptr() == block.head.weight.data_ptr()

    def test_of_chosen_adapters_leaves_the_model_alone(self, block):
        model = randomise(lorafx.inject(block, adapter="a"))
        lorafx.add(model, "b")
        randomise(model)
        before = fingerprint(model)
        merged = lorafx.merge(model, {"a": 0.5, "b": -1.0})
        assert fingerprint(model) == before
        lorafx.activate(model, {"a": 0.5, "b": -1.0})
        torch.testing.assert_close(merged(TOKENS), model(TOKENS), rtol=1e-10, atol=1e-10)
        assert not any("lora" in key for key in merged.state_dict()) and "_lorafx" not in vars(merged)
        assert all(p.requires_grad for p in merged.parameters())


class TestGraphs:
    def test_a_region_is_a_graph_module_of_its_class(self):
        model = lorafx.inject(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, bias=False), nn.Linear(3, 4)))
        assert isinstance(model[0], nn.Linear) and isinstance(model[0], fx.GraphModule)
        assert "lora = self.lora(input_1, linear)" in model[0].code and "self.lora" in model[0].print_readable(False)
        assert type(model[0]) is type(model[1]) and type(model[2]) is nn.Linear
        assert repr(model[1]).startswith("Linear(") and model[0].in_features == 3
        model[1].graph.lint()
        assert lorafx.summary(model).code.count("def forward") == 1

    def test_the_original_bias_may_come_later(self):
        base = nn.Linear(3, 3, bias=False)
        model = lorafx.inject(base)
        model.bias = nn.Parameter(torch.ones(3))
        x = torch.randn(2, 3)
        torch.testing.assert_close(model(x), base(x) + 1)

    @pytest.mark.parametrize("model", [Block(), nn.Linear(4, 4), fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4)))],
                             ids=["break", "region", "graph module"])
    def test_copies(self, model):
        x = TOKENS if isinstance(model, Block) else torch.randn(3, 4)
        model = randomise(lorafx.inject(model.eval()))
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
            assert torch.equal(twin(x), model(x))
            lorafx.add(twin, "b")
            torch.testing.assert_close(lorafx.merge(twin, "default")(x), model(x))
            assert torch.equal(lorafx.eject(twin)(x), lorafx.eject(model)(x))

    def test_state_dict_round_trip(self, block):
        model, other = randomise(lorafx.inject(block)), lorafx.inject(Block().double().eval())
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(TOKENS), model(TOKENS))

    def test_a_graph_module_keeps_its_hooked_or_shared_layers_as_regions(self):
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
        assert "self.a.lora(" in model.code and "self.b.lora" not in model.code and "self.c.lora" not in model.code
        assert isinstance(model.b, fx.GraphModule) and isinstance(model.c, fx.GraphModule)
        randomise(model)
        x = torch.randn(2, 3)
        torch.testing.assert_close(lorafx.merge(model)(x), model(x), rtol=1e-4, atol=1e-4)

    def test_an_exported_program(self):
        base = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3, bias=False))
        x = torch.randn(2, 3)
        graph = torch.export.export(base, (x,)).module()
        assert [site.kind for site in lorafx.sites(graph)] == ["aten.linear", "aten.linear"]
        model = lorafx.inject(graph)
        assert torch.equal(model(x), base(x))
        randomise(model)
        factors = factors_of(model, {"default": 1.0})
        torch.testing.assert_close(model(x), oracle(frozen(base), lorafx.sites(base), factors, x))

    def test_passes_run_in_torchs_pass_manager(self):
        base = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
        graph, x = fx.symbolic_trace(base), torch.randn(2, 3)
        result = PassManager([lorafx.InjectLoRA(rank=2)], run_checks_after_each_pass=True)(graph)
        assert result.modified and "lora" in result.graph_module.code and "lora" not in graph.code
        randomise(result.graph_module)
        merged = PassManager([lorafx.MergeLoRA()])(result.graph_module).graph_module
        assert merged.code == graph.code
        torch.testing.assert_close(merged(x), result.graph_module(x))

    def test_compile_and_export(self, block):
        model = randomise(lorafx.inject(block, targets="linear"))
        expected = model(TOKENS)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.equal(compiled(TOKENS), expected)
        program = torch.export.export(model, (TOKENS,))
        torch.testing.assert_close(program.module()(TOKENS), expected)

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own looking
    def test_layers_compiled_one_by_one_share_a_graph(self):
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
    assert found.trainable == 2 * (5 + 5) + 2 * (3 + 5) == sum(p.numel() for p in lorafx.parameters(model))
    assert found.total == sum(p.numel() for p in model.parameters())
    assert [site.name for site in found.sites] == ["square", "up"] and found.sites[1].ranks == {"default": 2}
    assert str(found).splitlines()[0].startswith("2 sites adapted, active: default x 1; 36 of ")
    assert "<td>square</td>" in found._repr_html_()


def test_breaks_and_skipped_are_named():
    model = nn.Sequential(nn.Linear(3, 3), nn.Conv1d(3, 3, 1), nn.LSTM(3, 3), nn.MultiheadAttention(4, 2))
    found = lorafx.summary(lorafx.inject(model))
    assert {"1", "2.weight_ih_l0", "2.weight_hh_l0", "3.in_proj_weight", "3.out_proj"} == set(found.skipped)
    assert "Sequential: forward loops" in found.breaks[""] and "graph break: LSTM" in found.skipped["2.weight_ih_l0"]
    assert "the Python of 3 (MultiheadAttention) may use its weight directly" == found.skipped["3.out_proj"]
