"""What adapters train whole: its dtype, its buffers, its ties, and what became of its module."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lorafx
from tests.support.oracle import randomise

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 2]])
NARROW = (torch.float16, torch.bfloat16)


class Net(nn.Module):
    """A tied embedding, two norms of which one has statistics, a convolution, a linear call."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.up = nn.Embedding(7, 6), nn.Linear(6, 6)
        self.norm, self.batch_norm = nn.LayerNorm(6), nn.BatchNorm1d(6)
        self.conv, self.head = nn.Conv1d(6, 6, 1), nn.Linear(6, 7)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.norm(self.up(self.embedding(ids)).tanh()).mT
        return self.head(self.conv(self.batch_norm(x)).mT)


WHOLE = ["embedding", "norm", "batch_norm", "conv", "head"]


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return Net().to(dtype).requires_grad_(False)


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: tensor for name, tensor in lorafx.named_parameters(model) if ".trained." in name
    }


class TestDtype:
    @pytest.mark.parametrize("base", [*NARROW, torch.float32])
    @pytest.mark.parametrize("asked", [None, *NARROW, torch.float32, torch.float64])
    def test_never_narrower_than_the_base_and_identity(self, base, asked):
        model, plain = (lorafx.inject(net(base), targets="up", trainable=WHOLE, dtype=asked),
                        net(base).requires_grad_())  # ATen picks kernels by the flag
        plain.up.requires_grad_(False)
        expected = torch.promote_types(asked or torch.float32, base)
        assert {tensor.dtype for tensor in trained(model).values()} == {expected}
        for training in (True, False):
            assert torch.equal(model.train(training)(IDS), plain.train(training)(IDS))
        assert model.batch_norm.trained.default.running_mean.dtype == base

    @pytest.mark.parametrize("dtype", NARROW)
    def test_gradients_are_those_of_what_the_base_computes(self, dtype):
        model, plain = lorafx.inject(net(dtype), targets="up", trainable=WHOLE), net(dtype)
        model.train()(IDS).float().square().sum().backward()
        plain.requires_grad_().train()(IDS).float().square().sum().backward()
        for name, tensor in trained(model).items():
            theirs = plain.get_parameter(name.replace(".trained.default", "")).grad
            assert tensor.grad.dtype == torch.float32
            torch.testing.assert_close(tensor.grad.to(dtype), theirs, rtol=2e-2, atol=2e-2)

    def test_grad_scaler_steps(self):
        model = lorafx.inject(net(torch.float16), targets="up", trainable="head").train()
        before = model.head.trained.default.bias.detach().clone()
        optimizer = torch.optim.SGD(lorafx.parameters(model), lr=1e-4)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(model(IDS).float().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        moved = model.head.trained.default.bias - before
        torch.testing.assert_close(moved, torch.full((7,), -1e-4 / 7), rtol=1e-2, atol=0)
        assert torch.equal(model.head.bias, before.half())  # the step is below half's precision

    @pytest.mark.parametrize("dtype", NARROW)
    def test_merging_rounds_once_and_files_hold_all(self, dtype, tmp_path):
        model = randomise(lorafx.inject(net(dtype), targets="up", trainable=WHOLE)).eval()
        merged = lorafx.merge(model)
        assert merged.head.weight is merged.embedding.weight
        assert torch.equal(merged.norm.weight, model.norm.trained.default.weight.to(dtype))
        lorafx.save(model, tmp_path / "a.safetensors")
        loaded = lorafx.load(net(dtype), tmp_path / "a.safetensors").eval()
        for name, tensor in trained(loaded).items():
            assert tensor.dtype == torch.float32 and torch.equal(tensor, trained(model)[name])
        assert torch.equal(loaded(IDS), model(IDS))

    @pytest.mark.parametrize("write", [
        lambda layer: layer.weight.add_(1), lambda layer: layer.weight.data.zero_(),
        lambda layer: layer.weight[0].fill_(1), lambda layer: layer.weight.detach().mul_(2),
        lambda layer: setattr(layer.weight, "data", torch.zeros(6)),
        lambda layer: torch.add(layer.bias, 1, out=layer.weight)])
    def test_writing_into_a_cast_is_refused(self, write):
        model = lorafx.inject(net(torch.bfloat16), targets="up", trainable="norm")
        with torch.no_grad(), pytest.raises(lorafx.AdaptedWeightError, match="would be lost"):
            write(model.norm)
        model.norm.trained.default.weight.data.zero_()
        assert not model.norm.weight.any() and net(torch.bfloat16).norm.weight.all()

    def test_compiled_whole(self):
        wide = dict(targets="up", trainable=WHOLE, dtype=torch.float64)  # casts, and exact
        model = randomise(lorafx.inject(net(), **wide)).train()
        again = copy.deepcopy(model)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for forward in (compiled, again):
            forward(IDS).float().square().sum().backward()
        for name, tensor in trained(model).items():
            torch.testing.assert_close(tensor.grad, trained(again)[name].grad, rtol=1e-4, atol=1e-4)
        stats = model.batch_norm.trained.default, again.batch_norm.trained.default
        assert torch.equal(stats[0].running_var, stats[1].running_var)
        assert stats[0].num_batches_tracked == 1


class TestBuffers:
    def test_each_adapter_and_the_base_have_statistics_of_their_own(self):
        base = net()
        model = lorafx.inject(base, targets="up", trainable="batch_norm").train()
        lorafx.add(model, "other", trainable="batch_norm")
        expected = {}
        for which, seed in (("default", 1), ("other", 2), (None, 3)):
            model_alone = net().train()
            ids = torch.randint(7, (5, 4), generator=torch.Generator().manual_seed(seed))
            model_alone(ids)
            expected[which] = model_alone.batch_norm.running_mean
            lorafx.activate(model, which or [])
            model(ids)
        held = model.batch_norm.trained
        for which, stats in (("default", held.default), ("other", held.other)):
            assert torch.equal(stats.running_mean, expected[which]), which
            assert stats.num_batches_tracked == 1
        assert torch.equal(model.state_dict()["batch_norm.running_mean"], expected[None])
        lorafx.activate(model, "default")
        assert torch.equal(model.batch_norm.running_mean, expected["default"])
        with lorafx.disabled(model):
            assert torch.equal(model.batch_norm.running_mean, expected[None])
        assert torch.equal(lorafx.merge(model).batch_norm.running_mean, expected["default"])
        assert torch.equal(lorafx.eject(model).batch_norm.running_mean, expected[None])
        lorafx.compose(model, {"default": 1.0}, "composed")
        lorafx.remove(model, "default")
        lorafx.activate(model, "composed")
        for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin.batch_norm.running_mean, expected["default"])
        assert not base.batch_norm.running_mean.any()

    def test_a_run_is_resumed_with_its_statistics(self, tmp_path):
        def run(steps, model=None):
            again = model is not None
            model = model or lorafx.inject(net(), targets="up", trainable="batch_norm")
            optimizer = torch.optim.SGD(lorafx.parameters(model), lr=0.1)
            at = lorafx.resume(model, optimizer, tmp_path / "a.safetensors") if again else 0
            for _ in range(at, steps):
                optimizer.zero_grad()
                model.train()(torch.randint(7, (5, 4))).square().mean().backward()
                optimizer.step()
            return model, optimizer

        torch.manual_seed(1)
        whole, _ = run(4)
        torch.manual_seed(1)
        half, optimizer = run(2)
        lorafx.save(half, tmp_path / "a.safetensors", optimizer=optimizer, step=2)
        torch.manual_seed(5)
        resumed, _ = run(4, lorafx.load(net(), tmp_path / "a.safetensors"))
        for name, tensor in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], tensor), name

    def test_on_the_meta_device(self):
        with torch.device("meta"):
            model = lorafx.inject(Net(), targets="up", trainable="batch_norm")
        model.to_empty(device="cpu").load_state_dict(net().state_dict(), strict=False)
        lorafx.reset_parameters(model)
        assert torch.equal(model.train()(IDS), net().train()(IDS))
        assert model.batch_norm.trained.default.num_batches_tracked == 1


