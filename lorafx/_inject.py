"""The pass and its two ways in and out: `inject` and `add` make an adapter, `load` and `save` read and write one."""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from . import _formats
from ._adapter import LoRAConfig, check_name
from ._attach import attach, check_free, create, start
from ._branch import branches
from ._fit import fingerprint, fit
from ._guard import check_model
from ._merge import merge
from ._program import read
from ._record import find_injection
from ._region import share
from ._resume import capture, only_active
from ._sites import Site, as_list, select
from ._switch import activate, extract

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
    program = read(twin)
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
    program = read(model)
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
    check_free(model, adapter)
    unknown = config.keys() - {field.name for field in dataclasses.fields(LoRAConfig)}
    if unknown:
        raise TypeError(f"lorafx.add takes no argument '{min(unknown)}'; it takes those of lorafx.inject.")
    here = branches(model)
    settings = LoRAConfig(rank, targets=(lambda site: site.name in here) if targets is None else targets,
                          **{**config, "trainable": tuple(as_list(config.get("trainable")))})
    program = read(model)
    attach(model, program, create(model, program, adapter, settings))


@torch.inference_mode(False)
def load(
    model: M, path: str | os.PathLike[str], adapter: str | None = None, *, allow_nonfinite: bool = False
) -> M:
    """The model with the adapter in a file; the format is known by the path's ending.

    A model without branches is left as it is and a new, injected one is returned, with the adapter active. An injected
    model gets the adapter added, inactive until `activate`, and is itself returned. Nothing changes on failure.

    Args:
        model: a base model, or an injected one.
        path: a file written by `lorafx.save`, MiniMind (.pth), kohya-ss or diffusers (.safetensors), or a folder
            written by PEFT.
        adapter: the name to give it, by default the one in the file; of a folder's several adapters, which one.
        allow_nonfinite: whether A, B and trained weights may hold NaN and infinity, which are otherwise an error.

    Raises:
        FormatError: the file is missing or damaged. MismatchError: it was made for another model.
        AdapterError: the model holds an adapter of that name.

    Example:
        >>> import tempfile, torch, lorafx
        >>> base = torch.nn.Linear(4, 4)
        >>> path = tempfile.mkdtemp() + "/adapter.safetensors"
        >>> lorafx.save(lorafx.inject(base), path)
        >>> lorafx.adapters(lorafx.load(base, path))
        ['default']
    """
    found, made_for = _formats.read(path, adapter, model, allow_nonfinite)
    found = dataclasses.replace(found, name=found.name if adapter is None else adapter)
    check_name(found.name)
    fresh = find_injection(model) is None
    if fresh:
        check_model(model)
    else:
        check_free(model, found.name)
    twin = share(model) if fresh else model
    program = read(twin)
    fitted = fit(twin, program, found, f"'{os.fspath(path)}'", made_for)
    if fresh:
        start(twin, program)
    attach(twin, program, fitted)
    if fresh:
        activate(twin, found.name)
    return twin


def save(
    model: nn.Module, path: str | os.PathLike[str], adapter: str | None = None, *,
    optimizer: torch.optim.Optimizer | None = None, step: int | None = None,
) -> None:
    """Write one adapter, and nothing of the base, to a file; all of it or nothing, whatever happens on the way.

    Args:
        model: an injected model.
        path: its ending says the format: `.safetensors` (lorafx's own, all of the adapter), `.pth` / `.pt`
            (MiniMind's: float16, the scale folded into B), or none: PEFT's folder. Missing folders are made.
        adapter: which one; by default the only active one.
        optimizer, step: of a training run that `lorafx.resume` shall continue, kept with the states of the random
            generators beside the adapter; only lorafx's own format has a place for them.

    Raises:
        FormatError: no such format, or the format cannot hold this. AdapterError: unknown, or not the only one.
        ConfigError: the optimizer has other parameters than this adapter's. OSError: the disk failed.

    Example:
        >>> import tempfile, torch, lorafx
        >>> lorafx.save(lorafx.inject(torch.nn.Linear(4, 4)), tempfile.mkdtemp() + "/out/lora/demo_4.pth")
    """
    adapter = only_active(model, adapter, "save writes one adapter")
    found = extract(model, adapter)
    if optimizer is not None or step is not None:
        found = dataclasses.replace(found, training=capture(model, adapter, optimizer, step))
    _formats.write(found, path, model, fingerprint(read(model)))


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
