"""A merge on disk against W + sum w s B A in float64, worked out from the files without lorafx.

A sum that is computed in float32 lies within a known bound of the exact one. Rounding is monotonic:
each entry written is between what the ends of that interval are rounded to, which are mostly equal.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

import lorafx
from tests.support.checkpoints import Turned, read_folder, save_sharded
from tests.support.command_line import main
from tests.support.oracle import randomise

# Bits of the significand, and the exponent of the smallest subnormal.
FORMATS = {torch.float32: (24, -149), torch.bfloat16: (8, -133), torch.float16: (11, -24)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Exact = tuple[np.ndarray, np.ndarray]  # a float64 sum, and how far from it a float32 one may be


def rounded(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The nearest numbers of a dtype, ties to even, as float64."""
    bits, smallest = FORMATS[dtype]
    exponent = np.maximum(np.frexp(values)[1] - bits, smallest)
    return np.ldexp(np.rint(np.ldexp(values, -exponent)), exponent)


class Model(nn.Module):
    """Each kind of weight, in unequal prime sizes where the kind allows that."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(7, 3 * 11)
        self.turned, self.square = Turned(11, 13), Turned(13, 13)
        self.experts = nn.Parameter(torch.randn(3, 17, 13))
        self.back = nn.Linear(17, 7)
        self.head = nn.Linear(7, 5)
        self.register_buffer("count", torch.arange(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        x = torch.bmm(self.square(self.turned(q * k + v)), self.experts.mT)
        return self.head(self.back(x))


ADAPTERS = {
    "a": dict(rank=2, alpha=3.0,
              targets=["qkv[q]", "qkv[0:5]", "turned", "square", "experts", "back"]),
    "b": dict(rank=3, alpha=1.0, targets=["qkv[7:20]", "turned", "back"], trainable="head"),
    "c": dict(rank=5, targets=["turned", "*square", "experts", "back"]),
}
WEIGHTS = {"a": 0.7, "b": 1.0, "c": -1.3}


def write_adapters(model: nn.Module, names: str) -> None:
    for name in names:
        injected = randomise(lorafx.inject(model, **ADAPTERS[name], adapter=name), ord(name))
        if "trainable" in ADAPTERS[name]:
            with torch.no_grad():
                trained = dict(lorafx.named_parameters(injected))
                trained[f"head.trained.{name}.weight"].copy_(torch.randn(5, 7))
        lorafx.save(injected, f"{name}.safetensors")


def write_base(state: dict[str, torch.Tensor], kind: str) -> str:
    """Save a checkpoint of one kind, and return its path."""
    if kind == "folder":
        save_sharded(state, Path("base"), 3)
        return "base"
    path = f"base.{kind}"
    if kind == "pth":
        torch.save(state, path)
    else:
        safetensors.torch.save_file({name: t.contiguous() for name, t in state.items()}, path)
    return path


def read(path: str) -> dict[str, torch.Tensor]:
    if Path(path).is_dir():
        return read_folder(path)
    if path.endswith("pth"):
        return torch.load(path, weights_only=True)
    return safetensors.torch.load_file(path)


def exact_sums(base: dict[str, torch.Tensor], weights: dict[str, float]) -> dict[str, Exact]:
    """{float tensor: what it becomes, exactly, and a bound on the error of a float32 sum}."""
    total, size, steps = {}, {}, dict.fromkeys(base, 0)
    for name, tensor in base.items():
        if tensor.is_floating_point():
            total[name] = tensor.double().numpy().copy()
    adapters = {}
    for adapter in weights:
        with safetensors.safe_open(f"{adapter}.safetensors", "np") as file:
            about = json.loads(file.metadata()["adapter"])
            tensors = safetensors.torch.load_file(f"{adapter}.safetensors")
        adapters[adapter] = about, {name: t.double().numpy() for name, t in tensors.items()}
        for name in about["trained"]:
            total[name] = adapters[adapter][1][name].copy()
    for name, values in total.items():
        size[name] = abs(values)
    for adapter, (about, tensors) in adapters.items():
        for site, scale in about["scales"].items():
            A, B = tensors[f"{site}.lora.A"], tensors[f"{site}.lora.B"]
            owner = site.partition("[")[0]
            name = owner if owner in base else f"{owner}.weight"
            _, transposed, start = about["stored"].get(site, (None, False, 0))
            rows = slice(start, start + B.shape[-2])
            for array, delta in ((total, weights[adapter] * scale * (B @ A)),
                                 (size, abs(weights[adapter] * scale) * (abs(B) @ abs(A)))):
                matrix = array[name].swapaxes(-1, -2) if transposed else array[name]
                matrix[..., rows, :] += delta
            steps[name] += A.shape[-2] + 3  # products, their sum, the scale, and the addition to W
    return {name: (total[name], steps[name] * 2.0**-24 * size[name]) for name in total}


def interval(exact: Exact, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest number that a merge may write."""
    value, error = exact
    return rounded(value - error, dtype), rounded(value + error, dtype)


