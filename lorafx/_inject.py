"""The pass: chosen linear calls y = x W^T + b also add s (x A^T) B^T, where B is 0 at first."""

import dataclasses
import inspect
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from ._adapter.arguments import check_arguments, explain_unknown_arguments
from ._adapter.config import LoRAConfig
from ._adapter.names import check_name
from ._graph.sites import Site, Targets, as_list, select
from ._merge import merge
from ._model.attach import attach, begin_injection, check_new_name, make_room, new_adapter
from ._model.branches import branches
from ._model.copies import share
from ._model.exported_program import takes_exported
from ._model.guard import check_model
from ._model.program import Program, read_program, warn_of_left_alone
from ._model.record import check_adapter, find_injection, injection
from ._model.reset import reset
from ._model.roles import Resolved, with_roles
from ._switch import activate

M = TypeVar("M", bound=nn.Module | ExportedProgram)


@explain_unknown_arguments()
@takes_exported
@torch.inference_mode(False)
def inject(
    model: M, rank: int = 8, *, alpha: float | None = None, targets: Targets = "square",
    exclude: Targets = (), dropout: float = 0.0, rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None, alpha_pattern: Mapping[str, float] | None = None,
    trainable: str | Collection[str] = (), init: str = "gaussian", dtype: torch.dtype | None = None,
    rounding: bool = False, share_dropout: bool = False, adapter: str = "default",
    group: bool = True, recompute: bool = True, example_inputs: Any = None,
    capacity: Targets | None = None,
) -> M:
    """Return a new model whose chosen linear calls y = x W^T + b also add s (x A^T) B^T.

    A (rank, in) is drawn from N(0, 0.02^2) with torch's default generator and B (out, rank) is 0,
    so the new model computes exactly what the old one does until it is trained (Hu et al. 2021,
    arXiv:2106.09685). All but A and B is frozen. The old one is not touched; weights are shared.

    Args:
        model: any nn.Module; a GraphModule or ExportedProgram gets branches as nodes of its graph.
        rank: r, at least 1.
        alpha, rslora: s = alpha / rank, or 1; with rslora alpha / sqrt(rank) (arXiv:2312.03732).
        targets: "square" (in == out), "linear" (all; a layer of that name is "*linear"; it warns if
            most cannot be adapted), a name, suffix, glob or block of rows ("qkv[q]", "qkv[0:64]"),
            a regular expression of whole names, a function of a Site, a role (`sites`), or several.
        exclude: sites to leave out, in the same forms.
        dropout: in training, the probability that an element of the branch's input is zeroed.
        rank_pattern, alpha_pattern: {regular expression: rank or alpha}; the first match wins.
        trainable: modules, parameters and rows to train too: "head", "*.bias", "embed[100:103]".
        init: how A is drawn: "gaussian", or "kaiming" (uniform, a = sqrt(5), as in PEFT).
        dtype: of A, B and what else trains; by default the weight's own, at least float32.
        rounding: let Python read narrow weights as W + s B A rounded, instead of raising an error.
        share_dropout: let branches computed together drop out the same elements, which is faster;
            compiled programs do not.
        adapter: the name of this adapter.
        group: compute linear calls that share an input (query, key, value) together, for speed.
        recompute: for memory, compute inputs again in the backward pass instead of keeping them.
        example_inputs: a tuple or dict of forward's arguments, on which roles are found: `sites`.
        capacity: where later adapters may be without compiling again, as `targets`. With capacity,
            `targets=()` makes no adapter yet.

    Raises:
        NoSiteError: a pattern matches nothing, a role is undecided. ConfigError: out of range.
        UnsupportedModelError: the model is wrapped, compiled, patched, lazy, or adapted already.

    Example:
        >>> import torch, lorafx
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> adapted = lorafx.inject(model, rank=2)
        >>> [name for name, _ in lorafx.named_parameters(adapted)]
        ['0.lora.default.A', '0.lora.default.B']
        >>> torch.equal(adapted(torch.ones(3, 4)), model(torch.ones(3, 4)))
        True
    """
    config = LoRAConfig(
        rank, alpha, targets, exclude, dropout, rslora, rank_pattern or {}, alpha_pattern or {},
        tuple(as_list(trainable)), init, dtype, rounding, share_dropout)
    check_name(adapter)
    assert not isinstance(model, ExportedProgram)  # takes_exported saw to that
    check_model(model)
    twin = share(model)
    _rewrite(read_program(twin), adapter, config, capacity, group, recompute, example_inputs)
    return twin


