"""Sites beyond a Linear's weight: attention, blocks, experts, computed and narrow weights."""

import copy

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import lorafx
from tests.support.attention import PADDING, X, attention
from tests.support.internals import internal
from tests.support.oracle import frozen, randomise


def names(model, targets="linear"):
    return [site.name for site in lorafx.sites(model, targets)]


class TestAttention:
    def test_four_sites(self):
        assert names(attention()) == [
            "in_proj_weight[q]",
            "in_proj_weight[k]",
            "in_proj_weight[v]",
            "out_proj",
        ]
        assert names(attention(kdim=6, vdim=4)) == [
            "q_proj_weight",
            "k_proj_weight",
            "v_proj_weight",
            "out_proj",
        ]
        assert names(nn.Sequential(attention()), "in_proj_weight[v]") == ["0.in_proj_weight[v]"]
        assert "in_proj_weight[q]" not in names(attention(), "*v]")
        model = lorafx.inject(attention(), rank=3, targets="in_proj_weight[q]")
        assert [tuple(p.shape) for p in lorafx.parameters(model)] == [(3, 8), (8, 3)]
        assert set(attention().state_dict()) < set(model.state_dict())

    @pytest.mark.parametrize("training", [True, False])
    def test_small_adapters_survive_bfloat16(self, training):
        """A delta below W's rounding acts as it does in float64; a rounded sum loses it."""
        base = nn.MultiheadAttention(64, 1, bias=False, batch_first=True).bfloat16().train(training)
        model, x = (
            lorafx.inject(base, rank=1, targets="in_proj_weight[v]"),
            (1 + torch.randn(4, 9, 64) / 9).bfloat16(),
        )
        for factor in lorafx.parameters(model):
            nn.init.constant_(factor, 0.01)
        weight = model.in_proj_weight
        assert (
            internal("whole")(weight.matrix, weight.addends) == weight.matrix
        ).float().mean() > 0.7
        exact = copy.deepcopy(model).double()
        for grad in (True, False):
            with torch.set_grad_enabled(grad), torch.nn.attention.sdpa_kernel(
                torch.nn.attention.SDPBackend.MATH
            ):
                with lorafx.disabled(model), lorafx.disabled(exact):
                    without, exact_without = model(x, x, x)[0], exact(*[x.double()] * 3)[0]
                got, wanted = (
                    model(x, x, x)[0].double() - without,
                    exact(*[x.double()] * 3)[0] - exact_without,
                )
            assert abs((got * wanted).sum() / wanted.square().sum() - 1) < 0.1

    def test_the_fused_path_is_taken_and_adapted(self):
        """In eval torch's encoder runs one kernel on nested tensors: padding is zero, as before."""
        base = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2
        ).eval()
        model = randomise(lorafx.inject(base, targets="linear"))
        with torch.no_grad():
            fused, merged = model(X, src_key_padding_mask=PADDING), lorafx.merge(model)(
                X, src_key_padding_mask=PADDING
            )
        unfused = model(X, src_key_padding_mask=PADDING)
        torch.testing.assert_close(fused, merged)
        assert not fused[PADDING].any() and not merged[PADDING].any() and unfused[PADDING].any()
        torch.testing.assert_close(fused[~PADDING], unfused[~PADDING], rtol=1e-4, atol=1e-5)
        nested = torch.nested.nested_tensor([X[0], X[1, :3]])
        with torch.no_grad():
            torch.testing.assert_close(
                model.layers[0](nested)[1], lorafx.merge(model).layers[0](nested)[1]
            )

    def test_trained_loss_is_the_loss_in_eval(self):
        base = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 1
        )
        model = lorafx.inject(base, targets="linear")
        optimizer = torch.optim.Adam(lorafx.parameters(model), lr=1e-2)
        for _ in range(20):
            optimizer.zero_grad()
            loss = (model(X) - X.roll(1, 0)).square().mean()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            trained, untrained = (
                (m.eval()(X) - X.roll(1, 0)).square().mean() for m in (model, base)
            )
        assert trained < loss < untrained
        assert torch.equal(base.layers[0].linear1.weight, model.layers[0].linear1.frozen_weight)

    def test_one_compiled_graph(self):
        model = randomise(
            lorafx.inject(
                nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), targets="linear"
            )
        )
        counter = torch._dynamo.testing.CompileCounter()
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        torch.testing.assert_close(compiled(X), model(X))
        assert counter.frame_count == 1


class Projection(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 20), nn.Linear(8, 8)

    def forward(self, x):
        query, key, value = self.qkv(x).split([8, 4, 8], dim=-1)
        return self.out(value) * query.sum(-1, keepdim=True) + key.sum()


