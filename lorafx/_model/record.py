"""What an injected model remembers of its injection, and the adapters that it holds."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from .._adapter.config import LoRAConfig, is_number
from .._adapter.names import dotted, have_rows_in_common
from .._errors import AdapterError, NotInjectedError, UnsupportedModelError
from .._graph.modules import named_modules, outermost, unwrapped, users_modules
from .._graph.sites import Site
from .._kernels.compiling import end_program, not_compiled
from .branches import Branch
from .choice import Choice, check_parts
from .fsdp import notice_what_trains, settle
from .trained import Trained


Function = TypeVar("Function", bound=Callable[..., Any])


class KnownSite(NamedTuple):
    """A site, and the shape and class of the weight of which it is all or some rows."""

    site: Site
    shape: torch.Size
    kind: type[Tensor]


@dataclasses.dataclass
class Injection:
    """What the root of an injected model remembers.

    The original's flags, what was left alone and why, and the adapters and which are active.
    """

    requires_grad: dict[str, bool]
    skipped: dict[str, str]
    breaks: dict[str, str]
    group: bool  # True if linear calls that share an input are computed together
    fingerprint: str  # of the base's sites
    recompute: bool = True  # False if inputs of linear calls are always kept for backward
    untied: bool = False  # True if tensors that the base ties have places of their own here
    configs: dict[str, LoRAConfig] = dataclasses.field(default_factory=dict)
    # {adapter: names of the base's tensors in whose places it has its own}
    trained: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    active: dict[str, float] = dataclasses.field(default_factory=dict)
    roles: dict[str, str] = dataclasses.field(default_factory=dict)  # of sites, where looked for
    without_role: dict[str, str] = dataclasses.field(default_factory=dict)  # sites, and why
    known: list[KnownSite] = dataclasses.field(default_factory=list)  # its sites, as they were then
    disabled: int = 0
    choice: Choice = dataclasses.field(default_factory=Choice)

    def __getstate__(self) -> dict[str, Any]:
        """A copy or pickle made while adapters are disabled would stay so: nothing would end it."""
        if self.disabled:
            raise AdapterError("This model's adapters are disabled: copy, pickle, merge or eject "
                               "it outside of lorafx.disabled(model).")
        return vars(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.choice.begin_anew()

    @property
    def live(self) -> dict[str, float]:
        """The adapters that forward uses now."""
        return {} if self.disabled else self.active


RECORD = "_lorafx"  # the root's attribute that holds its Injection


def injection(model: nn.Module) -> Injection:
    """The record of an injected model, which may be wrapped."""
    found = find_injection(model)
    if found is None:
        hint = ": call lorafx.inject(model) first"
        if any(".lora." in f".{name}" for name, _ in model.named_parameters()):
            hint = ("; if it was exported from one, pass that; of a pipeline with the modules of "
                    "all other stages set to None")
        for path, module in named_modules(model):
            if find_injection(module) is not None:
                hint = f"; its '{path}' is, so pass that"
                break
        raise NotInjectedError(f"This {type(model).__name__} is not an injected model{hint}.")
    return found


def of_one_moment(function: Function) -> Function:
    """function(model, ...), which reads adapters, while none goes or is replaced elsewhere."""
    @functools.wraps(function)
    def read(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with injection(model).choice.lock:
            return function(model, *args, **kwargs)

    return read  # type: ignore[return-value]


def find_injection(model: nn.Module) -> Injection | None:
    """The record of an injected model, or None for any other."""
    if isinstance(model, ExportedProgram):
        raise UnsupportedModelError(_EXPORTED)
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"A model is an nn.Module, not a {type(model).__name__}.")
    found = vars(model).get(RECORD) or vars(unwrapped(model)).get(RECORD)
    return found if isinstance(found, Injection) else None


_EXPORTED = (
    "An ExportedProgram is taken by lorafx.inject, load, save, resume, parameters, adapters, "
    "sites, summary, merge, merge_error and eject; for anything else start from its module, "
    "lorafx.inject(program.module()).")


def is_cut(model: nn.Module) -> bool:
    """True if modules that had parameters at injection are gone, as from a pipeline's stage."""
    owners = {name.rpartition(".")[0] for name in injection(model).requires_grad}
    return not owners <= users_modules(model).keys()


def trained_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, Trained]]:
    """(path, module, its Trained) of every module of which an adapter trains parameters."""
    for path, module in named_modules(model):
        trained = module._modules.get("trained")
        if isinstance(trained, Trained):
            yield path, module, trained


