"""The modules that hold adapters inside a model, and what its Python reads of a weight beside which they stand."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from ._adapter import INITS, LoRAConfig, Pair, join
from ._kernels import Addend, add_branch, transforming
from ._sites import Site, split_block
from ._weight import NARROW, AdaptedWeight, Part, whole


class Own(nn.Module):
    """A module that lorafx added to the model, no part of the program that the user wrote."""


class Factors(Own):
    """One adapter at one site: A (rank, in), B (out, rank), scale s; or stacks of A and B, one for each expert.

    `rounding`, `dropout` and `share_dropout` are as in its config.
    """

    def __init__(self, A: Tensor, B: Tensor, scale: float, config: LoRAConfig) -> None:
        super().__init__()
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)
        self.scale = scale
        self.rounding = config.rounding
        self.dropout, self.share_dropout = config.dropout, config.share_dropout

    def extra_repr(self) -> str:
        dropout = f", dropout={self.dropout:g}" if self.dropout else ""
        return f"rank={self.A.shape[-2]}, scale={self.scale:g}{dropout}"

    @property
    def dropping(self) -> float:
        """The probability of dropout now: none in eval."""
        return self.dropout if self.training else 0.0


class Branch(Own):
    """All adapters at one site. Called with the linear call's input and output: y + sum w s (x A^T) B^T.

    The sum runs over the active adapters, w being the weight that `activate` gave each; with none it returns y itself.
    A call of the transposed weight, as a decoder makes that shares its encoder's, is `reverse`: y + sum w s (x B) A.
    At a site that is some rows of a weight, the sum goes to (or, in reverse, x comes from) those features alone.
    """

    def __init__(self, transposed: bool = False, rows: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.transposed, self.rows = transposed, rows  # as in the Site
        self._live: tuple[tuple[str, float], ...] = ()

    def forward(self, x: Tensor, y: Tensor, reverse: bool = False) -> Tensor:
        """x (..., in), y (..., out) -> (..., out); in and out the other way round for `reverse`."""
        if reverse and self.rows is not None:
            x = x.narrow(-1, *self.rows)
        for addend in self.addends():
            if reverse:
                addend = addend._replace(A=addend.B.mT, B=addend.A.mT, start=0)
            y = add_branch(y, x, addend)
        return y

    def addends(self) -> list[Addend]:
        """What the active adapters add to a linear call."""
        start, found = self.rows[0] if self.rows else 0, []
        for name, weight in self._live:
            held: Factors = self._modules[name]  # type: ignore[assignment]
            found.append(Addend(held.A, held.B, weight * held.scale, start, held.dropping, held.share_dropout))
        return found

    def parts(self, live: Mapping[str, float] | None = None) -> list[Part]:
        """What the adapters, the active ones by default, add to the weight as it is stored."""
        found = []
        for name, weight in self._live if live is None else live.items():
            factors = factors_at(self, name)
            if factors is None:
                continue
            start = self.rows[0] if self.rows else 0
            part = Part(factors.B, factors.A, weight * factors.scale, -2, start, factors.rounding, factors.dropping)
            found.append(part.transposed if self.transposed else part)
        return found


class Trained(Own):
    """The parameters of one base module that adapters train whole, a set for each of these adapters.

    `used` names the set that stands in the place of the base's own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.used: str | None = None

    def sets(self) -> dict[str, dict[str, nn.Parameter]]:
        """{adapter: {name: Parameter}}."""
        return {name: module._parameters for name, module in self._modules.items()}  # type: ignore[union-attr, misc]

    def choose(self, live: Iterable[str]) -> str | None:
        """The adapter among these that has a set."""
        return next((name for name in live if name in self._modules), None)


def factors_at(branch: Branch, adapter: str) -> Factors | None:
    """One adapter's factors at a site, or None if it is not there."""
    found = branch._modules.get(adapter)
    return found if isinstance(found, Factors) else None


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The module registered at a path, whatever a property of the same name may say."""
    for name in path.split(".") if path else ():
        found = model._modules[name]
        assert found is not None
        model = found
    return model


def branches_after(region: nn.Module, node: fx.Node) -> list[fx.Node]:
    """The branches that follow a linear call, one after the other."""
    following = [user for user in node.users if user.op == "call_module" and user.args[1:2] == (node,)
                 and isinstance(submodule(region, str(user.target)), Branch)]
    return [following[0], *branches_after(region, following[0])] if following else []


def through_branches(region: nn.Module, node: fx.Node) -> fx.Node:
    """The node itself, or the last of the branches that follow it."""
    return [node, *branches_after(region, node)][-1]


def hooks(module: nn.Module) -> list[Any]:
    """The functions that are hooked to a module's forward and backward."""
    tables = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return [hook for table in tables for hook in table.values()]


def branch_name(attribute: str, block: str = "") -> str:
    """The name of the branch of a module's tensor: `lora` for its weight, `lora_w1` for another, w1, `lora[q]`."""
    return ("lora" if attribute == "weight" else f"lora_{attribute}") + block