def _rewrite(
    program: Program, adapter: str, config: LoRAConfig, capacity: Targets | None,
    group: bool, recompute: bool, example_inputs: Any,
) -> None:
    """Put branches into a copy of the user's model, and a first adapter unless it has no targets.
    """
    room: list[Site] = []
    if capacity is not None:
        meant = with_roles(program, capacity, (), example_inputs).targets
        room = select(program.sites, meant, (), program.left_alone, "capacity")
    made = roles = None
    if as_list(config.targets) or not room:
        config, roles = _without_roles(program, config, example_inputs)
        made = new_adapter(program, adapter, config)
    warn_of_left_alone(program, config.targets)
    record = begin_injection(program, group, recompute)
    if roles is not None:
        roles.note(record)
    if room:
        make_room(program, room, config)
    if made is not None:
        attach(program, made)
        activate(program.model, adapter)


def _without_roles(
    program: Program, config: LoRAConfig, example_inputs: Any
) -> tuple[LoRAConfig, Resolved]:
    """The config with the sites that have a role in the place of its word."""
    resolved = with_roles(program, config.targets, config.exclude, example_inputs)
    config = dataclasses.replace(config, targets=resolved.targets, exclude=resolved.exclude)
    return config, resolved


@takes_exported
def sites(
    model: nn.Module | ExportedProgram, targets: Targets = "linear", *, example_inputs: Any = None
) -> list[Site]:
    """Return the sites that `inject` would adapt for these targets: a dry run, changing nothing.

    A role is found in what the base computes in one run on `example_inputs`, never in names:
    "attention.query", "attention.key" and "attention.value" give attention its operands (a fused
    projection is all three), "attention.output" takes its result, "attention" is all of these;
    "mlp" are the calls of feed-forward blocks, which end in a sum with what they began with (a
    router is none); "head" gives logits. A word that names sites, such as "head", means these, as
    any name does; but with `example_inputs` it means the role, and is an error if the sites of that
    name are others. "role:head" is always the role, "*head" the name. With `example_inputs` each
    site has its `role`; what has none that lorafx knows has None.

    Args:
        model: any nn.Module or ExportedProgram, injected or not.
        targets: as for `inject`.
        example_inputs: a tuple of the arguments of the model's forward, or a dict of its keyword
            arguments. A copy of the base runs on a copy of them, in eval, without gradients.

    Raises:
        NoSiteError: a pattern matches nothing, or a role cannot be decided for some site.
        ConfigError: the model cannot be run on `example_inputs`.

    Example:
        >>> import torch, lorafx
        >>> [site] = lorafx.sites(torch.nn.Sequential(torch.nn.Linear(3, 5)))
        >>> site.name, site.in_features, site.out_features, site.kind
        ('0', 3, 5, 'linear')
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16)
        >>> found = lorafx.sites(layer, "mlp", example_inputs=(torch.ones(3, 1, 8),))
        >>> [site.name for site in found]
        ['linear1', 'linear2']
    """
    assert not isinstance(model, ExportedProgram)  # takes_exported saw to that
    if find_injection(model) is None:
        check_model(model)
    program = read_program(model)
    resolved = with_roles(program, targets, (), example_inputs)
    roles = {} if resolved.roles is None else resolved.roles.named()
    found = select(program.sites, resolved.targets, (), program.left_alone)
    return [dataclasses.replace(site, role=roles.get(site.name)) for site in found]