class TestBlocks:
    def test_named_by_the_variables_of_forward(self):
        model = nn.Sequential(Projection())
        assert lorafx.sites(model)[0].blocks == {"query": (0, 8), "key": (8, 4), "value": (12, 8)}
        injected = lorafx.inject(model, rank=2, targets=["qkv[query]", "*.qkv[value]"])
        assert list(dict(lorafx.named_parameters(injected))) == [
            "0.qkv.lora[query].default.A",
            "0.qkv.lora[query].default.B",
            "0.qkv.lora[value].default.A",
            "0.qkv.lora[value].default.B",
        ]
        assert torch.equal(injected(X), frozen(model)(X))
        randomise(injected)
        assert torch.equal(injected[0].qkv(X)[..., 8:12], model[0].qkv(X)[..., 8:12])
        torch.testing.assert_close(lorafx.merge(injected)(X), injected(X))

    def test_rows_of_any_weight_and_files(self, tmp_path):
        model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3))
        injected = randomise(lorafx.inject(model, targets=["0[1:3]", "1"]))
        assert names(model, "0[1:3]") == ["0[1:3]"] and names(model, "1") == ["1"]
        changed = (injected[0](X) != model[0](X)).any(0).any(0)
        assert changed.tolist() == [False, True, True, False, False, False]
        lorafx.add(injected, "more", targets=["0", "0[1:3]"])
        lorafx.save(injected, tmp_path / "a.safetensors")
        assert torch.equal(lorafx.load(model, tmp_path / "a.safetensors")(X), injected(X))
        lorafx.activate(randomise(injected), ["default", "more"])
        torch.testing.assert_close(lorafx.merge(injected)(X), injected(X))
        for wrong in ("0[3:1]", "0[0:7]", "0[q]", "0[1:3][0:1]"):
            with pytest.raises(lorafx.NoSiteError):
                lorafx.inject(model, targets=wrong)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 16, 8) / 3), nn.Parameter(
            torch.randn(3, 16, 8) / 3
        )

    def forward(self, x, offsets):
        if offsets.numel():
            x = F.grouped_mm(x, self.up.transpose(-2, -1), offs=offsets)
        return F.grouped_mm(x, self.down, offs=offsets)


class TestExperts:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_branch_an_expert(self, dtype):
        base, x = Experts().to(dtype), torch.randn(9, 8).to(dtype)
        offsets = torch.tensor([2, 2, 9], dtype=torch.int32)
        model = lorafx.inject(base, rank=2, targets="linear")
        assert [(s.name, s.experts, s.in_features, s.out_features) for s in lorafx.sites(base)] == [
            ("up", 3, 8, 16), ("down", 3, 16, 8)]
        assert [tuple(p.shape) for p in lorafx.parameters(model)] == [
            (3, 2, 8),
            (3, 16, 2),
            (3, 2, 16),
            (3, 8, 2),
        ]
        assert torch.equal(model(x, offsets), frozen(base)(x, offsets))
        torch.nn.init.normal_(model.lora_up.default.B)
        model(x, offsets).float().square().sum().backward()
        used = [float(gradient.abs().max()) > 0 for gradient in model.lora_down.default.B.grad]
        assert used == [True, False, True]  # nobody chose the second
        wide = lorafx.merge(copy.deepcopy(model).float())(x.float(), offsets)
        torch.testing.assert_close(model(x, offsets).float(), wide, rtol=0.05, atol=0.1)

    def test_a_file_for_other_experts_does_not_fit(self, tmp_path):
        lorafx.save(lorafx.inject(Experts(), targets="linear"), tmp_path / "a.safetensors")
        other = Experts()
        other.up = nn.Parameter(torch.randn(4, 16, 8))
        with pytest.raises(
            lorafx.MismatchError, match="3 experts at 'up', but this model 8 to 16 .* 4 experts"
        ):
            lorafx.load(other, tmp_path / "a.safetensors")


class TestComputedWeights:
    @pytest.mark.parametrize("make", [parametrizations.weight_norm, parametrizations.orthogonal,
                                      parametrizations.spectral_norm])
    def test_merging_bakes_the_parametrization_into_the_copy(self, make):
        base = make(nn.Linear(8, 8)).eval()
        model = randomise(lorafx.inject(base, targets="square"))
        merged = lorafx.merge(model)
        torch.testing.assert_close(merged(X), model(X))
        assert type(merged) is nn.Linear and set(merged.state_dict()) == {"weight", "bias"}
        assert parametrize.is_parametrized(base)
        assert parametrize.is_parametrized(lorafx.eject(model))
        assert torch.equal(lorafx.eject(model)(X), base(X))

    def test_other_parametrizations_stay(self):
        base = parametrizations.weight_norm(
            parametrizations.weight_norm(nn.Linear(8, 8)), "bias", dim=None
        )
        merged = lorafx.merge(randomise(lorafx.inject(base)))
        assert parametrize.is_parametrized(merged, "bias")
        assert not parametrize.is_parametrized(merged, "weight")

    @pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
    def test_a_weight_that_a_hook_computes_cannot_be_merged(self):
        base = nn.utils.weight_norm(nn.Linear(8, 8))
        model = lorafx.inject(base)
        assert torch.equal(model(X), base(X).detach())
        before = model(X)
        randomise(model)
        assert not torch.equal(model(X), before)
        with pytest.raises(
            lorafx.UnsupportedModelError, match="computed before every call, by a hook"
        ):
            lorafx.merge(model)
