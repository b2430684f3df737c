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
from hypothesis import HealthCheck, assume, given, settings
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
    "conv": lambda: Conv1D(WIDTH, WIDTH),
    "wide": lambda: nn.Sequential(Conv1D(WIDTH + 3, WIDTH), nn.GELU(), nn.Linear(WIDTH + 3, WIDTH)),
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
    return Net(draw(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=5))).double()


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


ROUNDS = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))


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
    # PEFT sorts the patterns when it saves them, and forgets which came first.
    assume(not any(name.endswith(f".{key}") for name in chosen for key in patterns))
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
    x = torch.randn(3, 2, WIDTH, dtype=torch.float64)
    wanted = theirs(x)
    ours = lorafx.load(net, folder)
    torch.testing.assert_close(ours(x), wanted, rtol=1e-9, atol=1e-9)
    assert lorafx.adapters(ours) == ["default"]
    torch.testing.assert_close(lorafx.merge(ours)(x), wanted, rtol=1e-9, atol=1e-9)


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
    if any(isinstance(net.get_submodule(name), Conv1D) for name in chosen if name in dict(net.named_modules())) and any(
            name.rpartition(".")[2] in ("up", "down", "first", "second") for name in chosen):
        with pytest.raises(lorafx.FormatError, match="PEFT cannot adapt the parameter .* together with the Conv1D"):
            lorafx.save(ours, folder)
        return
    lorafx.save(ours, folder)
    x = torch.randn(3, 2, WIDTH, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(net), folder)
    torch.testing.assert_close(theirs(x), ours(x), rtol=1e-9, atol=1e-9)
    again = lorafx.load(net, folder)
    torch.testing.assert_close(again(x), ours(x), rtol=1e-12, atol=1e-12)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


