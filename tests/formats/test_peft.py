"""PEFT's directories, both ways, with PEFT itself: outputs agree, all is accounted for."""

import copy
import json
import warnings

import peft
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, assume, given, settings, strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import lorafx
from tests.support.oracle import randomise
from tests.support.peft_adapters import KINDS, WIDTH, Experts, Mixing, Net, saved_by_peft, stir

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:peft", "ignore::FutureWarning:transformers",
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)


@st.composite
def nets(draw) -> Net:
    torch.manual_seed(draw(st.integers(0, 99)))
    return Net(draw(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=5))).double()


def layers(net: Net) -> tuple[list[str], list[str]]:
    """The modules that PEFT adapts, and the parameters."""
    modules = [
        name for name, module in net.named_modules() if isinstance(module, (nn.Linear, Conv1D))
    ]
    parameters = [
        f"{name}.{key}"
        for name, module in net.named_modules()
        if isinstance(module, (Mixing, Experts))
        for key in module._parameters
    ]
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
    patterns = data.draw(
        st.dictionaries(st.sampled_from(chosen + own), st.integers(1, 5), max_size=3)
    )
    # PEFT sorts the patterns when it saves them, and forgets which came first.
    assume(not any(name.endswith(f".{key}") for name in chosen for key in patterns))
    config = peft.LoraConfig(
        r=data.draw(st.integers(1, 4)), lora_alpha=data.draw(st.integers(1, 9)),
        target_modules=chosen, target_parameters=own or None, use_rslora=data.draw(st.booleans()),
        rank_pattern=patterns,
        alpha_pattern={name: 2 * value for name, value in patterns.items() if value % 2},
        modules_to_save=saved, bias=data.draw(st.sampled_from(["none", "lora_only", "all"]))
    )
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
    ours = randomise(
        lorafx.inject(
            net, data.draw(st.integers(1, 4)), alpha=data.draw(st.sampled_from([None, 3.0])),
            targets=[f"{name}" for name in chosen if not trainable or name != "head"],
            trainable=trainable,
            rank_pattern={
                f"^{name}": rank for name, rank in ranks.items() if not trainable or name != "head"
            }
        )
    )
    if any(
        isinstance(net.get_submodule(name), Conv1D)
        for name in chosen
        if name in dict(net.named_modules())
    ) and any(name.rpartition(".")[2] in ("up", "down", "first", "second") for name in chosen):
        with pytest.raises(
            lorafx.FormatError, match="PEFT cannot adapt the parameter .* together with the Conv1D"
        ):
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
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


class Tied(nn.Module):
    """An embedding and its head on one weight, and a layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.a, self.head = (
            nn.Embedding(9, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 9)
        )
        self.b, self.head.weight = self.a, self.embedding.weight

    def forward(self, x):
        return self.head(self.b(self.a(self.embedding(x))))


@pytest.mark.parametrize("targets, saved", [(["a"], None), (["head"], ["embedding"])], ids=str)
def test_what_goes_by_another_name_too(tmp_path, targets, saved):
    """PEFT changes it under one name alone, lorafx would under all: refused."""
    net, x = Tied(), torch.tensor([[1, 2, 3]])
    theirs = saved_by_peft(net, tmp_path, target_modules=targets, modules_to_save=saved)
    if saved:  # which it saves, and which nobody has changed yet
        torch.testing.assert_close(lorafx.load(net, tmp_path)(x), theirs(x))
        path = tmp_path / "adapter_model.safetensors"
        tensors = safetensors.torch.load_file(path)
        tensors["base_model.model.embedding.weight"] += 1
        safetensors.torch.save_file(tensors, path)
    with pytest.raises(lorafx.MismatchError, match="with untie=True|cannot be"):
        lorafx.load(net, tmp_path)


@pytest.mark.parametrize("trained", ["a", "b"])
def test_a_layer_under_two_names_is_not_written(tmp_path, trained):
    """PEFT would put its own in the place of one of them: of an adapter, and of one trained whole.
    """
    for config in (dict(targets=trained), dict(targets="head", trainable=trained)):
        with pytest.raises(
            lorafx.FormatError, match="PEFT would change '.*' and not '.*', which is tied to it"
        ):
            lorafx.save(lorafx.inject(Tied(), **config), tmp_path / "b")


def test_a_head_whose_weight_is_an_embeddings(tmp_path):
    """Its adapter is the head's alone, in both; PEFT may save the head's own weight beside it."""
    net, x = Tied(), torch.tensor([[1, 2, 3]])
    theirs = saved_by_peft(net, tmp_path, target_modules=["head"])
    path = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["base_model.model.head.base_layer.weight"] = net.head.weight.detach().clone()
    safetensors.torch.save_file(tensors, path)
    torch.testing.assert_close(lorafx.load(net, tmp_path)(x), theirs(x))
    with torch.no_grad():
        net.embedding.weight[0, 0] += 1
    with pytest.raises(
        lorafx.FormatError, match="'head.weight', the weight of an adapted layer, in which this"
    ):
        lorafx.load(net, tmp_path)


def test_a_module_with_buffers_and_one_with_modules_inside(tmp_path):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.fc = nn.Parameter(torch.randn(WIDTH)), nn.Linear(WIDTH, WIDTH)
            self.bn = nn.BatchNorm1d(WIDTH)

        def forward(self, x):
            return self.bn(self.fc(x * self.weight))

    net, x = nn.Sequential(nn.Linear(WIDTH, WIDTH), Block()).eval(), torch.randn(3, WIDTH)
    ours = randomise(lorafx.inject(net, 2, targets="0", trainable="1"))
    lorafx.save(ours, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["1"]
    torch.testing.assert_close(lorafx.load(net, tmp_path)(x), ours(x))
    torch.testing.assert_close(
        peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path).eval()(x), ours(x)
    )


@pytest.mark.parametrize("rank", [1, 8])
def test_experts_run_as_they_were_saved(tmp_path, rank):
    """With grouped products, which ask for a layout, as those of transformers do."""
    import transformers
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=50, num_local_experts=4
    )
    net, ids = transformers.MixtralForCausalLM(config).eval(), torch.tensor([[3, 4, 5]])
    theirs = saved_by_peft(net, tmp_path, r=rank, target_modules=["q_proj"],
                           target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    torch.testing.assert_close(
        lorafx.load(net, tmp_path)(input_ids=ids).logits, theirs(input_ids=ids).logits
    )


def test_rows_of_a_weight_that_is_stored_the_other_way(tmp_path):
    net, x = nn.Sequential(Conv1D(9, WIDTH), nn.Linear(9, 4)), torch.randn(3, WIDTH)
    ours = randomise(lorafx.inject(net, 2, targets=["0[0:3]", "0[2:9]"]))
    with torch.no_grad():  # the same A, and rows in common
        first, second = (
            value for name, value in lorafx.named_parameters(ours) if name.endswith(".A")
        )
        second.copy_(first)
    lorafx.save(ours, tmp_path)
    torch.testing.assert_close(lorafx.load(net, tmp_path)(x), ours(x))
    torch.testing.assert_close(
        peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path)(x), ours(x)
    )


class Attending(nn.Module):
    """Attention, and a weight of which some rows are adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.attention(q, k, v, need_weights=False)[0]


