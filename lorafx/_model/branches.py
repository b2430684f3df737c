"""The modules that hold adapters beside linear calls: branches, of one adapter's factors each."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from .._adapter.adapter import Pair
from .._adapter.config import INITS, LoRAConfig, factor_dtype
from .._adapter.names import site_name, split_block
from .._graph.modules import LorafxModule, named_modules, submodule
from .._graph.sites import Site
from .._kernels.addend import Addend
from .._kernels.again import Proven
from .._kernels.compiling import Anew, is_compiling
from .._kernels.gates import gates_of
from .choice import Choice, Selection
from .factors import Factors
from .shards import is_sharded
from .stacks import Stack, is_copied, stack_of


class Branch(LorafxModule):
    """All adapters at one site: given a linear call's x and y, it is y + sum w s (x A^T) B^T.

    The sum runs over the active adapters, w being the weight that `activate` gave each; with none
    it returns y itself. A call of the transposed weight, as a decoder makes that shares its
    encoder's, is `reverse`: y + sum w s (x B) A. At a site that is some rows of a weight, the sum
    goes to (or, in reverse, x comes from) those features only.
    """

    proven: Proven | None = None  # of x at this site; None: it is kept for the backward pass
    like: tuple[Tensor, Tensor] | None = None  # A and B of no rank, for what others are like here

    def __init__(
        self, choice: Choice, transposed: bool = False, rows: tuple[int, int] | None = None,
        guesses: Iterable[float] | None = None,
    ) -> None:
        super().__init__()
        self.choice, self.transposed, self.rows = choice, transposed, rows  # as in the Site
        self.proven = None if guesses is None else Proven(guesses)
        self._nothing: tuple[Tensor, Tensor] | None = None

    def _changed(self) -> None:
        super()._changed()
        self.__dict__.pop("products", None)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "products"}

    def forward(self, x: Tensor, y: Tensor, reverse: bool = False) -> Tensor:
        """x (..., in), y (..., out) -> (..., out); in and out the other way round for `reverse`."""
        for addend in self.addends(y):
            if reverse:
                addend = addend.transposed
            y = addend.add_to_output(y, x)
        return y

    def addends(
        self, beside: Tensor | None, weights: Mapping[str, float] | None = None,
        stored: bool = False,
    ) -> list[Addend]:
        """Return what adapters add to W (out, in): the active, or those of {adapter: weight} here.

        They have values, unless the tensor `beside` them, such as W, has none either. `stored`
        means W as the model stores it, which is (in, out) at a transposed site.
        """
        found = self._addends(beside, weights)
        return [a.transposed for a in found] if stored and self.transposed else found

    def _addends(
        self, beside: Tensor | None, weights: Mapping[str, float] | None
    ) -> list[Addend]:
        rows = selection = None
        if weights is None:
            compiling = is_compiling()
            stack = self.stack if compiling and not is_sharded(beside) else None
            if stack is None:
                selection = self.choice.now
                weights, rows = selection.weights, selection.rows
                if rows is not None and not compiling:
                    stack = stack_of(self, selection, compiled=False)
            if stack is not None:
                A, B, gate, rates, rounding = stack
                return [Addend(B, A, 1.0, -2, self._start, rounding=rounding, proven=self.proven,
                               rates=rates, gates=gate)]
        found = []
        for name, weight in (weights or {}).items():
            factors: Any = (self._modules.get(name) if selection is None
                            else selection.held(self, name))
            if factors is None:
                continue
            A, B = factors.tensors()
            if factors.missing:
                factors.check((A, B), beside, "computing with it")
            scale, gate = factors.scale, None
            if rows is None:
                scale *= weight
            else:
                gate = gates_of([row.get(name, 0.0) for row in rows], A)
            found.append(Addend(
                B, A, scale, -2, self._start, factors.dropping, factors.share_dropout,
                factors.rounding, self.proven, gates=gate))
        return found

    @property
    def _start(self) -> int:
        return self.rows[0] if self.rows else 0

    def any_factors(self) -> Factors | None:
        """Those of any adapter, which tell what others are like."""
        held = tuple(self._modules.values())  # to which another thread may add
        return next((factors for factors in held if isinstance(factors, Factors)), None)

    def needs(self, selection: Selection) -> tuple[bool, bool]:
        """If a gradient may be asked of what stands here for A, and for B, where this is used.

        It is asked at each call of a compiled program, and so of no adapters but these and those
        that train.
        """
        default, used = None, selection.weights
        while default is not self.choice.default:  # what is frozen is so after this has changed
            default = self.choice.default
            active = default.weights
            here = of_A = of_B = False
            for name in active if used is active else {**active, **used}:
                factors = selection.held(self, name) if name in used else self._modules.get(name)
                if factors is not None:
                    A, B = factors._parameters.get("A"), factors._parameters.get("B")
                    of_A = of_A or A is not None and A.requires_grad
                    of_B = of_B or B is not None and B.requires_grad
                    here = here or name in active
        if here:
            return of_A, of_B
        return of_A or self.choice.trains, of_B or self.choice.trains

    def nothing(self) -> tuple[Tensor, Tensor] | None:
        """A and B of two ranks that add nothing; None if nothing tells of shapes."""
        factors, kept = self.any_factors(), self._nothing
        like = self.like if factors is None else (factors.A.detach(), factors.B.detach())
        if like is not None:
            A, B = like
            if kept is None or kept[0].dtype != A.dtype or kept[0].device != A.device:
                *stack, _, width = A.shape
                self._nothing = (A.new_zeros(*stack, 2, width), B.new_zeros(*B.shape[:-1], 2))
        return self._nothing

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.like is not None:
            A, B = self.like
            self.like = fn(A), fn(B)
        return self

    def _compiled_stack(self) -> Stack | None:
        choice = self.choice
        choice.compiled = True
        selection = choice.read()
        read = choice.read_in_call(selection)  # guards and values are read by themselves
        if self in read:
            return read[self]  # type: ignore[no-any-return]
        stack = stack_of(self, selection, compiled=True)
        if not is_copied(self, selection):  # else factors may be written into before the next read
            read[self] = stack
        return stack

    stack: Any = property(Anew(_compiled_stack).__getitem__)  # what compiled programs read


def spread(branch: Branch, weight: Tensor | None) -> None:
    """Spread all factors of a branch over processes as the weight beside it is."""
    if branch.like is not None and weight is not None:
        A, B = (torch.empty_like(factor, device=weight.device) for factor in branch.like)
        branch.like = A, B
    for held in branch._modules.values():
        if isinstance(held, Factors):
            held.spread(weight, branch.transposed, branch.rows is not None)


def factors_at(branch: Branch, adapter: str) -> Factors | None:
    """Return one adapter's factors at a site, or None if it is not there."""
    found = branch._modules.get(adapter)
    return found if isinstance(found, Factors) else None