def check(base: str, out: str, weights: dict[str, float], to: str | None) -> None:
    """Hold all tensors of a merged checkpoint against the exact sums."""
    before, after = read(base), read(out)
    sums = exact_sums(before, weights)
    assert after.keys() == before.keys() and sums
    for name, tensor in after.items():
        if name not in sums:
            assert torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype
            continue
        dtype = DTYPES[to] if to else before[name].dtype
        assert tensor.dtype == dtype and tensor.shape == before[name].shape, name
        low, high = interval(sums[name], dtype)
        found = tensor.double().numpy()
        wrong = ~((low <= found) & (found <= high))
        assert not wrong.any(), (name, found[wrong], low[wrong], high[wrong])
        if dtype != torch.float32:
            assert (low == high).mean() > 0.9, name  # to the bit


@pytest.mark.parametrize("kind", ["safetensors", "pth", "folder"])
@pytest.mark.parametrize("dtype, to", [
    ("float32", None), ("bfloat16", None), ("float16", None),
    ("float32", "bfloat16"), ("bfloat16", "float16"), ("float16", "float32")])
def test_every_entry_is_the_exact_sum_rounded_once(tmp_path, monkeypatch, kind, dtype, to):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(5)
    model = Model().to(DTYPES[dtype])
    write_adapters(model, "abc")
    base = write_base(dict(model.state_dict()), kind)
    out = "out" + Path(base).suffix
    arguments = ["merge", base, "-o", out] + (["--dtype", to] if to else [])
    for name, weight in WEIGHTS.items():
        arguments += ["--adapter", f"{name}.safetensors={weight}"]
    assert main(arguments) == 0
    check(base, out, WEIGHTS, to)
    changed = read(out)["head.weight"]
    assert not torch.equal(changed, read(base)["head.weight"].to(changed.dtype))


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_a_matrix_that_is_read_in_several_pieces(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(1031, 4099)).bfloat16()
    lorafx.save(randomise(lorafx.inject(model, 3, targets="0")), "a.safetensors")
    base = write_base(dict(model.state_dict()), kind)
    out = "out" + Path(base).suffix
    assert main(["merge", base, "a.safetensors", "-o", out]) == 0
    check(base, out, {"a": 1.0}, None)


# The oracle can fail.

@pytest.mark.parametrize("dtype", DTYPES.values())
def test_numbers_are_rounded_to_the_nearest(dtype):
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(10007, generator=generator, dtype=torch.float64)
    values *= 10.0 ** torch.randint(-9, 4, (10007,), generator=generator)
    near = rounded(values.numpy(), dtype)
    assert np.array_equal(rounded(near, dtype), near)
    assert np.array_equal(torch.from_numpy(near).to(dtype).double().numpy(), near)
    once = values.float().to(dtype).double().numpy()  # which rounds twice
    assert (once == near).mean() > 0.99
    assert (abs(near - values.numpy()) <= abs(once - values.numpy())).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("fault", ["rounded twice", "an ulp", "no scale", "other rows"])
def test_what_is_not_the_sum_is_found(tmp_path, monkeypatch, dtype, fault):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(5)
    model = Model().to(DTYPES[dtype])
    write_adapters(model, "a")
    base = write_base(dict(model.state_dict()), "safetensors")
    state = read(base)
    good = {}
    for name, (value, _) in exact_sums(state, {"a": 1.0}).items():
        good[name] = torch.from_numpy(rounded(value, DTYPES[dtype])).to(DTYPES[dtype])
    safetensors.torch.save_file({**state, **good}, "out.safetensors")
    check(base, "out.safetensors", {"a": 1.0}, None)
    wrong, kept = good["qkv.weight"].clone(), state["qkv.weight"]
    if fault == "rounded twice":
        delta = rounded((wrong - kept).double().numpy(), torch.bfloat16)
        wrong = kept + torch.from_numpy(delta).to(kept.dtype)
    elif fault == "an ulp":
        ulps = 2.0**8 if dtype == "float32" else 2.0  # float32 sums may be some off
        wrong[1, 2] *= 1 + ulps * 2.0 ** -FORMATS[DTYPES[dtype]][0]
    elif fault == "no scale":
        wrong = kept + (wrong - kept) / 1.5
    else:
        wrong[:11] = kept[:11] + (wrong - kept)[1:12]
    safetensors.torch.save_file({**state, **good, "qkv.weight": wrong}, "out.safetensors")
    with pytest.raises(AssertionError, match="qkv.weight"):
        check(base, "out.safetensors", {"a": 1.0}, None)