class Average(nn.Module):
    """Registers its buffer anew, and has others of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("mask", torch.tensor([True, False, True, True]))
        self.register_buffer("bias", torch.tensor([0.0, 0.0, -torch.inf, 0.0]))
        self.register_buffer("nothing", None)
        self.register_buffer("cache", torch.zeros(2), persistent=False)

    def forward(self, x):
        if self.training:
            self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
        return (x - self.mean) * self.weight * self.mask + self.bias.exp()


@pytest.mark.parametrize("file", ["a.safetensors", "folder"])
def test_buffers_of_all_kinds(file, tmp_path):
    base, x = nn.Sequential(nn.Linear(4, 4), Average()), torch.randn(5, 4)
    model, plain = lorafx.inject(base, targets="0", trainable="1").train(), copy.deepcopy(base)
    for _ in range(2):
        assert torch.equal(model(x), plain.requires_grad_(False).train()(x))
    held = model[1].trained.default
    assert torch.equal(held.mean, plain[1].mean) and not model[1]._buffers["mean"].any()
    assert {*held._buffers} == {"mean", "mask", "bias"}
    lorafx.save(model.eval(), tmp_path / file)
    loaded = lorafx.load(base, tmp_path / file).eval()
    assert torch.equal(loaded(x), model(x)) and torch.equal(loaded(x), plain.eval()(x))
    model.load_state_dict(base.state_dict(), strict=False, assign=True)
    assert torch.equal(model(x), loaded(x))


class TestReplaced:
    @pytest.mark.parametrize("replace, message", [
        (lambda model: setattr(model, "head", nn.Linear(6, 9)), "no longer at 'head.bias'"),
        (lambda model: setattr(model.head._parameters["weight"], "data", torch.ones(9, 6)),
         r"'embedding.weight' \(7, 6\), which in the model is \(9, 6\)"),
        (nn.SyncBatchNorm.convert_sync_batchnorm, "no longer at 'batch_norm.weight'")])
    def test_is_an_error_where_it_would_be_lost(self, replace, message, tmp_path):
        model = lorafx.inject(net(), targets="up", trainable=WHOLE)
        replace(model)
        uses = (
            lambda: lorafx.save(model, tmp_path / "a.safetensors"), lambda: lorafx.merge(model),
            lambda: lorafx.compose(model, {"default": 1}, "b"))
        for use in uses:
            with pytest.raises(lorafx.AdapterError, match=message + ".*before lorafx.inject"):
                use()
        assert not [*tmp_path.iterdir()]


class TestTied:
    def test_one_tensor_under_one_key_that_both_read(self):
        model = randomise(lorafx.inject(net(), targets="up", trainable="head"))
        keys = [key for key in model.state_dict() if ".trained." in key]
        assert keys == ["embedding.trained.default.weight", "head.trained.default.bias"]
        again = lorafx.inject(net(), targets="up", trainable="head")
        again.load_state_dict(model.state_dict(), assign=True)
        for twin in (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert twin.head.weight is twin.embedding.weight
            assert torch.equal(twin.eval()(IDS), model.eval()(IDS))
        model(IDS).sum().backward()
        plain = lorafx.merge(model).requires_grad_()
        plain(IDS).sum().backward()
        torch.testing.assert_close(
            model.embedding.trained.default.weight.grad, plain.embedding.weight.grad)

    def test_a_stage_without_the_half_that_holds_it(self):
        model = lorafx.inject(net(), targets="up", trainable="head")
        model.embedding = None
        with pytest.raises(lorafx.AdapterError, match="'head.weight', which is tied to"):
            [*lorafx.parameters(model)]

    def test_uses_of_weight_by_functions(self):
        """A cast is an ordinary tensor to those who read it."""
        model = randomise(lorafx.inject(net(torch.bfloat16), targets="up", trainable="head"))
        x = torch.randn(3, 6, dtype=torch.bfloat16)
        plain = model.embedding.trained.default.weight.bfloat16()
        for use in (lambda w: x @ w.T, lambda w: F.embedding(IDS, w), lambda w: w[1:3].sum(),
                    lambda w: F.linear(x, w, None), lambda w: torch.einsum("bi,oi->bo", x, w)):
            assert torch.equal(use(model.head.weight), use(plain))