@explain_unknown_arguments([field.name for field in dataclasses.fields(LoRAConfig)])
@torch.inference_mode(False)
def add(
    model: nn.Module, adapter: str, rank: int = 8, *, targets: Targets | None = None,
    example_inputs: Any = None, **config: Any
) -> None:
    """Give an injected model another adapter, inactive until `activate`.

    Args:
        model: an injected model; changed in place.
        adapter: the new adapter's name.
        rank, targets, example_inputs, config: as for `lorafx.inject`; `targets=None` means the
            sites that adapters have, or of a model without adapters, all that have a branch.

    Raises:
        AdapterError: the name is taken.
        NoSiteError, ConfigError, TypeError: as for `inject`.

    Example:
        >>> import torch, lorafx
        >>> model = lorafx.inject(torch.nn.Linear(4, 4))
        >>> lorafx.add(model, "other", rank=2)
        >>> lorafx.adapters(model)
        ['default', 'other']
    """
    check_new_name(model, adapter)
    held = branches(model)
    adapted = {name for name, branch in held.items() if branch.any_factors()} or {*held}

    def is_adapted(site: Site) -> bool:
        return site.name in adapted

    config["trainable"] = tuple(as_list(config.get("trainable")))
    settings = LoRAConfig(rank, targets=is_adapted if targets is None else targets, **config)
    program = read_program(model)
    settings, roles = _without_roles(program, settings, example_inputs)
    attach(program, new_adapter(program, adapter, settings))
    roles.note(injection(model))


@torch.inference_mode(False)
def reset_parameters(model: nn.Module, adapter: str | None = None) -> None:
    """Give adapters the values that new ones have: for a model that was made on the meta device.

    Each A is drawn in the order in which `inject` draws it, each B is 0, and a module trained whole
    is a copy of the base's. What is still on meta gets memory where the base beside it is; of a
    tensor that is spread over processes, each of which must call this, each gets its part of one
    draw.

    Args:
        model: an injected model whose base has its values.
        adapter: one adapter; by default the active ones, but for what `load` read from a file while
            the base was still on meta, which is kept.

    Raises:
        AdapterError: the base is still on the meta device. Nothing has changed then.

    Example:
        >>> import torch, lorafx
        >>> with torch.device("meta"):
        ...     model = lorafx.inject(torch.nn.Linear(4, 4))
        >>> _ = model.load_state_dict(torch.nn.Linear(4, 4).state_dict(), strict=False, assign=True)
        >>> lorafx.reset_parameters(model)
        >>> model(torch.ones(1, 4)).shape
        torch.Size([1, 4])
    """
    if adapter is not None:
        check_adapter(model, adapter)
    for name in injection(model).active if adapter is None else [adapter]:
        reset(model, name, keep=adapter is None)


class InjectLoRA(PassBase):
    """`inject` as a pass for torch's PassManager; takes the same keyword arguments.

    Example:
        >>> import torch, lorafx
        >>> from torch.fx.passes.infra.pass_manager import PassManager
        >>> graph = torch.fx.symbolic_trace(torch.nn.Sequential(torch.nn.Linear(4, 4)))
        >>> PassManager([lorafx.InjectLoRA(rank=2), lorafx.MergeLoRA()])(graph).modified
        True
    """

    def __init__(self, **config: Any) -> None:
        check_arguments("lorafx.InjectLoRA", config, [*inspect.signature(inject).parameters][1:])
        self.config = config

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Return the injected module; the given one is not touched."""
        return PassResult(inject(graph_module, **self.config), True)


class MergeLoRA(PassBase):
    """`merge` as a pass for torch's PassManager; takes the same arguments.

    Example:
        >>> import lorafx
        >>> lorafx.MergeLoRA("default", untie=True).untie
        True
    """

    def __init__(
        self,
        adapters: str | Iterable[str] | Mapping[str, float] | None = None,
        *,
        untie: bool = False,
        requantize: bool = False,
        max_error: float | None = None,
    ) -> None:
        self.adapters = adapters
        self.untie = untie
        self.requantize = requantize
        self.max_error = max_error

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Return the merged module; the given one is not touched."""
        merged = merge(
            graph_module, self.adapters, untie=self.untie, requantize=self.requantize,
            max_error=self.max_error)
        return PassResult(merged, True)