def site_name(owner: str, attribute: str) -> str:
    """The name of a site: its owner's path, or the tensor's own where that is not called weight."""
    return owner if attribute == "weight" else join(owner, attribute)


def branches(model: nn.Module) -> dict[str, Branch]:
    """{site: Branch}, each branch once, under its site's first name."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, Branch):
            owner, _, name = path.rpartition(".")
            base, block = split_block(name)
            found[site_name(owner, "weight" if base == "lora" else base.removeprefix("lora_")) + block] = module
    return found


def users_modules(model: nn.Module) -> dict[str, nn.Module]:
    """{path: module} of all that lorafx did not add, under every name."""
    return {path: module for path, module in model.named_modules(remove_duplicate=False) if not isinstance(module, Own)}


def tensor_names(module: nn.Module) -> list[str]:
    """The attributes of a module that hold a tensor."""
    computed = list(module.parametrizations) if parametrize.is_parametrized(module) else []  # type: ignore[arg-type]
    plain = [name for name, value in vars(module).items() if isinstance(value, Tensor)]
    tensors = [name for name, value in (*module._parameters.items(), *module._buffers.items()) if value is not None]
    return [*tensors, *computed, *plain]


FROZEN_PREFIX = "frozen_"


def adapted_names(owner: nn.Module) -> tuple[str, ...]:
    """The attributes of which Python reads adapted tensors at this module."""
    names: tuple[str, ...] = getattr(type(owner), "_adapted", ())
    return names


def thawed(owner: nn.Module, attribute: str) -> str:
    """The name of the tensor that an attribute reads: `weight` for the `frozen_weight` of an adapted module."""
    name = attribute.removeprefix(FROZEN_PREFIX)
    return name if name in adapted_names(owner) else attribute


def frozen(owner: nn.Module, attribute: str) -> Any:
    """What a module has under this name without adapters: W."""
    for table in (owner._parameters, owner._buffers, vars(owner)):
        if attribute in table:
            return table[attribute]
    cls = getattr(type(owner), "_user_class", type(owner))
    return getattr(cls, attribute).__get__(owner)  # a parametrization's property


def chosen(owner: nn.Module, attribute: str) -> Any:
    """W, or what an active adapter that trains the module whole has in its place."""
    held = owner._modules.get("trained")
    if isinstance(held, Trained) and held.used is not None:
        tensors = held._modules[held.used]._parameters  # type: ignore[union-attr]
        if attribute in tensors:
            return tensors[attribute]
    return frozen(owner, attribute)


def adapted(owner: nn.Module, attribute: str) -> Tensor:
    """What Python reads of a module under this name: W + sum s B A, over the active adapters at its sites.

    It is an `AdaptedWeight`, or the sum itself where no subclass of Tensor can go: in functions that are being
    compiled, transformed or differentiated forward, and in the layers of torch that would not take their fused paths
    with one.
    """
    matrix = chosen(owner, attribute)
    name = branch_name(attribute)
    parts: list[Part] = []
    for key, module in owner._modules.items():
        if key.partition("[")[0] == name and isinstance(module, Branch):
            parts += module.parts()
    if not parts:
        return matrix  # type: ignore[no-any-return]
    compiling, make = torch.compiler.is_compiling(), AdaptedWeight.of
    in_parts = matrix.dtype in NARROW or any(part.dropout for part in parts)
    if not in_parts and (compiling or transforming() or (
            sys._getframe(2).f_globals.get("__name__") in _FUSED and not _needs_grad(parts))):
        return whole(matrix, parts)
    if compiling:  # the compiler cannot make the tensor: its graph ends here
        make = torch.compiler.disable(  # type: ignore[no-untyped-call]
            make, reason="Python reads an adapted weight of a narrow dtype, or with dropout")
    return make(matrix, parts, f"the {attribute} of a {type(owner).__name__}")


# Layers of torch that read their children's weights for a fused kernel, and ask for plain tensors.
_FUSED = ("torch.nn.modules.activation", "torch.nn.modules.transformer")


def _needs_grad(parts: list[Part]) -> bool:
    return torch.is_grad_enabled() and any(part.left.requires_grad or part.right.requires_grad for part in parts)


def factor_dtype(config: LoRAConfig, weight: Tensor) -> torch.dtype:
    """The dtype of A and B at a weight: the config's, else float32 for a narrower weight, else the weight's own."""
    return config.dtype or torch.promote_types(weight.dtype, torch.float32)


def new_pair(config: LoRAConfig, site: Site, weight: Tensor) -> Pair:
    """Fresh A (rank, in), drawn from torch's default generator, and B (out, rank), zero, for one site's weight.

    A stack of experts has stacks of both, (experts, rank, in) and (experts, out, rank).
    """
    rank, dtype = config.site_rank(site.name), factor_dtype(config, weight)
    stack = () if site.experts is None else (site.experts,)
    A = torch.empty(*stack, rank, site.in_features, dtype=dtype, device=weight.device)
    B = torch.zeros(*stack, site.out_features, rank, dtype=dtype, device=weight.device)
    if A.numel() and not A.is_meta:
        INITS[config.init](A)
    return Pair(A, B, config.site_scale(site.name))
