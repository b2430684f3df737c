"""What an injected model remembers of its injection, and the adapters that it holds."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from .._adapter.config import LoRAConfig, is_number
from .._errors import AdapterError, NotInjectedError, UnsupportedModelError
from .._graph.modules import LorafxModule
from .branches import Trained, branches


@dataclasses.dataclass
class Injection:
    """What the root of an injected model remembers: the original's flags, what was left alone, adapters and state."""

    requires_grad: dict[str, bool]
    skipped: dict[str, str]
    breaks: dict[str, str]
    group: bool  # whether linear calls that share an input are computed together
    configs: dict[str, LoRAConfig] = dataclasses.field(default_factory=dict)
    active: dict[str, float] = dataclasses.field(default_factory=dict)
    disabled: int = 0

    def __getstate__(self) -> dict[str, Any]:
        """A copy or pickle made while adapters are disabled would stay so, with nothing to end it."""
        if self.disabled:
            raise AdapterError("This model's adapters are disabled: copy, pickle, merge or eject it outside of "
                               "lorafx.disabled(model).")
        return vars(self)

    @property
    def live(self) -> dict[str, float]:
        """The adapters that forward uses now."""
        return {} if self.disabled else self.active


RECORD = "_lorafx"  # the root's attribute that holds its Injection


def injection(model: nn.Module) -> Injection:
    """The record of an injected model."""
    found = find_injection(model)
    if found is None:
        inner = [path for path, module in model.named_modules() if find_injection(module) is not None]
        what = f"; its '{inner[0]}' is, so pass that" if inner else ": call lorafx.inject(model) first"
        raise NotInjectedError(f"This {type(model).__name__} is not an injected model{what}.")
    return found


def find_injection(model: nn.Module) -> Injection | None:
    """The record of an injected model, or None for any other."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"A model is an nn.Module, not a {type(model).__name__}.")
    found = vars(model).get(RECORD)
    return found if isinstance(found, Injection) else None


def trained_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, Trained]]:
    """(owner's path, owner, its Trained) for every module with parameters that some adapter trains whole."""
    for path, module in model.named_modules():
        held = module._modules.get("trained")
        if isinstance(held, Trained):
            yield path, module, held


def holders(model: nn.Module) -> list[LorafxModule]:
    """Every module that has adapters as its children: the branches, and what holds modules trained whole."""
    return [*branches(model).values(), *(held for _, _, held in trained_modules(model))]


def refresh(model: nn.Module) -> None:
    """Make every branch and every trained module follow the record."""
    live = injection(model).live
    for branch in branches(model).values():
        branch._live = tuple((name, weight) for name, weight in live.items() if name in branch._modules)
    for _, _, held in trained_modules(model):
        held.used = held.choose(live)


def set_trainable(model: nn.Module) -> None:
    """Let exactly the active adapters' tensors require grad."""
    active = injection(model).active
    for holder in holders(model):
        for name, module in holder._modules.items():
            if module is not None:
                module.requires_grad_(name in active)


def weights_of(model: nn.Module, spec: str | Iterable[str] | Mapping[str, float]) -> dict[str, float]:
    """{adapter: weight} for one name, several or a mapping; each known and finite, and no module trained by two."""
    if not isinstance(spec, (str, Iterable)):
        raise AdapterError(f"Adapters are given as a name, several names, or {{name: weight}}, not as {spec!r}.")
    names = [spec] if isinstance(spec, str) else spec
    weights = dict(names) if isinstance(names, Mapping) else {name: 1.0 for name in names}
    for adapter, weight in weights.items():
        check_adapter(model, adapter)
        if not is_number(weight):
            raise AdapterError(f"The weight of adapter {adapter!r} must be a finite number, not {weight!r}.")
    for path, _, held in trained_modules(model):
        conflicting = [name for name in weights if name in held._modules]
        if len(conflicting) > 1:
            raise AdapterError(f"Adapters {conflicting[0]!r} and {conflicting[1]!r} both train '{path}' whole, and one module "
                               "cannot use two sets of weights: activate one of them.")
    return {adapter: float(weight) for adapter, weight in weights.items()}


def check_adapter(model: nn.Module, adapter: str) -> None:
    """Raise unless the model holds this adapter."""
    names = list(injection(model).configs)
    if adapter not in names:
        raise AdapterError(f"This model has no adapter {adapter!r}; it has {', '.join(map(repr, names)) or 'none'}.")
