"""Bad input: the error's class and words, and that nothing has changed."""

import re
import threading
import types
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lorafx
from lorafx import AdapterError, ConfigError, NoSiteError, NotInjectedError, UnsupportedModelError
from tests.support.adapter_files import Model
from tests.support.oracle import fingerprint


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.conv = nn.Conv1d(4, 4, 1)
        self.v_proj = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.v_proj(self.q_proj(x))


SETTINGS = {
    "typo": (
        {"targets": "q_prj"}, NoSiteError,
        r"No linear call matches targets='q_prj'\. This model has 2 sites, such as 'q_proj'"
        r".*lorafx\.sites"
    ),
    "one of several": (
        {"targets": ["q_proj", "k_proj"]}, NoSiteError, "targets='k_proj'.*such as .*'q_proj'"
    ),
    "regex": ({"targets": re.compile("q")}, NoSiteError, "No linear call matches targets='q'"),
    "no linear call": (
        {"targets": "conv"}, NoSiteError,
        r"'conv' cannot be adapted: a convolution \(Conv1d\), which lorafx does not adapt yet"
    ),
    "predicate": (
        {"targets": lambda site: False}, NoSiteError, "No linear call matches targets=<function"
    ),
    "kind of target": (
        {"targets": 3}, ConfigError, "targets takes names, globs, .* or a function of a Site, not 3"
    ),
    "nothing": ({"targets": []}, NoSiteError, r"No linear call is left to adapt: targets=\[\]"),
    "all excluded": (
        {"exclude": "q_proj"}, NoSiteError, "No linear call is left to adapt: .*exclude='q_proj'"
    ),
    "exclude typo": (
        {"exclude": "q_prj"}, NoSiteError, "No linear call matches exclude='q_prj'.*'q_proj'"
    ),
    "rank": ({"rank": 0}, ConfigError, "rank must be an integer of at least 1, not 0"),
    "rank type": ({"rank": 2.0}, ConfigError, "rank must be an integer of at least 1, not 2.0"),
    "rank pattern": (
        {"rank_pattern": {"q_proj": 0}}, ConfigError, "rank must be an integer of at least 1, not 0"
    ),
    "rank pattern typo": (
        {"rank_pattern": {"q_prj": 2}}, NoSiteError, "pattern 'q_prj' matches none of .*'q_proj'"
    ),
    "rank pattern regex": (
        {"rank_pattern": {"(": 2}}, ConfigError, r"the pattern '\(' is not a regular expression"
    ),
    "alpha": (
        {"alpha": float("nan")}, ConfigError, "alpha must be a finite number above 0, not nan"
    ),
    "alpha pattern": (
        {"alpha_pattern": {"v_proj": 2}}, NoSiteError, "pattern 'v_proj' matches none"
    ),
    "rslora": (
        {"rslora": True}, ConfigError,
        r"rslora divides alpha by sqrt\(rank\), but there is no alpha"
    ),
    "share_dropout": (
        {"share_dropout": 1}, ConfigError, "share_dropout must be True or False, not 1"
    ),
    "dropout range": (
        {"dropout": 1.0}, ConfigError, "dropout must be at least 0 and below 1, not 1.0"
    ),
    "init": (
        {"init": "zeros"}, ConfigError, "init must be one of 'gaussian', 'kaiming', not 'zeros'"
    ),
    "dtype": (
        {"dtype": torch.int8}, ConfigError, "dtype must be one of torch.float16, .* not torch.int8"
    ),
    "trainable": (
        {"trainable": "con"}, NoSiteError,
        "No parameter, and no module with parameters, matches trainable='con'.*has 'conv'"
    ),
    "dotted name": (
        {"adapter": "a.b"}, ConfigError, "'a.b' cannot name an adapter: use a word without dots"
    ),
    "private name": ({"adapter": "_frozen"}, ConfigError, "'_frozen' cannot name an adapter"),
    "no name": ({"adapter": 5}, ConfigError, "5 cannot name an adapter"),
    "init type": ({"init": ["gaussian"]}, ConfigError, "init must be one of"),
    "patterns": (
        {"rank_pattern": ["q_proj"]}, ConfigError,
        "rank_pattern must be a dict of regular expressions"
    ),
    "pattern type": (
        {"alpha_pattern": {5: 1.0}}, ConfigError, "the pattern 5 is not a regular expression"
    ),
    "class": ({"targets": nn.Linear}, ConfigError, "targets takes names, globs"),
    "trainable type": (
        {"trainable": 5}, ConfigError,
        "trainable takes names and globs of modules and parameters, not 5"
    ),
    "taken name": ({"adapter": "train"}, ConfigError, "'train' cannot name an adapter"),
    "empty name": ({"adapter": ""}, ConfigError, "'' cannot name an adapter"),
}