def branches_after(region: nn.Module, node: fx.Node) -> list[fx.Node]:
    """Return the branches that follow a linear call, one after the other."""
    for user in node.users:
        if user.op == "call_module" and user.args[1:2] == (node,):
            if isinstance(submodule(region, str(user.target)), Branch):
                return [user, *branches_after(region, user)]
    return []


def after_branches(region: nn.Module, node: fx.Node) -> fx.Node:
    """Return the node itself, or the last of the branches that follow it."""
    return [node, *branches_after(region, node)][-1]


def branches(model: nn.Module) -> dict[str, Branch]:
    """Return {site: Branch}, each branch once, under its site's first name."""
    found = {}
    for path, module in named_modules(model):
        if isinstance(module, Branch):
            owner, _, name = path.rpartition(".")
            base, block = split_block(name)
            attribute = "weight" if base == "lora" else base.removeprefix("lora_")
            found[site_name(owner, attribute) + block] = module
    return found


def new_pair(config: LoRAConfig, site: Site, weight: Tensor, device: torch.device) -> Pair:
    """Return a fresh A (rank, in), drawn from torch's default generator, and B (out, rank), zero.

    A stack of experts has stacks of both, (experts, rank, in) and (experts, out, rank).
    """
    A, B = zeros(site, config.site_rank(site.name), factor_dtype(config, weight), device)
    if A.numel() and not A.is_meta:
        INITS[config.init](A)
    return Pair(A, B, config.site_scale(site.name))


def zeros(
    site: Site, rank: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return zeros in the shapes that A and B have at a site."""
    stack = () if site.experts is None else (site.experts,)
    A = torch.zeros(*stack, rank, site.in_features, dtype=dtype, device=device)
    B = torch.zeros(*stack, site.out_features, rank, dtype=dtype, device=device)
    return A, B
