"""All that can be wrong with PEFT's folders, or has no place in them: errors that name it."""

import json
import math

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

import lorafx
from tests.support.peft_adapters import Net, saved_by_peft


def config_with(**values):
    def change(tensors, config):
        config.update(values)
    return change


def key_with(name, shape=(1,)):
    def change(tensors, config):
        tensors[f"base_model.model.{name}"] = torch.zeros(shape)
    return change


WRONG = {
    "dora": (
        key_with("head.lora_magnitude_vector"),
        "adapts 1 of its 1 weights by DoRA, such as 'base_model.model.head', which lorafx does not"
    ),
    "embedding": (
        key_with("emb.lora_embedding_A"),
        "adapts 1 of its 2 weights as embeddings, such as 'base_model.model.emb', which lorafx"
    ),
    "lora bias": (
        key_with("head.lora_B.bias"), r"1 of its 1 weights by LoRA with a bias \(lora_bias\), such"
    ),
    "option": (config_with(use_dora=True), "asks for use_dora=True, which lorafx does not support"),
    "unknown": (
        config_with(brand_new="x"), "asks for brand_new='x', which lorafx does not support"
    ),
    "init": (
        config_with(init_lora_weights="pissa"),
        "init_lora_weights='pissa', which changes the base's weights"
    ),
    "kind": (config_with(peft_type="IA3"), "is for PEFT's 'IA3', as all of the . tensors"),
    "rank": (config_with(r=5), "has rank 2 at 'head', but its config says 5"),
    "half": (
        lambda t, c: t.pop("base_model.model.head.lora_A.weight"),
        "has the lora_B.weight of 'head' but not its"
    ),
    "extra": (
        key_with("linear9.weight"),
        "has a trained 'linear9.weight' .*, but this model has"
    ),
    "a bias": (
        key_with("linear0.bias", (7,)),
        r"has a trained 'linear0.bias' \(7,\), but this model has"
    ),
    "plain bias": (
        lambda t, c: (config_with(bias="all")(t, c), key_with("head.bias", (4,))(t, c)),
        "which PEFT does not read: an adapted layer's is "
        "'base_model.model.head.base_layer.bias'"
    ),
    "prefix": (
        lambda t, c: t.update({"head.x": torch.zeros(1)}),
        "'head.x', which does not begin with 'base_model"
    ),
    "nothing": (lambda t, c: t.clear(), "holds no adapter"),
    "pattern": (config_with(rank_pattern={"(": 1}), "rank and alpha at 'head' cannot be read"),
    "alpha": (config_with(lora_alpha="x"), "rank and alpha at 'head' cannot be read"),
    "not finite": (
        lambda t, c: t["base_model.model.head.lora_A.weight"].fill_(math.inf),
        "NaN or infinite values"
    ),
    "no such target": (
        config_with(target_modules=["linear0"]), "which target_modules does not name, so that PEFT"
    ),
    "missing": (
        config_with(target_modules=["head", "linear0"]),
        "has no adapter of '.*', which target_modules names"
    ),
    "not saved": (
        config_with(modules_to_save=["linear0"]),
        "has no tensor of 'linear0', which modules_to_save names"
    ),
    "rslora": (config_with(use_rslora="no"), "has use_rslora='no', which PEFT does not mean"),
    "convolution": (
        lambda t, c: t.update(
            {f"base_model.model.head.lora_{h}.weight": torch.zeros(2, 2, 1, 1) for h in "AB"}
        ),
        "adapts 1 of its 1 weights as convolutions, such as 'base_model.model.head', which"
    ),
    "parameters": (
        config_with(target_parameters="x"), "has target_parameters='x', which PEFT does not mean"
    ),
    "excluded": (
        config_with(exclude_modules="he.*"), "which target_modules does not name, so that PEFT"
    ),
    "layers": (
        config_with(layers_to_transform="1"), "has layers_to_transform='1', not numbers of layers"
    ),
    "expression": (
        config_with(target_modules="("),
        "matches modules by '\\(', which is not a regular expression"
    ),
    "expressions": (config_with(layers_pattern=["h", "("]), "which is not a regular expression"),
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


@pytest.mark.parametrize(
    "options",
    [
        dict(layers_to_transform=1), dict(layers_to_transform=[0, 1], layers_pattern="layers"),
        dict(layers_to_transform=[1], layers_pattern=["x", "layers"]),
        dict(exclude_modules=["1.q"]), dict(exclude_modules=r".*\.0\..*"),
        dict(target_modules=["q", "model.layers.0.v"], layers_to_transform=[1])
    ]
)
def test_layers_and_exclusions_of_peft(tmp_path, options):
    """They mean what PEFT adapts: where such a module has no pair in the file, loading says so."""
    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            layers = [nn.ModuleDict({"q": nn.Linear(4, 4), "v": nn.Linear(4, 4)}) for _ in range(3)]
            self.model = nn.ModuleDict({"layers": nn.ModuleList(layers)})

        def forward(self, x):
            for layer in self.model["layers"]:
                x = layer["q"](x).tanh() + layer["v"](x)
            return x

    net, x = Layers(), torch.randn(2, 4)
    wrapped = saved_by_peft(net, tmp_path, **dict(r=2, target_modules=["q", "v"]) | options)
    assert torch.allclose(lorafx.load(net, tmp_path)(x), wrapped(x), atol=1e-5)
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    stem = next(name for name in tensors).partition(".lora_")[0]
    for half in "AB":
        del tensors[f"{stem}.lora_{half}.weight"]
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(
        lorafx.FormatError, match="has no adapter of '.*', which target_modules names"
    ):
        lorafx.load(net, tmp_path)


def test_folders_without_an_adapter(tmp_path):
    net = Net(["linear"])
    with pytest.raises(lorafx.FormatError, match="has no adapter_config.json"):
        lorafx.load(net, tmp_path)
    with pytest.raises(lorafx.FormatError, match="There is no file"):
        lorafx.load(net, tmp_path / "none")
    for name in ("a", "b", ".b.0123.tmp"):  # what a save that was killed left behind
        saved_by_peft(net, tmp_path / name, target_modules=["head"])
    with pytest.raises(lorafx.FormatError, match="has 'a', 'b': name one with adapter="):
        lorafx.load(net, tmp_path)
    (tmp_path / "a" / "adapter_config.json").write_text("[")
    with pytest.raises(lorafx.FormatError, match="is missing or damaged"):
        lorafx.load(net, tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    with pytest.raises(
        lorafx.FormatError, match="has neither adapter_model.safetensors nor adapter_model.bin"
    ):
        lorafx.load(net, tmp_path / "a")


def test_what_the_format_has_no_place_for(tmp_path):
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return F.linear(x, self.w)

    for model, message in (
        (nn.Linear(4, 4), "this model is one layer: save"),
        (Root(), "a parameter of the model it"),
    ):
        with pytest.raises(lorafx.FormatError, match=message):
            lorafx.save(lorafx.inject(model), tmp_path / "a")
    with pytest.raises(lorafx.FormatError, match="'body.mixing0.up' together with dropout"):
        lorafx.save(
            lorafx.inject(Net(["mixing"]), targets="body.mixing0.up", dropout=0.1), tmp_path / "a"
        )
    assert not list(tmp_path.iterdir())

    class Sizes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)

        def forward(self, x):
            return self.attention(torch.cat([x, x], -1)[..., :8], x, x, need_weights=False)[0]

    with pytest.raises(
        lorafx.FormatError, match="no place for an adapter of 'attention.[qkv]_proj_weight'"
    ):
        lorafx.save(lorafx.inject(Sizes(), targets="linear"), tmp_path / "a")
    with pytest.raises(lorafx.FormatError, match="is a folder, and that is a file"):
        lorafx.save(
            lorafx.inject(Net(["linear"]), targets="head"), tmp_path / "adapter_model.safetensors"
        )
    (tmp_path / "a").touch()
    with pytest.raises(lorafx.FormatError, match="is a folder, and that is a file"):
        lorafx.save(lorafx.inject(Net(["linear"]), targets="head"), tmp_path / "a")