@pytest.mark.parametrize("config, error, message", SETTINGS.values(), ids=SETTINGS)
def test_settings(config, error, message):
    model = Net()
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        lorafx.inject(model, **config)
    assert fingerprint(model) == before


def patched(model: nn.Module) -> nn.Module:
    """What MiniMind's guide does: a layer's forward replaced on the instance."""
    model.q_proj.forward = types.MethodType(
        lambda self, x: nn.Linear.forward(self, x) * 2, model.q_proj
    )
    return model


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.q_proj.compile(backend="eager")
    return model


def with_non_copyable(model: nn.Module) -> nn.Module:
    model.lock = threading.Lock()
    return model


class OwnWeights(nn.Linear):
    def __deepcopy__(self, memo):
        return OwnWeights(self.in_features, self.out_features)


def with_closure(model: nn.Module) -> nn.Module:
    model.act = lambda x: model.q_proj(x)
    return model


def with_closure_over_a_weight(model: nn.Module) -> nn.Module:
    weight = model.q_proj.weight
    model.act = lambda x: x @ weight
    return model


def with_hook(model: nn.Module) -> nn.Module:
    model.q_proj.register_forward_hook(
        lambda module, args, output: output + model.v_proj.weight.sum()
    )
    return model


def with_lora_attribute(model: nn.Module) -> nn.Module:
    model.q_proj.lora = nn.Identity()
    return model


MODELS = {
    "no module": (lambda: 3, UnsupportedModelError, "A model is an nn.Module, not a int"),
    "no linear": (
        lambda: nn.Sequential(nn.ReLU()), NoSiteError,
        "This model makes no linear call on a weight of"
    ),
    "no linear but matrices": (
        lambda: nn.LSTM(3, 3), NoSiteError,
        r"'weight_ih_l0' cannot be adapted: a recurrent layer \(LSTM\), which lorafx"
    ),
    "a bracket in a name": (
        lambda: nn.Sequential(OrderedDict({"a[0]": nn.Linear(3, 3)})), NoSiteError,
        r"'a\[0\]' cannot be adapted: its name holds '\[', which is how blocks of rows are"
    ),
    "closure": (
        lambda: with_closure(Net()), UnsupportedModelError,
        "This Net holds a function, 'act', that closes over a part of the model"
    ),
    "closure over a weight": (
        lambda: with_closure_over_a_weight(Net()), UnsupportedModelError, "'act', that"
    ),
    "hook": (
        lambda: with_hook(Net()), UnsupportedModelError,
        r"'q_proj' \(Linear\) holds a function, hook \d+, that closes over a part"
    ),
    "inference mode": (
        torch.inference_mode()(lambda: Net()), UnsupportedModelError,
        "was made in inference mode, so that autograd cannot use its 'weight'"
    ),
    "lazy": (
        lambda: nn.Sequential(nn.LazyLinear(4)), UnsupportedModelError,
        r"'0' \(LazyLinear\) is lazy, its 'weight' has no shape yet: run one batch"
    ),
    "data parallel": (
        lambda: nn.DataParallel(Net()), UnsupportedModelError,
        "This DataParallel is wrapped for data-parallel training: inject into model.module"
    ),
    "compiled": (
        lambda: torch.compile(Net(), backend="eager"), UnsupportedModelError,
        "This OptimizedModule is compiled: inject into model._orig_mod"
    ),
    "compiled in place": (
        lambda: compiled_in_place(Net()), UnsupportedModelError,
        r"'q_proj' \(Linear\) is compiled: call .compile\(\) on the injected model instead"
    ),
    "patched": (
        lambda: patched(Net()), UnsupportedModelError,
        r"'q_proj' \(Linear\) has a forward of its own, patched in by another tool"
    ),
    "injected": (
        lambda: lorafx.inject(Net()), AdapterError,
        "This Net is injected already: lorafx.add gives it another adapter"
    ),
    "injected below": (
        lambda: nn.Sequential(lorafx.inject(Net())), UnsupportedModelError,
        r"'0' \(Net\) is part of an injected model: eject that"
    ),
    "part of an injected": (
        lambda: lorafx.inject(nn.Sequential(Net()), targets="linear")[0], UnsupportedModelError,
        r"'q_proj.lora' \(Branch\) is part of an injected model"
    ),
    "not copyable": (
        lambda: with_non_copyable(Net()), UnsupportedModelError,
        "This Net cannot be copied: cannot pickle '_thread.lock' object. Remove the attribute"
    ),
    "own copy": (
        lambda: nn.Sequential(OwnWeights(3, 3)), UnsupportedModelError,
        "did not keep the weight '0.weight': some class on the way has a __deepcopy__"
    ),
    "lora taken": (
        lambda: with_lora_attribute(Net()), UnsupportedModelError,
        "The module of 'q_proj' has an attribute 'lora' already"
    ),
}


