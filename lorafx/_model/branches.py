"""The modules that hold adapters beside linear calls: branches, and the factors in them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from .._adapter.adapter import Pair
from .._adapter.config import INITS, LoRAConfig, factor_dtype
from .._adapter.names import site_name, split_block
from .._errors import AdapterError
from .._graph.dispatched import is_bringing_all, is_offloaded
from .._graph.modules import LorafxModule, is_bare, named_modules, submodule
from .._graph.sites import Site
from .._kernels.addend import Addend
from .._kernels.again import Proven
from .._kernels.gates import gates_of
from .._kernels.private import is_compiling
from .choice import Anew, Choice
from .scaled import Scaled
from .shards import (
    agreed, gathered_for_use, is_sharded, reduced_for_use, spread_beside, spread_evenly, spread_like
)
from .stacks import Stack, stack_of


class Factors(Scaled):
    """One adapter at one site: A (rank, in), B (out, rank) and the scale s; or stacks of A and B.

    A stack has one for each expert. `rounding`, `dropout` and `share_dropout` are as in its config.
    """

    gathers = False  # True: A and B are spread, and nobody else gathers them for forward
    _brought = False  # True: a hook at a module above may put new A and B here for each call

    def __init__(self, A: Tensor, B: Tensor, scale: float, config: LoRAConfig) -> None:
        super().__init__()
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)
        self.shapes = tuple(A.shape), tuple(B.shape)
        self.scale = scale
        self.init, self.rounding = config.init, config.rounding
        self.dropout, self.share_dropout = config.dropout, config.share_dropout
        self.missing = self.new = self.on_meta

    def forward(self) -> tuple[Tensor, Tensor]:
        """A and B, for hooks that put them in place before a module's forward."""
        return self.A, self.B

    def tensors(self) -> tuple[Tensor, Tensor]:
        """A and B, by way of `forward` where something is hooked to it or patches it."""
        bare = is_bare(self)
        if bare:
            held = self._parameters  # which is read in half the time of self.A
            A, B = held.get("A"), held.get("B")
        if not bare or A is None or B is None:
            A, B = self()
        if self._brought or not bare and is_offloaded(self):  # accelerate's are not bare
            for name, tensor in zip("AB", (A, B)):
                refuse_gradients(self, name, tensor)
        if self.gathers:
            return gathered_for_use(A), gathered_for_use(B)
        if type(A) is type(B) is nn.Parameter:
            return A, B
        return reduced_for_use(A), reduced_for_use(B)

    def plain(self) -> tuple[Tensor, Tensor] | None:
        """A and B, or None if there is more to do than to read them, or they may have no values."""
        if self.missing or self.gathers or self._brought or not is_bare(self):
            return None
        A, B = self._parameters.get("A"), self._parameters.get("B")
        if type(A) is not nn.Parameter or type(B) is not nn.Parameter:
            return None
        return None if A.is_inference() or B.is_inference() else (A, B)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if self.new and not self.on_meta:
            self.draw()
        return self

    def reset_parameters(self) -> None:
        """As layers of torch have it, for loops that give what was on meta its first values.

        What came from a file before the base was there is kept.
        """
        if not self.came_first:
            self.draw()

    def named_modules(
        self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """As ever; where accelerate brings all tensors below a module, A and B are among them."""
        if is_bringing_all():
            self._brought = True
        yield from super().named_modules(memo, prefix, remove_duplicate)

    @torch.no_grad()
    def draw(self) -> None:
        """Draw A, from torch's default generator, and set B to zero, as `inject` does."""
        drawn = torch.empty(self.shapes[0], dtype=self.A.dtype, device=self.A.device)
        if drawn.numel() and not drawn.is_meta:
            INITS[self.init](drawn)
            self.A.copy_(spread_like(self.A, drawn))
            self.B.zero_()
            self.missing = self.new = False

    def spread(self, weight: Tensor | None, transposed: bool, rows: bool) -> None:
        """Spread A and B over processes as the weight beside them is.

        Those that came before the weight had values go to its device.
        """
        A: Tensor = self.A
        B: Tensor = self.B
        there = weight is not None and not weight.is_meta
        waits = self.came_first and there and not is_sharded(A)
        if waits and weight is not None and A.device != weight.device:
            A, B = A.detach().to(weight.device), B.detach().to(weight.device)
        A, B = spread_beside(weight, A, B, transposed, rows)
        if A is not self.A:
            trains = self.A.requires_grad
            self.A, self.B = nn.Parameter(A, trains), nn.Parameter(B, trains)

    def agree(self, mesh: Any) -> None:
        """Let A and B, where each process has all of them, be what the first of a mesh has."""
        for factor in (self.A, self.B):
            if not is_sharded(factor) and not factor.is_meta:
                factor.data = agreed(factor.detach(), mesh)

    def spread_apart(self, mesh: Any) -> None:
        """Spread A and B evenly over the processes of a mesh, and gather them at each use."""
        self.A = nn.Parameter(spread_evenly(self.A, mesh), self.A.requires_grad)
        self.B = nn.Parameter(spread_evenly(self.B, mesh), self.B.requires_grad)
        self.gathers = True

    def extra_repr(self) -> str:
        dropout = f", dropout={self.dropout:g}" if self.dropout else ""
        return f"rank={self.shapes[0][-2]}, scale={self.scale:g}{dropout}"

    @property
    def dropping(self) -> float:
        """The probability of dropout now: none in eval."""
        return self.dropout if self.training else 0.0


class Branch(LorafxModule):
    """All adapters at one site: given a linear call's x and y, it is y + sum w s (x A^T) B^T.

    The sum runs over the active adapters, w being the weight that `activate` gave each; with none
    it returns y itself. A call of the transposed weight, as a decoder makes that shares its
    encoder's, is `reverse`: y + sum w s (x B) A. At a site that is some rows of a weight, the sum
    goes to (or, in reverse, x comes from) those features only.
    """

    proven: Proven | None = None  # of x at this site; None: it is kept for the backward pass

    def __init__(
        self, choice: Choice, transposed: bool = False, rows: tuple[int, int] | None = None,
        guesses: Iterable[float] | None = None,
    ) -> None:
        super().__init__()
        self.choice, self.transposed, self.rows = choice, transposed, rows  # as in the Site
        self.proven = None if guesses is None else Proven(guesses)
        self._nothing: tuple[Tensor, Tensor] | None = None

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
        start = self.rows[0] if self.rows else 0
        rows = stack = None
        if weights is None:
            compiling = is_compiling()
            if compiling:
                stack = self.stack
            if stack is None:
                selection = self.choice.now if compiling else self.choice.read()
                weights, rows = selection.weights, selection.rows
                if rows is not None and not compiling:
                    stack = stack_of(self, selection, False)
        if stack is not None:
            B, gates = stack.B, stack.gate if stack.gate.ndim > 1 else None
            left = B * stack.gate if gates is None else B
            return [Addend(left, stack.A, 1.0, -2, start, stack.dropout, stack.share_dropout,
                           stack.rounding, self.proven, gates)]
        found = []
        for name, weight in weights.items():
            factors: Any = self._modules.get(name)
            if factors is None:
                continue
            A, B = factors.tensors()
            if factors.missing:
                factors.check((A, B), beside, "computing with it")
            gates = None if rows is None else gates_of([row.get(name, 0.0) for row in rows], A)
            addend = Addend(B, A, factors.scale * (weight if rows is None else 1.0), -2, start,
                            factors.dropping, factors.share_dropout, factors.rounding, self.proven,
                            gates)
            found.append(addend)
        return found

    def any_factors(self) -> Factors | None:
        """Those of any adapter, which tell what others are like."""
        return next((f for f in self._modules.values() if isinstance(f, Factors)), None)

    def needs(self) -> tuple[bool, bool]:
        """If a gradient may be asked of what stands here for A, and for B."""
        held = [factors for factors in self._modules.values() if isinstance(factors, Factors)]
        if not any(name in self.choice.default.weights for name in self._modules):
            return self.choice.trains, self.choice.trains
        return (any([factors.A.requires_grad for factors in held]),
                any([factors.B.requires_grad for factors in held]))

    def nothing(self) -> tuple[Tensor, Tensor] | None:
        """A and B of two ranks that add nothing; None if no adapter was here that tells of shapes.
        """
        like, kept = self.any_factors(), self._nothing
        if like is not None:
            A, B = like.A.detach(), like.B.detach()
            if kept is None or kept[0].dtype != A.dtype or kept[0].device != A.device:
                *stack, _, width = A.shape
                self._nothing = (A.new_zeros(*stack, 2, width), B.new_zeros(*B.shape[:-1], 2))
        return self._nothing

    def _compiled_stack(self) -> Stack | None:
        return stack_of(self, self.choice.read(), compiled=True)

    stack: Any = property(Anew(_compiled_stack).__getitem__)  # what compiled programs read


def refuse_gradients(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Let a gradient be an error that reaches a tensor which the module then no longer has."""
    def check(gradient: Tensor) -> None:
        if module._parameters[name] is not tensor:
            raise AdapterError(OFFLOADED)

    if tensor.requires_grad and torch.is_grad_enabled():
        tensor.register_hook(check)  # type: ignore[no-untyped-call]


OFFLOADED = (
    "accelerate offloads the A and B of this model, and brings new ones for each call, so that "
    "training would not reach them: dispatch the base model first, and then inject, or load the "
    "adapter.")


def spread(branch: Branch, weight: Tensor | None) -> None:
    """Spread all factors of a branch over processes as the weight beside it is."""
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
    rank, dtype = config.site_rank(site.name), factor_dtype(config, weight)
    stack = () if site.experts is None else (site.experts,)
    A = torch.empty(*stack, rank, site.in_features, dtype=dtype, device=device)
    B = torch.zeros(*stack, site.out_features, rank, dtype=dtype, device=device)
    if A.numel() and not A.is_meta:
        INITS[config.init](A)
    return Pair(A, B, config.site_scale(site.name))
