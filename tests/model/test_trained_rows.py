"""Rows of a weight that train alone, such as new tokens of an embedding that a head shares."""

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.func import functional_call

import lorafx
from tests.support.oracle import fingerprint, frozen, randomise


class Model(nn.Module):
    """Tokens to tokens; the head has a weight of its own, or the embedding's."""

    def __init__(self, tied: bool, tokens: int = 13) -> None:
        super().__init__()
        self.tokens, self.up = nn.Embedding(tokens, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, tokens, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.up(self.tokens(ids))))


IDS = torch.tensor([[3, 12, 0, 9], [7, 1, 9, 2]])


def block_of(rows: list[int]) -> str:
    """As the names of state_dict have it: runs of two and more as first:stop."""
    parts, rest = [], sorted(set(rows))
    while rest:
        length = 1
        while length < len(rest) and rest[length] == rest[0] + length:
            length += 1
        parts.append(f"{rest[0]}:{rest[0] + length}" if length > 1 else f"{rest[0]}")
        rest = rest[length:]
    return f"[{','.join(parts)}]"


def expected(base: nn.Module, model: nn.Module, rows: dict[str, Tensor], ids: Tensor) -> Tensor:
    """By torch alone: rows {parameter: index} replaced, and W + B A at the sites `up` and `head`.
    """
    tensors = dict(model.named_parameters())
    named = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        named[name] = parameter.detach().clone()
    for name, index in rows.items():
        owner, _, attribute = name.rpartition(".")
        key = f"{owner}.trained.default.{attribute}{block_of(index.tolist())}"
        tied = [other for other, own in base.named_parameters(remove_duplicate=False)
                if own is base.get_parameter(name)]
        for other in tied:
            named[other][index] = tensors[key].detach()
    for site in ("up", "head"):
        if f"{site}.lora.default.A" in tensors:
            delta = tensors[f"{site}.lora.default.B"] @ tensors[f"{site}.lora.default.A"]
            named[f"{site}.weight"] = named[f"{site}.weight"] + delta
    return functional_call(base, named, (ids,), tie_weights=False)


@settings(max_examples=15)
@given(
    tied=st.booleans(), rows=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    shape=st.lists(st.integers(0, 4), max_size=2), targets=st.sampled_from(["up", ["up", "head"]])
)
def test_identity_and_outputs(tied, rows, shape, targets):
    base = Model(tied).double()
    before, ids = fingerprint(base), torch.randint(0, 13, shape)
    pattern = f"tokens[{','.join(map(str, rows))}]"
    model = lorafx.inject(base, 2, targets=targets, trainable=pattern)
    index = torch.tensor(sorted(set(rows)))
    key = f"tokens.trained.default.weight{block_of(rows)}"
    assert torch.equal(model(ids), frozen(base)(ids))
    assert key in model.state_dict().keys() - base.state_dict().keys()
    assert model.state_dict()[key].shape == (len(index), 6)
    randomise(model)
    wanted = expected(base, model, {"tokens.weight": index}, ids)
    torch.testing.assert_close(model(ids), wanted, rtol=1e-10, atol=1e-10)
    merged = lorafx.merge(model, untie=True)
    torch.testing.assert_close(merged(ids), wanted, rtol=1e-10, atol=1e-10)
    assert (merged.head.weight is merged.tokens.weight) == (tied and targets == "up")
    with lorafx.disabled(model):
        assert torch.equal(model(ids), frozen(base)(ids))
    assert torch.equal(lorafx.eject(model)(ids), frozen(base)(ids))
    assert fingerprint(base) == before


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_are_those_of_the_rows(tied):
    base = Model(tied).double()
    model = randomise(lorafx.inject(base, 2, targets="up", trainable="tokens[1,9:11]"))
    rows = model.get_parameter("tokens.trained.default.weight[1,9:11]")
    [found] = torch.autograd.grad(model(IDS).square().sum(), [rows])
    merged = lorafx.merge(model).requires_grad_(False)
    merged.tokens.weight.requires_grad_()
    [wanted] = torch.autograd.grad(merged(IDS).square().sum(), [merged.tokens.weight])
    torch.testing.assert_close(found, wanted[[1, 9, 10]], rtol=1e-10, atol=1e-10)
    assert wanted.count_nonzero(dim=1).count_nonzero() > 3 and found[1].abs().max() > 1e-3
    model(IDS).square().sum().backward()
    assert dict(model.named_parameters())["tokens.weight"].grad is None


