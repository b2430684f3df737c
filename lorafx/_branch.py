"""The modules that hold adapters inside a model, and what a model remembers of its injection."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ._adapter import INITS, LoRAConfig, Pair, is_number, join
from ._errors import AdapterError, NotInjectedError, UnsupportedModelError
from ._kernels import add_branch
from ._rules import Site


class Own(nn.Module):
    """A module that lorafx added to the model, no part of the program that the user wrote."""


class Factors(Own):
    """One adapter at one site: A (rank, in), B (out, rank), scale s."""

    def __init__(self, A: Tensor, B: Tensor, scale: float) -> None:
        super().__init__()
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)
        self.scale = scale

    def extra_repr(self) -> str:
        return f"rank={self.A.shape[0]}, scale={self.scale:g}"


class Branch(Own):
    """All adapters at one site. Called with the linear call's input and output: y + sum w s (x A^T) B^T.

    The sum runs over the active adapters, w being the weight that `activate` gave each; with none it returns y itself.
    A call of the transposed weight, as a decoder makes that shares its encoder's, is `reverse`: y + sum w s (x B) A.
    """

    def __init__(self) -> None:
        super().__init__()
        self._live: tuple[tuple[str, float], ...] = ()

    def forward(self, x: Tensor, y: Tensor, reverse: bool = False) -> Tensor:
        """x (..., in), y (..., out) -> (..., out); in and out the other way round for `reverse`."""
        for name, weight in self._live:
            factors: Factors = self._modules[name]  # type: ignore[assignment]
            A, B = (factors.B.mT, factors.A.mT) if reverse else (factors.A, factors.B)
            y = add_branch(y, x, A, B, weight * factors.scale)
        return y


class Trained(Own):
    """The parameters of one base module that adapters train whole: a set for each of them, and the frozen set.

    The module itself holds, under the usual names, the set of the active adapter, or else the frozen one.
    """

    def __init__(self) -> None:
        super().__init__()
        self._modules[FROZEN] = Own()


FROZEN = "_frozen"  # no adapter's name begins like this


def sets_of(held: Trained) -> dict[str, dict[str, nn.Parameter]]:
    """{adapter or FROZEN: {name: Parameter}}."""
    return {name: module._parameters for name, module in held._modules.items()}  # type: ignore[union-attr, misc]


def chosen_set(held: Trained, live: Iterable[str]) -> dict[str, nn.Parameter]:
    """The set of the adapter among these that has one, or the frozen set."""
    sets = sets_of(held)
    return next((sets[name] for name in live if name in sets), sets[FROZEN])


def factors_at(branch: Branch, adapter: str) -> Factors | None:
    """One adapter's factors at a site, or None if it is not there."""
    found = branch._modules.get(adapter)
    return found if isinstance(found, Factors) else None


@dataclasses.dataclass
class Injection:
    """What the root of an injected model remembers: the original's flags, what was left alone, adapters and state."""

    requires_grad: dict[str, bool]
    skipped: dict[str, str]
    breaks: dict[str, str]
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


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The module registered at a path, whatever a property of the same name may say."""
    for name in path.split(".") if path else ():
        found = model._modules[name]
        assert found is not None
        model = found
    return model


def hooks(module: nn.Module) -> list[Any]:
    """The functions that are hooked to a module's forward and backward."""
    tables = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return [hook for table in tables for hook in table.values()]


def branch_name(attribute: str) -> str:
    """The name of the branch of a module's tensor: `lora` for its weight, `lora_w1` for another, w1."""
    return "lora" if attribute == "weight" else f"lora_{attribute}"


def site_name(owner: str, attribute: str) -> str:
    """The name of a site: its owner's path, or the tensor's own where that is not called weight."""
    return owner if attribute == "weight" else join(owner, attribute)


def branches(model: nn.Module) -> dict[str, Branch]:
    """{site: Branch}, each branch once, under its site's first name."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, Branch):
            owner, _, name = path.rpartition(".")
            found[site_name(owner, "weight" if name == "lora" else name.removeprefix("lora_"))] = module
    return found


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Module, Trained]]:
    """(owner's path, owner, its Trained) for every module with parameters that some adapter trains whole."""
    for path, module in model.named_modules():
        held = module._modules.get("trained")
        if isinstance(held, Trained):
            yield path, module, held


def holders(model: nn.Module) -> list[Own]:
    """Every module that has adapters as its children: the branches, and what holds modules trained whole."""
    return [*branches(model).values(), *(held for _, _, held in trained(model))]


def factor_dtype(config: LoRAConfig, weight: Tensor) -> torch.dtype:
    """The dtype of A and B at a weight: the config's, else float32 for a narrower weight, else the weight's own."""
    return config.dtype or torch.promote_types(weight.dtype, torch.float32)


def new_pair(config: LoRAConfig, site: Site, weight: Tensor) -> Pair:
    """Fresh A (rank, in), drawn from torch's default generator, and B (out, rank), zero, for one site's weight."""
    rank, dtype = config.site_rank(site.name), factor_dtype(config, weight)
    A = torch.empty(rank, site.in_features, dtype=dtype, device=weight.device)
    B = torch.zeros(site.out_features, rank, dtype=dtype, device=weight.device)
    if A.numel():
        INITS[config.init](A)
    return Pair(A, B, config.site_scale(site.name))


def refresh(model: nn.Module) -> None:
    """Make every branch and every trained module follow the record."""
    live = injection(model).live
    for branch in branches(model).values():
        branch._live = tuple((name, weight) for name, weight in live.items() if name in branch._modules)
    for _, owner, held in trained(model):
        owner._parameters.update(chosen_set(held, live))


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
    for path, _, held in trained(model):
        rivals = [name for name in weights if name in held._modules]
        if len(rivals) > 1:
            raise AdapterError(f"Adapters {rivals[0]!r} and {rivals[1]!r} both train '{path}' whole, and one module "
                               "cannot use two sets of weights: activate one of them.")
    return {adapter: float(weight) for adapter, weight in weights.items()}


def check_adapter(model: nn.Module, adapter: str) -> None:
    """Raise unless the model holds this adapter."""
    names = list(injection(model).configs)
    if adapter not in names:
        raise AdapterError(f"This model has no adapter {adapter!r}; it has {', '.join(map(repr, names)) or 'none'}.")
