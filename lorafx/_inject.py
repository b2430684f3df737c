"""The pass and its two ways in and out: `inject` and `add` make an adapter, `load` and `save` read and write one."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from ._adapter.config import LoRAConfig
from ._adapter.names import check_name
from ._graph.sites import Site, as_list, select
from ._merge import merge
from ._model.attach import attach, check_new_name, create, start
from ._model.branches import branches
from ._model.copies import share
from ._model.guard import check_model
from ._model.program import read_program
from ._model.record import find_injection
from ._switch import activate


M = TypeVar("M", bound=nn.Module)


@torch.inference_mode(False)
def inject(
    model: M, rank: int = 8, *, alpha: float | None = None, targets: Any = "square", exclude: Any = (),
    dropout: float = 0.0, rslora: bool = False, rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None, trainable: Any = (), init: str = "gaussian",
    dtype: torch.dtype | None = None, rounding: bool = False, share_dropout: bool = False,
    adapter: str = "default", group: bool = True,
) -> M:
    """A new model in which each chosen linear call y = x W^T + b also adds s (x A^T) B^T; all but A and B is frozen.

    A (rank, in) is drawn from N(0, 0.02^2) with torch's default generator and B (out, rank) is zero, so the new model
    computes exactly what the old one does until it is trained (Hu et al. 2021, arXiv:2106.09685, section 4.1). The
    given model is not touched; base weights share storage with it, buffers are copied.

    Args:
        model: any nn.Module. A `torch.fx.GraphModule` gets the branches as nodes of its own graph.
        rank: r, at least 1.
        alpha: the scale is s = alpha / rank, or 1 without it.
        targets: "square" (in == out), "linear" (all), a name, dotted suffix or glob, a compiled regular expression that
            matches the whole name, a function of a Site, or a list of these. `lorafx.sites(model)` lists the names. (A
            layer that is itself called `linear` is "*linear".) A name may end in a block of a weight's rows: "qkv[q]",
            as forward names it, or "qkv[0:64]".
        exclude: sites to leave out, in the same forms.
        dropout: of the branch's input alone, in training: the probability with which an element is zeroed.
        rslora: s = alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732).
        rank_pattern: {regular expression: rank} for single sites; the first that matches the end of a name wins.
        alpha_pattern: the same for alpha.
        trainable: names of base modules to copy, train whole and save with the adapter, such as a classifier head.
        init: how A is drawn: "gaussian", or "kaiming" (uniform, a = sqrt(5), PEFT's way).
        dtype: of A and B; by default float32 for a float16 or bfloat16 weight, and the weight's own otherwise.
        rounding: whether Python that needs an adapted float16 or bfloat16 weight as a whole, and not in a product, may
            get W + s B A rounded to it, which loses most of a small adapter; by default that is an error.
        share_dropout: let branches that are computed together drop out the same elements, which costs less.
        adapter: the name of this adapter.
        group: compute linear calls that share an input (query, key, value; gate, up) together, which is faster.

    Raises:
        NoSiteError: a pattern matches nothing. ConfigError: a setting is out of its range.
        UnsupportedModelError: the model is wrapped, compiled, patched, lazy, or adapted by another library.

    Example:
        >>> import torch, lorafx
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> adapted = lorafx.inject(model, rank=2)
        >>> [name for name, _ in lorafx.named_parameters(adapted)]
        ['0.lora.default.A', '0.lora.default.B']
        >>> x = torch.randn(3, 4)
        >>> torch.equal(adapted(x), model(x))
        True
    """
    config = LoRAConfig(rank, alpha, targets, exclude, dropout, rslora, rank_pattern or {}, alpha_pattern or {},
                        tuple(as_list(trainable)), init, dtype, rounding, share_dropout)
    check_name(adapter)
    check_model(model)
    twin = share(model)
    program = read_program(twin)
    made = create(twin, program, adapter, config)
    start(twin, program, group)
    attach(twin, program, made)
    activate(twin, adapter)
    return twin


def sites(model: nn.Module, targets: Any = "linear") -> list[Site]:
    """The sites that `inject` would adapt for these targets: a dry run that changes nothing.

    Raises:
        NoSiteError: a pattern matches nothing.

    Example:
        >>> import torch, lorafx
        >>> [site] = lorafx.sites(torch.nn.Sequential(torch.nn.Linear(3, 5)))
        >>> site.name, site.in_features, site.out_features, site.kind
        ('0', 3, 5, 'linear')
    """
    if find_injection(model) is None:
        check_model(model)
    program = read_program(model)
    return select(program.sites, targets, (), program.left_alone)


@torch.inference_mode(False)
def add(model: nn.Module, adapter: str, rank: int = 8, *, targets: Any = None, **config: Any) -> None:
    """Give an injected model another adapter, inactive until `activate`: on the sites it has, or on its own targets.

    Args:
        model: an injected model; changed in place.
        adapter: the new adapter's name.
        rank, targets, config: as for `lorafx.inject`; `targets=None` means the sites that have a branch already.

    Raises:
        AdapterError: the name is taken. NoSiteError, ConfigError: as for `inject`.

    Example:
        >>> import torch, lorafx
        >>> model = lorafx.inject(torch.nn.Linear(4, 4))
        >>> lorafx.add(model, "other", rank=2)
        >>> lorafx.adapters(model)
        ['default', 'other']
    """
    check_new_name(model, adapter)
    unknown = config.keys() - {field.name for field in dataclasses.fields(LoRAConfig)}
    if unknown:
        raise TypeError(f"lorafx.add takes no argument '{min(unknown)}'; it takes those of lorafx.inject.")
    here = branches(model)
    settings = LoRAConfig(rank, targets=(lambda site: site.name in here) if targets is None else targets,
                          **{**config, "trainable": tuple(as_list(config.get("trainable")))})
    program = read_program(model)
    attach(model, program, create(model, program, adapter, settings))


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
        self.config = config

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """The injected module; the given one is not touched."""
        return PassResult(inject(graph_module, **self.config), True)


class MergeLoRA(PassBase):
    """`merge` as a pass for torch's PassManager; takes the same arguments.

    Example:
        >>> import lorafx
        >>> lorafx.MergeLoRA("default", untie=True).untie
        True
    """

    def __init__(
        self, adapters: str | Iterable[str] | Mapping[str, float] | None = None, *, untie: bool = False
    ) -> None:
        self.adapters = adapters
        self.untie = untie

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """The merged module; the given one is not touched."""
        return PassResult(merge(graph_module, self.adapters, untie=self.untie), True)