@pytest.mark.parametrize("make, error, message", MODELS.values(), ids=MODELS)
def test_models(make, error, message):
    with pytest.raises(error, match=message):
        lorafx.inject(make(), targets="linear")


def test_distributed_wrappers(tmp_path):
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        from torch.distributed.fsdp import fully_shard
        with pytest.raises(
            UnsupportedModelError, match="This DistributedDataParallel is wrapped .*model.module"
        ):
            lorafx.inject(nn.parallel.DistributedDataParallel(Net()))
        sharded = Net()
        fully_shard(sharded, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        with pytest.raises(
            UnsupportedModelError, match="is sharded by FSDP: inject first and shard the result"
        ):
            lorafx.inject(sharded)
    finally:
        torch.distributed.destroy_process_group()


def test_peft():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(
        UnsupportedModelError, match="is adapted by PEFT: start from the base model"
    ):
        lorafx.inject(adapted)
    with pytest.raises(UnsupportedModelError, match=r"'q_proj' \(Linear\) is adapted by PEFT"):
        lorafx.inject(adapted.base_model.model)


NOT_INJECTED = {
    "add": lambda model: lorafx.add(model, "x"),
    "activate": lambda model: lorafx.activate(model, "x"),
    "disabled": lambda model: lorafx.disabled(model).__enter__(),
    "compose": lambda model: lorafx.compose(model, {}, "x"),
    "remove": lambda model: lorafx.remove(model, "x"),
    "adapters": lorafx.adapters,
    "summary": lorafx.summary,
    "parameters": lambda model: list(lorafx.parameters(model)),
    "merge": lorafx.merge,
    "eject": lorafx.eject,
    "save": lambda model: lorafx.save(model, "x.pth"),
}


@pytest.mark.parametrize("call", NOT_INJECTED.values(), ids=NOT_INJECTED)
def test_functions_that_need_an_injected_model(call):
    with pytest.raises(
        NotInjectedError, match=r"This Net is not an injected model: call lorafx.inject\(model\)"
    ):
        call(Net())
    with pytest.raises(
        NotInjectedError, match="This Sequential is not an injected model; its '0' is, so pass that"
    ):
        call(nn.Sequential(lorafx.inject(Net())))


ADAPTERS = {
    "unknown to activate": (
        lambda m: lorafx.activate(m, "x"), "This model has no adapter 'x'; it has 'default'"
    ),
    "unknown weighted": (
        lambda m: lorafx.activate(m, {"default": 1.0, "x": 1.0}), "has no adapter 'x'"
    ),
    "weight": (
        lambda m: lorafx.activate(m, {"default": float("inf")}),
        "adapter 'default' must be .* not inf"
    ),
    "unknown to merge": (lambda m: lorafx.merge(m, "x"), "This model has no adapter 'x'"),
    "unknown to remove": (lambda m: lorafx.remove(m, "x"), "This model has no adapter 'x'"),
    "unknown to save": (lambda m: lorafx.save(m, "x.pth", "x"), "This model has no adapter 'x'"),
    "unknown parameters": (
        lambda m: list(lorafx.parameters(m, "x")), "This model has no adapter 'x'"
    ),
    "unknown to compose": (
        lambda m: lorafx.compose(m, {"x": 1.0}, "y"), "This model has no adapter 'x'"
    ),
    "nothing to compose": (
        lambda m: lorafx.compose(m, {}, "y"), "nothing to compose: name at least one adapter"
    ),
    "taken by add": (
        lambda m: lorafx.add(m, "default"), "has an adapter 'default' already: choose another name"
    ),
    "taken by compose": (
        lambda m: lorafx.compose(m, {"default": 1.0}, "default"), "has an adapter 'default' already"
    ),
    "none active to save": (
        lambda m: (lorafx.activate(m, []), lorafx.save(m, "x.pth")),
        "save writes one adapter, but 0 are active: name one with adapter=..., of 'default'"
    ),
}


@pytest.mark.parametrize("call, message", ADAPTERS.values(), ids=ADAPTERS)
def test_adapters(call, message):
    model = lorafx.inject(Net())
    before = list(model.state_dict())
    with pytest.raises(AdapterError, match=message):
        call(model)
    assert list(model.state_dict()) == before and lorafx.adapters(model) == ["default"]


def test_a_name_taken_when_loading(tmp_path):
    model = lorafx.inject(Net())
    lorafx.save(model, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="has an adapter 'default' already"):
        lorafx.load(model, tmp_path / "a.safetensors")


def test_every_error_is_a_lorafx_error():
    public = [getattr(lorafx, name) for name in dir(lorafx)]
    errors = [value for value in public if isinstance(value, type) and issubclass(value, Exception)]
    assert len(errors) == 10 and all(issubclass(error, lorafx.LorafxError) for error in errors)


def test_errors_show_the_beginning_of_a_value() -> None:
    for options in ({"alpha": "1" * 3000}, {"dropout": "1" * 3000}, {"init": "1" * 3000}):
        with pytest.raises(lorafx.ConfigError) as caught:
            lorafx.inject(nn.Linear(4, 4), **options)
        assert len(str(caught.value)) < 300


def test_settings_out_of_range() -> None:
    for settings, message in [
        ({"rank": 2**31}, "rank must be below 2"),
        ({"alpha": 10**400}, "alpha must be a finite"),
        ({"rank_pattern": {"a{99999999999}": 2}}, "is not a regular expression"),
        ({"rslora": 1, "alpha": 1}, "rslora must be True or False, not 1"),
    ]:
        with pytest.raises(lorafx.ConfigError, match=message):
            lorafx.inject(Model(), **settings)


def _around(model: nn.Module) -> None:
    """What TRL does: a forward on the instance, whose closure has the one before."""
    inner = model.forward

    def forward(self, x):
        return inner(x) + 1

    model.forward = types.MethodType(forward, model)


def _beside(model: nn.Module) -> None:
    model.q_proj.forward = lambda x: F.linear(x, model.v_proj.weight)


@pytest.mark.parametrize("set_on, says", [
    (_around, r"^Net was given a forward that closes over a part of this model, .* \(del module"),
    (_beside, r"^'q_proj' \(Linear\) was given a forward"),
])
def test_a_forward_that_a_copy_would_share_is_refused_when_one_is_made(set_on, says, tmp_path):
    model = lorafx.inject(Net())
    x = torch.ones(1, 4)
    set_on(model)
    before = fingerprint(model)
    for verb in (lorafx.merge, lorafx.eject, lorafx.merge_error,
                 lambda model: lorafx.export(model, tmp_path / "net.pt2", (x,))):
        with pytest.raises(UnsupportedModelError, match=says):
            verb(model)
    assert fingerprint(model) == before and not list(tmp_path.iterdir())


def test_a_forward_bound_to_its_module_is_bound_to_the_new_one_in_a_merged_model():
    model = lorafx.inject(Net())
    patched(model)
    model.v_proj.compile(backend="eager")
    merged = lorafx.merge(torch.compile(model, backend="eager"))
    assert merged.q_proj.forward.__self__ is merged.q_proj
    assert torch.equal(merged(torch.ones(1, 4)), model(torch.ones(1, 4)))