def test_files_and_a_run_that_goes_on(tmp_path):
    base, path = Model(True), tmp_path / "a.safetensors"
    model = lorafx.inject(base, 2, targets="up", trainable=["tokens[9:11]", "up.bias", "head[1]"])

    def train(model, optimizer):
        optimizer.zero_grad()
        model(IDS).square().sum().backward()
        optimizer.step()

    optimizer = torch.optim.AdamW(lorafx.parameters(model), lr=0.1)
    train(model, optimizer)
    lorafx.save(model, path)
    saved = safetensors.torch.load_file(path)
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == {
        "up.lora.A": (2, 6), "up.lora.B": (6, 2), "up.bias": (6,), "tokens.weight[1,9:11]": (3, 6)}
    lorafx.save(model, path, optimizer=optimizer, step=1)
    train(model, optimizer)
    again = lorafx.load(base, path)
    optimizer = torch.optim.AdamW(lorafx.parameters(again), lr=0.1)
    assert lorafx.resume(again, optimizer, path) == 1
    train(again, optimizer)
    assert torch.equal(again(IDS), model(IDS))
    assert torch.equal(lorafx.load(Model(True, 13), path).up.lora.default.A, saved["up.lora.A"])
    for other, message in (
        (Model(True, 10), r"trained 'tokens.weight\[1,9:11\]' \(3, 6\).*has it as \(10, 6\)"),
        (nn.Sequential(nn.Linear(6, 6)), "has"),
    ):
        with pytest.raises(lorafx.MismatchError, match=message):
            lorafx.load(other, path)


def test_two_adapters():
    """Rows that differ train together, in one weight; the same rows do not."""
    base = Model(True).double()
    model = lorafx.inject(base, 2, targets="up", trainable="tokens[9:11]")
    lorafx.add(model, "b", trainable="tokens[3,12]")
    lorafx.add(model, "c", trainable="tokens[10:13]")
    lorafx.add(model, "d", trainable="tokens")
    randomise(model)
    lorafx.activate(model, ["default", "b"])
    both = model(IDS)
    torch.testing.assert_close(lorafx.merge(model)(IDS), both, rtol=1e-10, atol=1e-10)
    lorafx.compose(model, {"default": 1, "b": 1}, "both")
    lorafx.activate(model, "both")
    torch.testing.assert_close(model(IDS), both, rtol=1e-10, atol=1e-10)
    lorafx.activate(model, "b")
    assert (model(IDS) - both).abs().max() > 1e-3
    for others, name in ((["default", "c"], "10:13"), (["b", "c"], "10:13"), (["d", "b"], "3,12")):
        with pytest.raises(
            lorafx.AdapterError, match=rf"both train 'tokens.weight\[{name}\]', and one tensor"
        ):
            lorafx.activate(model, others)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_narrow_base(dtype):
    """The rows are float32, and cast where they are used."""
    base = Model(True).to(dtype)
    model = lorafx.inject(base, 2, targets="up", trainable="tokens[9:11]")
    assert {parameter.dtype for parameter in lorafx.parameters(model)} == {torch.float32}
    assert torch.equal(model(IDS), frozen(base)(IDS))
    assert lorafx.merge(model).tokens.weight.dtype == dtype


def test_in_a_compiled_program():
    model = randomise(lorafx.inject(Model(True), 2, targets="up", trainable="tokens[1,9:11]"))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS), model(IDS))
    compiled(IDS).sum().backward()
    assert model.get_parameter("tokens.trained.default.weight[1,9:11]").grad is not None


def test_a_weight_that_is_resized_later(tmp_path):
    """More rows are as they are in the base; fewer are not those that were trained."""
    model = randomise(lorafx.inject(Model(False), 2, targets="up", trainable="tokens[9:11]"))
    weight = dict(model.named_parameters())["tokens.weight"].detach()
    model.tokens.weight = nn.Parameter(torch.cat([weight, torch.ones(2, 6)]))
    ids = torch.tensor([14, 9, 0])
    torch.testing.assert_close(model(ids), lorafx.merge(model)(ids))
    lorafx.save(model, tmp_path / "a.safetensors")
    model.tokens.weight = nn.Parameter(torch.ones(10, 6))
    with pytest.raises(lorafx.AdapterError, match=r"trains 'tokens.weight\[9:11\]' \(2, 6\)"):
        lorafx.save(model, tmp_path / "a.safetensors")


def test_writing_into_what_is_read():
    model = lorafx.inject(Model(False), 2, targets="up", trainable="tokens[9:11]")
    with pytest.raises(lorafx.AdaptedWeightError, match="would be lost"):
        with torch.no_grad():
            model.tokens.weight.zero_()


ERRORS = {
    "tokens[12:14]": (lorafx.ConfigError, "asks for row 13 of 'tokens.weight', which has 13"),
    "tokens[5:5]": (lorafx.ConfigError, r"means no rows; \[5,100:103\] are 5 and 100 to 102"),
    "tokens[1:2:3]": (lorafx.ConfigError, "means no rows"),
    "tokns[1]": (lorafx.NoSiteError, r"matches trainable='tokns\[1\]'; this model has 'tokens'"),
}


@pytest.mark.parametrize("pattern", ERRORS)
def test_errors(pattern):
    error, message = ERRORS[pattern]
    with pytest.raises(error, match=message):
        lorafx.inject(Model(False), trainable=pattern)


def test_all_of_a_tensor_and_some_rows():
    with pytest.raises(lorafx.ConfigError, match="all of 'tokens.weight' and some of its rows"):
        lorafx.inject(Model(True), trainable=["head", "tokens[1]"])