def check_ties_are_here(model: nn.Module) -> None:
    """Raise if what is trained in the place of a tied tensor is in another stage of a pipeline."""
    modules = set(model.modules())
    for path, _, trained in trained_modules(model):
        for adapter, copies in trained.sets().items():
            for name, (holder, _) in copies.elsewhere.items():
                if holder not in modules:
                    raise AdapterError(
                        f"Adapter {adapter!r} trains '{dotted(path, name)}', which is tied to a "
                        "tensor of a module that is not here, as in another stage of a pipeline: "
                        "cut the model so that both are in one.")


HOLDERS = (Branch, Trained)  # the modules whose children are adapters


def holders(model: nn.Module) -> list[nn.Module]:
    """Every module whose children are adapters: all branches and all Trained."""
    return outermost(model, HOLDERS)


def refresh(model: nn.Module) -> None:
    """Make every branch and every trained module follow the record."""
    record = injection(model)
    record.choice.trains |= bool(record.active)
    record.choice.drops |= any([config.dropout for config in record.configs.values()])
    record.choice.choose(record.live)


@not_compiled
def set_trainable(model: nn.Module) -> None:
    """Let exactly the active adapters' tensors require grad, and forward use these.

    In this order: at no moment, for another thread, does a site where something trains have nothing
    that does, for which a compiled program would be compiled again.
    """
    end_program()
    settle(model)
    check_parts(model, injection(model).choice)
    active = injection(model).active
    for trains in (True, False):
        for holder in holders(model):
            for name, module in holder._modules.items():
                if module is not None and (name in active) is trains:
                    _let_train(module, trains)
        if trains:
            refresh(model)
    notice_what_trains(model)


def _let_train(module: nn.Module, trains: bool) -> None:
    """`module.requires_grad_(trains)`, in less time where it has no children and little changes."""
    if module._modules:
        module.requires_grad_(trains)
        return
    for parameter in module._parameters.values():
        if parameter is not None and parameter.requires_grad is not trains:
            parameter.requires_grad_(trains)


def weights_of(
    model: nn.Module, spec: str | Iterable[str] | Mapping[str, float]
) -> dict[str, float]:
    """{adapter: weight} for one name, several or a mapping.

    Each must be known and finite, and no tensor trained by two.
    """
    if isinstance(spec, str):
        check_adapter(model, spec)
        return {spec: 1.0}
    if not isinstance(spec, Iterable):
        raise AdapterError("Adapters are given as a name, several names, or {name: weight}, not as "
                           f"{spec!r}.")
    weights = dict(spec) if isinstance(spec, Mapping) else {name: 1.0 for name in spec}
    for adapter, weight in weights.items():
        check_adapter(model, adapter)
        if not is_number(weight):
            raise AdapterError(f"The weight of adapter {adapter!r} must be a finite number, not "
                               f"{weight!r}.")
    train_whole = [name for name in weights if injection(model).trained[name]]
    for path, _, trained in trained_modules(model) if len(train_whole) > 1 else ():
        before: dict[str, str] = {}  # {name: the adapter that trains it}
        for adapter in trained.having(weights):
            names = trained.sets()[adapter].holders()
            for name, other in itertools.product(names, before):
                if have_rows_in_common(name, other):
                    raise AdapterError(
                        f"Adapters {before[other]!r} and {adapter!r} both train "
                        f"'{dotted(path, name)}', and one tensor cannot be both: activate one of "
                        "them.")
            before |= dict.fromkeys(names, adapter)
    return {adapter: float(weight) for adapter, weight in weights.items()}


def used_here(model: nn.Module, doing: str) -> dict[str, float]:
    """{adapter: weight} of what forward uses here: what a context chose, or is active.

    AdapterError where that cannot be told so.
    """
    selection = injection(model).choice.read()
    if selection.rows is not None:
        raise AdapterError(f"{doing} is asked within lorafx.rows, where each row of a batch uses "
                           "adapters of its own: leave that, or name adapters.")
    if selection.retired:
        raise AdapterError(
            f"{doing} is asked where forward still uses {[*selection.retired][0]!r} as it was when "
            "lorafx.using was entered, and it has been replaced since: leave that first.")
    return dict(selection.weights)


def check_adapter(model: nn.Module, adapter: str) -> None:
    """Raise unless the model holds this adapter."""
    configs = injection(model).configs
    if adapter not in configs:
        raise AdapterError(f"This model has no adapter {adapter!r}; it has "
                           f"{', '.join(map(repr, configs)) or 'none'}.")
