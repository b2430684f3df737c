"""An adapter under another name is the same one; and one of the same name as one that is gone."""

import re

import pytest
import torch
import torch._dynamo
from torch import nn

import lorafx
from lorafx._model import replacing
from tests.support.models import TOKENS, Block
from tests.support.oracle import frozen, randomise


def adapted() -> nn.Module:
    """Three adapters on a model with a tied head; the second trains a tied pair and a norm whole.
    """
    torch.manual_seed(0)
    model = lorafx.inject(Block().double().eval(), 2, targets="linear", adapter="a", alpha=3)
    lorafx.add(model, "b", 3, targets=["square", "up"], trainable=["head", "norm"])
    lorafx.add(model, "c", 1, targets="square")
    return randomise(model)


def test_renamed_in_its_place():
    """Order, weights, tensors, gradients, files: all is as it was but for the name in the keys."""
    model = adapted()
    lorafx.activate(model, {"b": 0.5, "a": -2.0})
    model(TOKENS).sum().backward()
    before, keys = dict(lorafx.named_parameters(model)), list(model.state_dict())
    expected = model(TOKENS)
    lorafx.rename(model, "b", "last")
    assert lorafx.adapters(model) == ["a", "last", "c"]
    assert torch.equal(model(TOKENS), expected)
    after = dict(lorafx.named_parameters(model))
    assert [name.replace(".last.", ".b.") for name in after] == list(before)
    for old, new in zip(before.values(), after.values()):
        assert new is old and new.requires_grad and new.grad is not None
    assert [key.replace(".last.", ".b.") for key in model.state_dict()] == keys
    base = lorafx.eject(model)(TOKENS)
    with lorafx.disabled(model):
        assert torch.equal(model(TOKENS), base)
    lorafx.activate(model, "c")
    lorafx.activate(model, {"last": 0.5, "a": -2.0})
    assert torch.equal(model(TOKENS), expected)
    with pytest.raises(lorafx.AdapterError, match="has no adapter 'b'; it has 'a', 'last', 'c'"):
        lorafx.activate(model, "b")


def trained(name: str | None, tmp_path) -> list[torch.Tensor]:
    """What an adapter has after four steps, between which it may get another name."""
    model = adapted()
    lorafx.activate(model, "b")
    optimizer = torch.optim.AdamW(lorafx.parameters(model), lr=0.1)
    for step in range(1, 5):
        if step == 3 and name is not None:
            lorafx.rename(model, "b", name)
        optimizer.zero_grad()
        model(TOKENS).square().sum().backward()
        optimizer.step()
    path = tmp_path / f"{name}.safetensors"
    lorafx.save(model, path, optimizer=optimizer, step=4)
    assert lorafx.resume(model, optimizer, path) == 4
    return [parameter.detach() for parameter in lorafx.parameters(model, name or "b")]


def test_training_goes_on(tmp_path):
    assert all(map(torch.equal, trained("d", tmp_path), trained(None, tmp_path)))


def test_while_disabled_and_compiled_and_merged():
    model = adapted()
    lorafx.activate(model, ["a", "c"])
    expected, base = model(TOKENS), lorafx.eject(model)(TOKENS)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(TOKENS), expected)
    with lorafx.disabled(compiled):
        lorafx.rename(compiled, "a", "first")
        assert torch.equal(model(TOKENS), base)
    torch.testing.assert_close(compiled(TOKENS), expected)
    assert torch.equal(model(TOKENS), expected)
    torch.testing.assert_close(lorafx.merge(model, untie=True)(TOKENS), expected)
    with torch.no_grad():
        for parameter in lorafx.parameters(model, "first"):
            parameter.mul_(2)
    torch.testing.assert_close(compiled(TOKENS), model(TOKENS))
    assert (model(TOKENS) - expected).abs().max() > 1e-3


def test_forward_finds_the_adapter_at_every_moment(monkeypatch):
    """As another thread's forward would, at each step of the renaming."""
    model, seen = adapted(), []
    lorafx.activate(model, ["a", "b"])
    expected = model(TOKENS)
    for place, step in ((replacing, "refresh"), (lorafx._rename, "check_new_name")):
        own = getattr(place, step)

        def looking(*args, own=own):
            seen.append(model(TOKENS))
            own(*args)
            seen.append(model(TOKENS))

        monkeypatch.setattr(place, step, looking)
    lorafx.rename(model, "b", "d")
    assert len(seen) == 4 and all(torch.equal(found, expected) for found in seen)


def test_a_name_that_was_given_before():
    """`remove`, then `add` and `rename`, of the same names as ever; nothing is left of the old."""
    model = adapted()
    lorafx.activate(model, "b")
    lorafx.remove(model, "b")
    assert torch.equal(model(TOKENS), lorafx.eject(model)(TOKENS))
    lorafx.add(model, "b", 2, targets="down", trainable="norm")
    lorafx.activate(model, "b")
    assert torch.equal(model(TOKENS), lorafx.eject(model)(TOKENS))
    owners = {name.partition(".")[0] for name, _ in lorafx.named_parameters(model)}
    assert owners == {"down", "norm"}
    randomise(model)
    lorafx.rename(model, "a", "old")
    lorafx.rename(model, "b", "a")
    lorafx.rename(model, "old", "b")
    assert lorafx.adapters(model) == ["b", "c", "a"]
    assert model.down.lora.a.A.shape == (2, 5) and model.up.lora.b.scale == 1.5
    model(TOKENS).sum().backward()
    assert model.down.lora.a.A.grad is not None and model.up.lora.b.A.grad is None


ERRORS = {
    "unknown": ("x", "y", lorafx.AdapterError, "no adapter 'x'; it has 'a', 'b', 'c'"),
    "taken": ("a", "b", lorafx.AdapterError, "has an adapter 'b' already: choose another name"),
    "the same": ("a", "a", lorafx.AdapterError, "has an adapter 'a' already"),
    "no name": ("a", "x.y", lorafx.ConfigError, "'x.y' cannot name an adapter"),
    "a number": ("a", 3, lorafx.ConfigError, "3 cannot name an adapter"),
    "an attribute": ("a", "forward", lorafx.ConfigError, "'forward' cannot name an adapter"),
}


@pytest.mark.parametrize("old, new, kind, message", ERRORS.values(), ids=ERRORS)
def test_errors(old, new, kind, message):
    model = adapted()
    before, keys = lorafx.adapters(model), list(model.state_dict())
    with pytest.raises(kind, match=re.escape(message)):
        lorafx.rename(model, old, new)
    assert lorafx.adapters(model) == before and list(model.state_dict()) == keys
    with pytest.raises(lorafx.NotInjectedError, match="is not an injected model"):
        lorafx.rename(frozen(Block()), old, new)
