"""Unknown arguments: a TypeError names the one that is meant, in terms of other libraries too."""

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar


F = TypeVar("F", bound=Callable[..., Any])

SYNONYMS = {  # {name in PEFT's LoraConfig or get_peft_model, or in loralib or kohya-ss: name here}
    "r": "rank",
    "lora_r": "rank",
    "network_dim": "rank",
    "lora_alpha": "alpha",
    "network_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "target_parameters": "targets",
    "layers_to_transform": "targets",
    "layers_pattern": "targets",
    "exclude_modules": "exclude",
    "modules_to_save": "trainable",
    "trainable_token_indices": "trainable",
    "bias": "trainable",
    "use_rslora": "rslora",
    "init_lora_weights": "init",
    "adapter_name": "adapter",
    "autocast_adapter_dtype": "dtype",
}
NOTES = {
    "bias": "PEFT's 'all' is '*.bias'",
    "init_lora_weights": "PEFT's True is 'kaiming'",
    "layers_pattern": "a glob such as '*.layers.0.*'",
    "layers_to_transform": "a glob such as '*.layers.0.*'",
    "trainable_token_indices": "rows such as 'embed_tokens[100:103]'",
}
NOT_NEEDED = {"task_type", "inference_mode", "fan_in_fan_out", "peft_type", "low_cpu_mem_usage"}


def check_arguments(function: str, given: Iterable[str], known: Collection[str]) -> None:
    """Raise TypeError if an argument is not a known one, saying for each which one is meant."""
    problems = []
    for name in given:
        if name not in known:
            problems.append(f"{name!r} ({_advice(name, known)})")
    if problems:
        raise TypeError(f"{function} has no argument {', '.join(problems)}.")


def explain_unknown_arguments(more: Collection[str] = ()) -> Callable[[F], F]:
    """Return a decorator that checks the names of a function's arguments; `more` go as **config."""

    def decorate(function: F) -> F:
        known = []
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is not parameter.VAR_KEYWORD and name not in more:
                known.append(name)
        known += more

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            check_arguments(f"lorafx.{function.__name__}", kwargs, known)
            return function(*args, **kwargs)

        return checked  # type: ignore[return-value]

    return decorate


def _advice(name: str, known: Collection[str]) -> str:
    meant = SYNONYMS.get(name)
    if meant in known:
        note = NOTES.get(name)
        return f"here {meant!r}" + (f": {note}" if note else "")
    if name in NOT_NEEDED:
        return "leave it out: lorafx does not need it"
    close = difflib.get_close_matches(name, known, 1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"it takes {', '.join(known)}"
