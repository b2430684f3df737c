"""Each public function on hand-made models: what it changes, what it returns, what it leaves."""

import copy
import re

import pytest
import torch
from torch import nn

import lorafx
from tests.support.models import TOKENS, Tied
from tests.support.oracle import factors_of, fingerprint, frozen, oracle, randomise


def names(model: nn.Module) -> list[str]:
    return [
        name.removesuffix(".lora.default.A")
        for name, _ in lorafx.named_parameters(model) if name.endswith(".A")
    ]


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
        assert names(lorafx.inject(block, targets="linear", exclude=["up", "square"])) == [
            "down",
            "head",
        ]

    def test_sites_say_what_is_tied(self, block):
        *_, head = lorafx.sites(block)
        assert (head.name, head.in_features, head.out_features, head.kind) == (
            "head",
            5,
            11,
            "linear",
        )
        assert head.tied_to == ("embedding",) and len(head.calls) == 1
        [site] = lorafx.sites(Tied())
        assert site.name == "embedding" and not site.tied_to


class TestConfig:
    def test_a_is_gaussian_and_seeded(self):
        torch.manual_seed(3)
        first = lorafx.inject(nn.Linear(400, 400), 50).lora.default
        torch.manual_seed(3)
        second = lorafx.inject(nn.Linear(400, 400), 50).lora.default
        assert torch.equal(first.A, second.A)
        assert abs(first.A.std() - 0.02) < 3e-4
        assert abs(first.A.mean()) < 6e-4
        assert first.B.abs().max() == 0

    def test_kaiming(self):
        A = lorafx.inject(nn.Linear(400, 400), 50, init="kaiming").lora.default.A
        assert 0.99 / 20 < A.abs().max() <= 1 / 20  # uniform within sqrt(6 / ((1 + 5) * in))

    def test_rank_and_alpha_patterns(self, block):
        model = lorafx.inject(
            block, 4, alpha=8, targets="linear", rank_pattern={"up|down": 2, "up": 3},
            alpha_pattern={r"h.*d": 1.0}
        )
        held = {
            name: model.get_submodule(f"{name}.lora.default")
            for name in ("square", "down", "up", "head")
        }
        assert [module.A.shape[0] for module in held.values()] == [4, 2, 2, 4]
        assert [module.scale for module in held.values()] == [2, 4, 4, 0.25]

    def test_rslora(self):
        assert lorafx.inject(nn.Linear(3, 3), 16, alpha=8, rslora=True).lora.default.scale == 2

    @pytest.mark.parametrize(
        "base, asked, expected",
        [
            (torch.float16, None, torch.float32),
            (torch.bfloat16, None, torch.float32),
            (torch.float32, None, torch.float32),
            (torch.float64, None, torch.float64),
            (torch.bfloat16, torch.bfloat16, torch.bfloat16),
            (torch.float32, torch.float64, torch.float64),
        ],
    )
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
        assert torch.equal(model.state_dict()["down.weight"], block.down.weight)
        assert model.down.weight is model.down.trained.default.weight
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
        lorafx.remove(model, "default")
        assert not any("trained" in key for key in model.state_dict())
        assert torch.equal(lorafx.eject(model)(TOKENS), base(TOKENS))

    def test_a_tied_module_stays_tied(self, block):
        model = lorafx.inject(block, targets="square", trainable="head")
        assert model.head.weight is model.embedding.weight is not block.head.weight
        assert [name for name, _ in lorafx.named_parameters(model)] == [
            "embedding.trained.default.weight", "square.lora.default.A", "square.lora.default.B"]
        merged = lorafx.merge(model)
        assert merged.head.weight is merged.embedding.weight

    def test_one_adapter_trains_what_another_adapts(self, block):
        model = lorafx.inject(block, adapter="a", targets="square", trainable="down")
        with torch.no_grad():
            model.down.weight.add_(1.0)
        lorafx.add(model, "b", targets="down")
        with pytest.raises(
            lorafx.NoSiteError, match="'down' cannot be adapted: it is trained whole"
        ):
            lorafx.add(model, "c", targets="down", trainable="down")
        randomise(model)
        lorafx.activate(model, ["a", "b"])
        torch.testing.assert_close(
            lorafx.merge(model)(TOKENS), model(TOKENS), rtol=1e-10, atol=1e-10
        )
        only_b = lorafx.merge(model, "b")
        lorafx.activate(model, "b")
        torch.testing.assert_close(only_b(TOKENS), model(TOKENS), rtol=1e-10, atol=1e-10)

    def test_two_adapters_that_train_one_module(self, block):
        model = lorafx.inject(block, trainable="down")
        lorafx.add(model, "other", trainable=["down"])
        with pytest.raises(
            lorafx.AdapterError,
            match="'default' and 'other' both train 'down.weight'.*activate one of",
        ):
            lorafx.activate(model, ["default", "other"])

    def test_what_is_trained_whole_is_not_adapted(self, block):
        assert names(lorafx.inject(block, targets="linear", trainable="down")) == [
            "square",
            "up",
            "head",
        ]
        with pytest.raises(
            lorafx.NoSiteError, match="'down' cannot be adapted: it is trained whole"
        ):
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
        torch.testing.assert_close(
            model(TOKENS), oracle(block, sites, factors, TOKENS), rtol=1e-10, atol=1e-10
        )
        assert [type(m) for m in lorafx.eject(model).modules()] == [
            type(m) for m in block.modules()
        ]

    def test_a_failed_add_changes_nothing(self, block):
        model = lorafx.inject(block)
        before = fingerprint(model)
        for config in (
            {"targets": "nope"},
            {"rank": 0},
            {"trainable": "nope"},
            {"rank_pattern": {"nope": 2}},
        ):
            with pytest.raises(lorafx.LorafxError):
                lorafx.add(model, "b", **config)
        model.down.lora = nn.Identity()
        with pytest.raises(
            lorafx.UnsupportedModelError, match="'down' has an attribute 'lora' already"
        ):
            lorafx.add(model, "b", targets="linear")
        del model.down.lora
        assert fingerprint(model) == before and lorafx.adapters(model) == ["default"]

    def test_remove_frees_the_tensors(self, block):
        model = lorafx.inject(block, adapter="a")
        lorafx.add(model, "b")
        lorafx.activate(model, ["a", "b"])
        lorafx.remove(model, "a")
        assert [name for name, _ in lorafx.named_parameters(model)] == [
            "square.lora.b.A",
            "square.lora.b.B",
        ]
        assert set(model.state_dict()) == {
            *block.state_dict(),
            "square.lora.b.A",
            "square.lora.b.B",
        }

    def test_disabled_survives_an_error(self, block):
        model = randomise(lorafx.inject(block))
        expected = model(TOKENS)
        with pytest.raises(RuntimeError, match="inside"), lorafx.disabled(model):
            raise RuntimeError("inside")
        assert torch.equal(model(TOKENS), expected)

    def test_load_onto_an_injected_model_adds(self, block, tmp_path):
        first, second = (
            randomise(lorafx.inject(block, targets=t), seed)
            for seed, t in enumerate(("square", "up"))
        )
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
        with pytest.raises(
            lorafx.TiedWeightError,
            match=r"'head' is tied to 'embedding'.*merge\(model, untie=True\)",
        ):
            lorafx.merge(model)
        merged = lorafx.merge(model, untie=True)
        torch.testing.assert_close(merged(TOKENS), model(TOKENS), rtol=1e-10, atol=1e-10)
        assert merged.embedding.weight.data_ptr() == block.embedding.weight.data_ptr()
        # this one reads its weight twice through one module
        tied = randomise(lorafx.inject(Tied().double(), targets="linear"))
        torch.testing.assert_close(lorafx.merge(tied)(TOKENS), tied(TOKENS), rtol=1e-10, atol=1e-10)
        lorafx.add(model, "square only", targets="square")
        assert (
            lorafx.merge(model, "square only").head.weight.data_ptr()
            == block.head.weight.data_ptr()
        )

    def test_of_chosen_adapters_leaves_the_model_alone(self, block):
        model = randomise(lorafx.inject(block, adapter="a"))
        lorafx.add(model, "b")
        randomise(model)
        before = fingerprint(model)
        merged = lorafx.merge(model, {"a": 0.5, "b": -1.0})
        assert fingerprint(model) == before
        lorafx.activate(model, {"a": 0.5, "b": -1.0})
        torch.testing.assert_close(merged(TOKENS), model(TOKENS), rtol=1e-10, atol=1e-10)
        assert not any("lora" in key for key in merged.state_dict())
        assert "_lorafx" not in vars(merged)
        assert all(p.requires_grad for p in merged.parameters())