class Attending(nn.Module):
    """Attention, and a weight of which some rows are adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.attention(q, k, v, need_weights=False)[0]


def saved_by_peft(net: nn.Module, folder: Path, **config) -> nn.Module:
    """A PEFT model, with other values, that was saved to a folder."""
    model = peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(**config))
    stir(model, ("lora_",))
    model.save_pretrained(folder)
    return model


def test_attention_that_peft_saved(tmp_path):
    """PEFT adds the delta of out_proj twice (its pull request 3774): taken from its first half alone, all agrees."""
    net, x = Attending().double(), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    theirs = saved_by_peft(net, tmp_path, r=2, lora_alpha=6, target_modules=["attention", "qkv"])
    ours = lorafx.load(net, tmp_path)
    assert [site for site in lorafx.named_parameters(ours)] and {
        name.partition(".lora")[0] for name, _ in lorafx.named_parameters(ours)} >= {"attention", "attention.out_proj"}
    layer = theirs.base_model.model.attention
    scale = layer.scaling["default"]
    merged = copy.deepcopy(net)
    with torch.no_grad():
        for weight, held in ((merged.attention.in_proj_weight, layer), (merged.qkv.weight, theirs.base_model.model.qkv),
                             (merged.attention.out_proj.weight, layer.base_layer.out_proj)):
            weight += scale * held.lora_B["default"].weight @ held.lora_A["default"].weight
    torch.testing.assert_close(ours(x), merged(x))
    with torch.no_grad():
        layer.base_layer.out_proj.lora_B["default"].weight.zero_()
    theirs.save_pretrained(tmp_path)
    torch.testing.assert_close(lorafx.load(net, tmp_path)(x), theirs(x))


@pytest.mark.parametrize("targets", [["attention.in_proj_weight[q]"], ["attention.out_proj"], "linear", ["qkv[q]"],
                                     ["qkv[v]", "attention.in_proj_weight[k]"]], ids=str)
def test_rows_of_weights_that_lorafx_saved(tmp_path, targets):
    net, x = Attending().double(), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    ours = randomise(lorafx.inject(net, 2, alpha=3, targets=targets))
    lorafx.save(ours, tmp_path / "a")
    for again in (lorafx.load(net, tmp_path / "a"), lorafx.merge(lorafx.load(net, tmp_path / "a"))):
        torch.testing.assert_close(again(x), ours(x))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path / "a")
    if targets not in ("linear", ["attention.out_proj"]):  # there PEFT adds the delta of out_proj twice
        torch.testing.assert_close(theirs(x), ours(x))


def test_the_ranks_of_one_pair_read_as_three_blocks_do_not_add_up(tmp_path):
    net = Attending()
    saved_by_peft(net, tmp_path / "a", r=2, target_modules=["attention"])
    lorafx.save(lorafx.load(net, tmp_path / "a"), tmp_path / "b")
    first, second = (safetensors.torch.load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert {key: value.shape for key, value in first.items()} == {key: value.shape for key, value in second.items()}


def test_several_adapters_of_a_folder(tmp_path):
    net, x = Net(["linear"]), torch.randn(2, WIDTH)
    model = peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(target_modules=["head"]))
    model.add_adapter("french", peft.LoraConfig(target_modules=["linear0"], r=3))
    stir(model, ("lora_",))
    model.save_pretrained(tmp_path)
    ours = lorafx.load(lorafx.load(net, tmp_path), tmp_path, adapter="french")
    assert lorafx.adapters(ours) == ["default", "french"]
    for name in ("default", "french"):
        lorafx.activate(ours, name)
        model.set_adapter(name)
        torch.testing.assert_close(ours(x), model(x))
        lorafx.save(ours, tmp_path / "new")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path / "new")
    theirs.load_adapter(tmp_path / "new" / "french", "french")
    theirs.set_adapter("french")
    torch.testing.assert_close(theirs(x), ours(x))
    (tmp_path / "new" / "adapter_config.json").unlink()
    assert lorafx.adapters(lorafx.load(net, tmp_path / "new")) == ["french"]
    assert lorafx.adapters(lorafx.load(net, tmp_path / "adapter_model.safetensors")) == ["default"]


def test_an_older_file(tmp_path):
    net, x = Net(["linear"]), torch.randn(2, WIDTH)
    theirs = saved_by_peft(net, tmp_path, target_modules=["head"])
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    torch.testing.assert_close(lorafx.load(net, tmp_path)(x), theirs(x))


@pytest.mark.parametrize("inside, prefix", [("", "model."), ("", "module."), ("model.", ""), ("module.", "_orig_mod.")])
def test_a_model_around_the_model(tmp_path, inside, prefix):
    """Names of another wrapper are matched, those of modules trained whole too; not where some do not fit."""
    net, x = Net(["linear"]), torch.randn(2, WIDTH)
    theirs = saved_by_peft(net, tmp_path, target_modules=["linear0"], modules_to_save=["head"])
    path = tmp_path / "adapter_model.safetensors"
    tensors = {key.replace("base_model.model.", f"base_model.model.{prefix}"): value
               for key, value in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(tensors, path)
    around = nn.ModuleDict({inside[:-1]: net}) if inside else net
    loaded = lorafx.load(around, tmp_path)
    torch.testing.assert_close((loaded[inside[:-1]] if inside else loaded)(x), theirs(x))
    name = next(key for key in tensors if "lora_A" in key)
    for half in "AB":
        key = name.replace("lora_A", f"lora_{half}")
        tensors[key.replace("linear0", "linear9")] = tensors.pop(key)
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(lorafx.MismatchError, match="linear9', but in this model there is no such site; near it"):
        lorafx.load(around, tmp_path)


def config_with(**values):
    def change(tensors, config):
        config.update(values)
    return change


def key_with(name, shape=(1,)):
    def change(tensors, config):
        tensors[f"base_model.model.{name}"] = torch.zeros(shape)
    return change


WRONG = {
    "dora": (key_with("head.lora_magnitude_vector"), "is part of DoRA, which lorafx does not support"),
    "embedding": (key_with("emb.lora_embedding_A"), "is part of an adapter of an embedding, which lorafx does not"),
    "lora bias": (key_with("head.lora_B.bias"), "is part of lora_bias=True, which lorafx does not support"),
    "option": (config_with(use_dora=True), "asks for use_dora=True, which lorafx does not support"),
    "unknown": (config_with(brand_new="x"), "asks for brand_new='x', which lorafx does not support"),
    "init": (config_with(init_lora_weights="pissa"), "init_lora_weights='pissa', which changes the base's weights"),
    "kind": (config_with(peft_type="IA3"), "is for PEFT's 'IA3'; lorafx reads 'LORA'"),
    "rank": (config_with(r=5), "has rank 2 at 'head', but its config says 5"),
    "half": (lambda t, c: t.pop("base_model.model.head.lora_A.weight"), "has the lora_B.weight of 'head' but not its"),
    "extra": (key_with("linear0.weight"), "'base_model.model.linear0.weight', which its config does not account for"),
    "a bias": (key_with("linear0.bias"), "'base_model.model.linear0.bias', which its config does not account for"),
    "plain bias": (lambda t, c: (config_with(bias="all")(t, c), key_with("head.bias", (4,))(t, c)),
                   "which PEFT does not read: an adapted layer's bias is 'base_model.model.head.base_layer.bias'"),
    "prefix": (lambda t, c: t.update({"head.x": torch.zeros(1)}), "'head.x', which does not begin with 'base_model"),
    "nothing": (lambda t, c: t.clear(), "holds no adapter"),
    "pattern": (config_with(rank_pattern={"(": 1}), "rank and alpha at 'head' cannot be read"),
    "alpha": (config_with(lora_alpha="x"), "rank and alpha at 'head' cannot be read"),
    "not finite": (lambda t, c: t["base_model.model.head.lora_A.weight"].fill_(math.inf), "NaN or infinite values"),
    "parameters": (config_with(target_parameters="x"), "target_parameters='x', which is no list"),
    "two parameters": (key_with("head.base_layer.lora_A.weight", (2, 6)), "but not its other half"),
}


@pytest.mark.parametrize("change, message", WRONG.values(), ids=WRONG)
def test_what_is_wrong_with_a_folder(tmp_path, change, message):
    net = Net(["linear"])
    saved_by_peft(net, tmp_path, r=2, target_modules=["head"])
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    change(tensors, config)
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(lorafx.FormatError, match=message):
        lorafx.load(net, tmp_path)


def test_folders_without_an_adapter(tmp_path):
    net = Net(["linear"])
    with pytest.raises(lorafx.FormatError, match="has no adapter_config.json"):
        lorafx.load(net, tmp_path)
    with pytest.raises(lorafx.FormatError, match="There is no file"):
        lorafx.load(net, tmp_path / "none")
    for name in ("a", "b"):
        saved_by_peft(net, tmp_path / name, target_modules=["head"])
    with pytest.raises(lorafx.FormatError, match="has 'a', 'b': name one with adapter="):
        lorafx.load(net, tmp_path)
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    with pytest.raises(lorafx.FormatError, match="has neither adapter_model.safetensors nor adapter_model.bin"):
        lorafx.load(net, tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text("[")
    with pytest.raises(lorafx.FormatError, match="is missing or damaged"):
        lorafx.load(net, tmp_path / "a")


def test_what_the_format_has_no_place_for(tmp_path):
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return F.linear(x, self.w)

    for model, message in ((nn.Linear(4, 4), "this model is one layer: save"), (Root(), "a parameter of the model it")):
        with pytest.raises(lorafx.FormatError, match=message):
            lorafx.save(lorafx.inject(model), tmp_path / "a")
    with pytest.raises(lorafx.FormatError, match="'body.mixing0.up' together with dropout"):
        lorafx.save(lorafx.inject(Net(["mixing"]), targets="body.mixing0.up", dropout=0.1), tmp_path / "a")
    assert not list(tmp_path.iterdir())
    (tmp_path / "a").touch()
    with pytest.raises(lorafx.FormatError, match="is a folder, and that is a file"):
        lorafx.save(lorafx.inject(Net(["linear"]), targets="head"), tmp_path / "a")


def test_a_save_that_is_cut_short_is_seen(tmp_path, monkeypatch):
    net = Net(["linear"])
    lorafx.save(lorafx.inject(net, 2, targets="head"), tmp_path / "a")
    monkeypatch.setattr("os.replace", lambda source, target: (
        Path(source).rename(target) if target.name.endswith(".json") else exec("raise KeyboardInterrupt")))
    with pytest.raises(KeyboardInterrupt):
        lorafx.save(lorafx.inject(net, 3, targets="head"), tmp_path / "a")
    with pytest.raises(lorafx.FormatError, match="has rank 2 at 'head', but its config says 3"):
        lorafx.load(net, tmp_path / "a")
