"""The benchmarks' MiniMind: its cache and padding, its sites, its merge."""

import pickle

import pytest
import torch

import lorafx
from common.minimind import MiniMind
from common.minimind_layers import Config
from tests.support.oracle import frozen, randomise

CONFIGS = {
    "dense": Config(
        hidden=24, layers=2, heads=3, kv_heads=1, vocabulary=31, max_length=32, dropout=0.1
    ),
    "no flash": Config(
        hidden=24, layers=2, heads=3, kv_heads=1, vocabulary=31, max_length=32, flash=False
    ),
    "experts": Config(
        hidden=24, layers=2, heads=3, kv_heads=3, vocabulary=31, max_length=32, experts=3
    ),
}
TOKENS = torch.randint(31, (2, 7), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def model(request):
    return MiniMind(request.param).eval()


def test_a_cache_changes_nothing(model):
    for mask in (None, MASK):
        with_cache, without = (
            model.generate(TOKENS, 9, mask=mask, use_cache=use) for use in (True, False)
        )
        assert torch.equal(with_cache, without) and with_cache.shape == (2, 16)


def test_padding_changes_nothing(model):
    padded = model(TOKENS, MASK).logits[1, 2:]
    alone = model(TOKENS[1:, 2:]).logits[0]
    # Padding shifts its positions, and rotary embeddings see differences of positions only.
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)


def test_the_tracer_meets_it(model):
    injected, base = lorafx.inject(model, rank=2, targets="linear"), frozen(model)
    for training in (False, True):
        for call in (lambda m: m(TOKENS), lambda m: m(TOKENS, MASK, use_cache=True),
                     lambda m: m(TOKENS[:, :1], cache=base(TOKENS, use_cache=True).cache)):
            outputs = []
            for m in (injected.train(training), base.train(training)):
                torch.manual_seed(2)
                outputs.append(call(m).logits)
            assert torch.equal(*outputs)
    assert torch.equal(injected.eval().generate(TOKENS, 5), base.eval().generate(TOKENS, 5))
    projections = 7 if not model.config.experts else 4 + 1 + 3 * (3 + 1)
    assert len(lorafx.summary(injected).sites) == 2 * projections + 1
    assert not any("proj" in name for name in lorafx.summary(injected).skipped)


def test_no_silent_site_and_merge(model):
    injected = lorafx.inject(model, rank=2, targets="linear")
    before = injected(TOKENS).logits
    before.sum().backward()
    for name, parameter in lorafx.named_parameters(injected):
        if name.endswith(".B"):
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
            with torch.no_grad():
                parameter.normal_()
            assert not torch.equal(injected(TOKENS).logits, before), name
            with torch.no_grad():
                parameter.zero_()
    randomise(injected)
    merged = lorafx.merge(injected, untie=True)
    torch.testing.assert_close(merged(TOKENS).logits, injected(TOKENS).logits, rtol=1e-4, atol=1e-5)
    twin = pickle.loads(pickle.dumps(injected))
    assert torch.equal(twin(TOKENS).logits, injected(TOKENS).logits)
