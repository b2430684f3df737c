"""PEFT's directories, both ways, with PEFT itself: outputs agree, and all that a folder holds is accounted for."""

import copy
import json
import math
import warnings
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from oracle import randomise
from torch import nn
from transformers.pytorch_utils import Conv1D

import lorafx

WIDTH = 6


class Mixing(nn.Module):
    """Two parameters of its own: y = tanh(x U^T) V."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(WIDTH + 2, WIDTH) / 3)
        self.down = nn.Parameter(torch.randn(WIDTH + 2, WIDTH) / 3)

    def forward(self, x):
        return torch.tanh(F.linear(x, self.up)) @ self.down


class Experts(nn.Module):
    """Stacks of weights, stored (experts, out, in) or, transposed, (experts, in, out)."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.first = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / 3)
        self.second = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / 3)

    def forward(self, x):
        flat = x.flatten(0, -2).expand(3, -1, -1)
        for weight in (self.first, self.second):
            flat = torch.tanh(torch.bmm(flat, weight if self.is_transposed else weight.mT))
        return flat.sum(0).view(x.shape)


KINDS = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH), "bare": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "conv": lambda: Conv1D(WIDTH, WIDTH), "wide": lambda: nn.Sequential(Conv1D(WIDTH + 3, WIDTH), nn.GELU(),
                                                                       nn.Linear(WIDTH + 3, WIDTH)),
    "mixing": Mixing, "experts": lambda: Experts(False), "turned": lambda: Experts(True),
    "norm": lambda: nn.LayerNorm(WIDTH),
}


class Net(nn.Module):
    """Layers one after the other, each by its name."""

    def __init__(self, kinds: list[str]) -> None:
        super().__init__()
        self.body = nn.ModuleDict({f"{kind}{place}": KINDS[kind]() for place, kind in enumerate(kinds)})
        self.linear0 = nn.Linear(WIDTH, WIDTH)  # its name also ends that of a layer
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x):
        for layer in self.body.values():
            x = x + layer(x)
        return self.head(self.linear0(x))


@st.composite
def nets(draw) -> Net:
    torch.manual_seed(draw(st.integers(0, 99)))
    return Net(draw(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=5)))


def stir(model: nn.Module, words: tuple[str, ...]) -> None:
    """Other values for every parameter of a PEFT model whose name has one of these words."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(word in name for word in words):
                parameter.copy_(torch.randn_like(parameter) / 2)


def layers(net: Net) -> tuple[list[str], list[str]]:
    """The modules that PEFT adapts, and the parameters."""
    modules = [name for name, module in net.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    parameters = [f"{name}.{key}" for name, module in net.named_modules() if isinstance(module, (Mixing, Experts))
                  for key in module._parameters]
    return modules, parameters


ROUNDS = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate], report_multiple_bugs=False)


@ROUNDS
@given(data=st.data())
def test_what_peft_saved(tmp_path_factory, data):
    net, folder = data.draw(nets()), tmp_path_factory.mktemp("peft")
    modules, parameters = layers(net)
    chosen = data.draw(st.lists(st.sampled_from(modules), unique=True))
    own = data.draw(st.lists(st.sampled_from(parameters), unique=True)) if parameters else []
    assume(chosen or own)
    saved = data.draw(st.sampled_from([None, ["head"], ["norm0"] if "norm0" in net.body else None]))
    chosen = [name for name in chosen if name != "head" or saved != ["head"]]
    if own:  # PEFT adapts no parameters beside a Conv1D
        chosen = [name for name in chosen if isinstance(net.get_submodule(name), nn.Linear)]
    assume(chosen or own)
    patterns = data.draw(st.dictionaries(st.sampled_from(chosen + own), st.integers(1, 5), max_size=3))
    config = peft.LoraConfig(
        r=data.draw(st.integers(1, 4)), lora_alpha=data.draw(st.integers(1, 9)), target_modules=chosen,
        target_parameters=own or None, use_rslora=data.draw(st.booleans()), rank_pattern=patterns,
        alpha_pattern={name: 2 * value for name, value in patterns.items() if value % 2}, modules_to_save=saved,
        bias=data.draw(st.sampled_from(["none", "lora_only", "all"])))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(net), config)
    stir(theirs, ("lora_", "modules_to_save", *(("bias",) if config.bias == "all" else ())))
    theirs.save_pretrained(folder)
    x = torch.randn(3, 2, WIDTH)
    wanted = theirs(x)
    ours = lorafx.load(net, folder)
    torch.testing.assert_close(ours(x), wanted, rtol=1e-5, atol=1e-5)
    assert lorafx.adapters(ours) == ["default"]
    torch.testing.assert_close(lorafx.merge(ours)(x), wanted, rtol=1e-5, atol=1e-5)


@ROUNDS
@given(data=st.data())
def test_what_lorafx_saved(tmp_path_factory, data):
    net, folder = data.draw(nets()), tmp_path_factory.mktemp("ours") / "new"
    names = [site.name for site in lorafx.sites(net, "linear")]
    chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    trainable = data.draw(st.sampled_from([(), "head"])) if set(chosen) - {"head"} else ()
    ranks = data.draw(st.dictionaries(st.sampled_from(chosen), st.integers(1, 5), max_size=2))
    ours = randomise(lorafx.inject(
        net, data.draw(st.integers(1, 4)), alpha=data.draw(st.sampled_from([None, 3.0])),
        targets=[f"{name}" for name in chosen if not trainable or name != "head"], trainable=trainable,
        rank_pattern={f"^{name}": rank for name, rank in ranks.items() if not trainable or name != "head"}))
    lorafx.save(ours, folder)
    x = torch.randn(3, 2, WIDTH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(net), folder)
    torch.testing.assert_close(theirs(x), ours(x), rtol=1e-5, atol=1e-5)
    again = lorafx.load(net, folder)
    torch.testing.assert_close(again(x), ours(x), rtol=1e-6, atol=1e-6)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
