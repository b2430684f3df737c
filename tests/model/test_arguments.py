"""Unknown arguments name the one that is meant; PEFT's names are known."""

import inspect
import pickle

import pytest
from torch import nn

import lorafx

MEANT = {
    "r": "'r' (here 'rank')",
    "lora_alpha": "'lora_alpha' (here 'alpha')",
    "lora_dropout": "'lora_dropout' (here 'dropout')",
    "target_modules": "'target_modules' (here 'targets')",
    "exclude_modules": "'exclude_modules' (here 'exclude')",
    "modules_to_save": "'modules_to_save' (here 'trainable')",
    "use_rslora": "'use_rslora' (here 'rslora')",
    "init_lora_weights": "'init_lora_weights' (here 'init': PEFT's True is 'kaiming')",
    "bias": "'bias' (here 'trainable': PEFT's 'all' is '*.bias')",
    "task_type": "'task_type' (leave it out: lorafx does not need it)",
    "dropuot": "'dropuot' (did you mean 'dropout'?)",
    "lora_rank": "'lora_rank' (did you mean 'rank'?)",
}
UNLIKE = "has no argument 'zzz' \\(it takes .*rank, alpha, targets, exclude, dropout"


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4))


def calls(arguments: dict) -> dict:
    """Each function that takes the arguments of a config."""
    injected = lorafx.inject(model())
    return {
        "lorafx.inject": lambda: lorafx.inject(model(), **arguments),
        "lorafx.add": lambda: lorafx.add(injected, "more", **arguments),
        "lorafx.InjectLoRA": lambda: lorafx.InjectLoRA(**arguments),
    }


@pytest.mark.parametrize("name", MEANT)
def test_the_argument_that_is_meant(name):
    for function, call in calls({name: 1}).items():
        with pytest.raises(TypeError) as caught:
            call()
        assert str(caught.value) == f"{function} has no argument {MEANT[name]}."


def test_an_argument_like_no_other():
    for function, call in calls({"zzz": 1}).items():
        with pytest.raises(TypeError, match=f"^{function} {UNLIKE}"):
            call()


def test_every_argument_of_peft_that_is_meant_exists():
    from peft import LoraConfig
    known = set(inspect.signature(LoraConfig).parameters)
    assert {"r", "lora_alpha", "target_modules", "modules_to_save", "use_rslora"} < known
    for name in known - set(inspect.signature(lorafx.inject).parameters):
        with pytest.raises(TypeError, match=f"^lorafx.inject has no argument '{name}' \\("):
            lorafx.inject(model(), **{name: None})


def test_several_are_named_at_once():
    with pytest.raises(TypeError) as caught:
        lorafx.inject(model(), r=8, lora_alpha=16, dropout=0.1)
    assert str(caught.value) == ("lorafx.inject has no argument 'r' (here 'rank'), "
                                 "'lora_alpha' (here 'alpha').")


def test_what_fails_changes_nothing():
    injected = lorafx.inject(model())
    with pytest.raises(TypeError):
        lorafx.add(injected, "more", r=2)
    assert lorafx.adapters(injected) == ["default"]


def test_a_missing_model_is_pythons_own_error():
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'model'"):
        lorafx.inject(rank=2)


def test_the_signature_is_explicit():
    parameters = inspect.signature(lorafx.inject).parameters.values()
    assert len(parameters) == 19
    assert all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters)
    assert pickle.loads(pickle.dumps(lorafx.inject)) is lorafx.inject


@pytest.mark.parametrize(
    "targets, meant",
    [
        ("all-linear", "linear"),
        ("all_linear", "linear"),
        ("Linear", "linear"),
        ("squares", "square"),
    ],
)
@pytest.mark.parametrize("argument", ["targets", "exclude"])
def test_a_word_for_many_sites(argument, targets, meant):
    message = f"No linear call matches {argument}='{targets}'. Did you mean '{meant}'? This model"
    with pytest.raises(lorafx.NoSiteError, match=message.replace("?", "\\?")):
        lorafx.inject(model(), **{argument: targets})


def test_a_word_that_matches_nothing_is_not_named_again():
    with pytest.raises(lorafx.NoSiteError, match="matches targets='square'. This model has 1 site"):
        lorafx.inject(nn.Sequential(nn.Linear(4, 5)))


def test_add_says_that_adapter_name_is_adapter():
    injected = lorafx.inject(model())
    with pytest.raises(TypeError, match=r"'adapter_name' \(here 'adapter'\)"):
        lorafx.add(injected, "more", adapter_name="other")


def test_an_adapter_without_its_name():
    injected = lorafx.inject(model())
    with pytest.raises(TypeError, match="lorafx.add has no argument .adapter_name. .here .adapter"):
        lorafx.add(injected, adapter_name="more")
    assert lorafx.adapters(injected) == ["default"]