def test_attention_that_peft_saved(tmp_path):
    """PEFT adds out_proj's delta twice (its pull request 3774): by its first half, all agrees."""
    net, x = Attending().double(), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    theirs = saved_by_peft(net, tmp_path, r=2, lora_alpha=6, target_modules=["attention", "qkv"])
    ours = lorafx.load(net, tmp_path)
    assert [site for site in lorafx.named_parameters(ours)] and {
        name.partition(".lora")[0] for name, _ in lorafx.named_parameters(ours)
    } >= {"attention", "attention.out_proj"}
    layer = theirs.base_model.model.attention
    scale = layer.scaling["default"]
    merged = copy.deepcopy(net)
    with torch.no_grad():
        for weight, held in (
            (merged.attention.in_proj_weight, layer),
            (merged.qkv.weight, theirs.base_model.model.qkv),
            (merged.attention.out_proj.weight, layer.base_layer.out_proj),
        ):
            weight += scale * held.lora_B["default"].weight @ held.lora_A["default"].weight
    torch.testing.assert_close(ours(x), merged(x))
    with torch.no_grad():
        layer.base_layer.out_proj.lora_B["default"].weight.zero_()
    theirs.save_pretrained(tmp_path)
    torch.testing.assert_close(lorafx.load(net, tmp_path)(x), theirs(x))


@pytest.mark.parametrize(
    "targets",
    [
        ["attention.in_proj_weight[q]"], ["attention.out_proj"], "linear", ["qkv[q]"],
        ["qkv[v]", "attention.in_proj_weight[k]"]
    ],
    ids=str
)
def test_rows_of_weights_that_lorafx_saved(tmp_path, targets):
    net, x = Attending().double(), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    ours = randomise(lorafx.inject(net, 2, alpha=3, targets=targets))
    lorafx.save(ours, tmp_path / "a")
    for again in (lorafx.load(net, tmp_path / "a"), lorafx.merge(lorafx.load(net, tmp_path / "a"))):
        torch.testing.assert_close(again(x), ours(x))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path / "a")
    if targets not in (
        "linear",
        ["attention.out_proj"],
    ):  # there PEFT adds the delta of out_proj twice
        torch.testing.assert_close(theirs(x), ours(x))


def test_the_ranks_of_one_pair_read_as_three_blocks_do_not_add_up(tmp_path):
    net = Attending()
    saved_by_peft(net, tmp_path / "a", r=2, target_modules=["attention"])
    lorafx.save(lorafx.load(net, tmp_path / "a"), tmp_path / "b")
    first, second = (
        safetensors.torch.load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab"
    )
    assert {key: value.shape for key, value in first.items()} == {
        key: value.shape for key, value in second.items()
    }


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
    with pytest.raises(lorafx.FormatError, match="has 'default', 'french': name one with adapter="):
        lorafx.load(net, tmp_path / "new", adapter="frnech")
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
    safetensors.torch.save_file({key: 2 * value for key, value in tensors.items()},
                                tmp_path / "adapter_model.safetensors")
    torch.testing.assert_close(lorafx.load(net, tmp_path / "adapter_model.bin")(x), theirs(x))


@pytest.mark.parametrize(
    "inside, prefix", [("", "model."), ("", "module."), ("model.", ""), ("module.", "_orig_mod.")]
)
def test_a_model_around_the_model(tmp_path, inside, prefix):
    """Names of another wrapper match, those of whole modules too; not where some do not fit."""
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
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    named = [
        key.removeprefix("base_model.model.").partition(".lora")[0]
        for key in tensors if ".lora_A" in key
    ]
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(config | {"target_modules": "|".join(named)})
    )
    with pytest.raises(
        lorafx.MismatchError, match="linear9', but in this model there is no such site; near it"
    ):
        lorafx.load(around, tmp_path)
