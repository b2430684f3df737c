"""What counts as a linear call, y = x W^T + b, in a graph; and which sites a user means. Reads graphs, writes none."""

import dataclasses
import difflib
import fnmatch
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ._errors import ConfigError, NoSiteError


@dataclasses.dataclass(frozen=True)
class Rule:
    """One way of writing a linear call: a function or method whose arguments, in order, are named in `signature`.

    `transposed` means that the weight argument is (in, out), y = x W, and not (out, in), y = x W^T.
    """

    kind: str
    target: Callable[..., Any] | str
    signature: tuple[str, ...]
    transposed: bool = False


_LINEAR = ("input", "weight", "bias")
_PRODUCT = ("input", "weight")
RULES: dict[Any, Rule] = {rule.target: rule for rule in (
    Rule("linear", F.linear, _LINEAR),
    Rule("addmm", torch.addmm, ("bias", "input", "weight"), transposed=True),
    Rule("matmul", torch.matmul, _PRODUCT, transposed=True),
    Rule("matmul", operator.matmul, _PRODUCT, transposed=True),
    Rule("matmul", "matmul", _PRODUCT, transposed=True),
    Rule("mm", torch.mm, _PRODUCT, transposed=True),
    Rule("mm", "mm", _PRODUCT, transposed=True),
    Rule("aten.linear", torch.ops.aten.linear.default, _LINEAR),
    Rule("aten.addmm", torch.ops.aten.addmm.default, ("bias", "input", "weight"), transposed=True),
    Rule("aten.matmul", torch.ops.aten.matmul.default, _PRODUCT, transposed=True),
    Rule("aten.mm", torch.ops.aten.mm.default, _PRODUCT, transposed=True),
)}
# The names that torch gives some of these arguments.
_SPELLINGS = {"mat1": "input", "mat2": "weight", "other": "weight"}

# Ways of transposing a matrix: {target: the other arguments with which it does, as a set of alternatives}.
_SWAPS = ((0, 1), (1, 0), (-1, -2), (-2, -1))
TRANSPOSES: dict[Any, tuple[tuple[Any, ...], ...]] = {
    getattr: (("T",), ("mT",)), "t": ((),), torch.t: ((),), torch.ops.aten.t.default: ((),),
    "transpose": _SWAPS, torch.transpose: _SWAPS, torch.ops.aten.transpose.int: _SWAPS,
    "permute": ((1, 0), ((1, 0),)), torch.permute: (((1, 0),),), torch.ops.aten.permute.default: (([1, 0],),),
}


@dataclasses.dataclass(frozen=True)
class Call:
    """A call site: the node that computes x W^T + b in the graph of the region at this path.

    The weight is the tensor `attribute` of the module at `owner`, a path below the region. In a caller's GraphModule
    the node may be a `call_module` of a module whose forward is one linear call of its only input.
    """

    region: str
    owner: str
    attribute: str
    node: fx.Node = dataclasses.field(repr=False)
    transposed: bool = False  # whether the weight is (in, out) here, y = x W

    @property
    def input(self) -> fx.Node:
        """The node of x, as the graph stands now."""
        call = linear_call(self.node)
        value = call.input if call is not None else (*self.node.args, *self.node.kwargs.values())[0]
        assert isinstance(value, fx.Node)
        return value

    def __str__(self) -> str:
        return f"{self.region or '(the model)'}: {self.node.name}"


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """One weight matrix used by linear calls, under the name of the module that owns it.

    The weight is stored as (out, in), or as (in, out) if `transposed`, which is when all of its calls compute x W.
    `aliases` are the other names of the same weight that linear calls go through and that share the branch;
    `tied_to` names other owners of the weight, such as an embedding; `read_by` says what else reads it through the
    site's own module.
    """

    name: str
    in_features: int
    out_features: int
    kind: str
    calls: tuple[Call, ...]
    transposed: bool = False
    aliases: tuple[str, ...] = ()
    tied_to: tuple[str, ...] = ()
    read_by: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All names that mean this site."""
        return self.name, *self.aliases


@dataclasses.dataclass(frozen=True)
class LinearCall:
    """The parts of a node that computes x W^T + b, or x W + b if `transposed`; `weight` is the node of W itself."""

    rule: Rule
    input: fx.Node
    weight: fx.Node
    transposed: bool


def linear_call(node: fx.Node) -> LinearCall | None:
    """The linear call that this node makes, or None."""
    rule = RULES.get(node.target) if node.op in ("call_function", "call_method") else None
    if rule is None or isinstance(rule.target, str) != (node.op == "call_method"):
        return None
    arguments = dict(zip(rule.signature, node.args))
    arguments |= {_SPELLINGS.get(name, name): value for name, value in node.kwargs.items()}
    x, weight = arguments.get("input"), arguments.get("weight")
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or not arguments.keys() <= set(rule.signature):
        return None
    if rule.transposed and _untransposed(x)[0].op == "get_attr":
        return None  # a product of two tensors of the module makes a weight; it is no call on an input
    matrix, swapped = _untransposed(weight)
    return LinearCall(rule, x, matrix, rule.transposed != swapped)


def _untransposed(node: fx.Node) -> tuple[fx.Node, bool]:
    """The node of the matrix that this one is a transpose of, if it is, and whether it is."""
    swapped = False
    while is_transpose(node):
        node, swapped = node.all_input_nodes[0], not swapped
    return node, swapped


def is_transpose(node: fx.Node) -> bool:
    """Whether this node is the transpose of its first argument, taken as a matrix."""
    return node.args[1:] in TRANSPOSES.get(node.target, ())


# Reading rows of a matrix is no linear call of it, and may go on beside one: a tied embedding and head.
LOOKUPS = frozenset({F.embedding, F.embedding_bag, torch.ops.aten.embedding.default})
# Reading these of a tensor computes nothing with its values.
METADATA = frozenset("""dtype device shape size ndim dim numel layout stride element_size is_contiguous requires_grad
    is_meta is_cuda is_cpu new_zeros new_ones new_empty new_full new_tensor""".split())


def only_metadata(node: fx.Node) -> bool:
    """Whether this node asks its first argument for its shape, dtype or the like, and nothing more."""
    return node.args[1] in METADATA if node.target is getattr else node.op == "call_method" and node.target in METADATA


SELECTORS: dict[str, Callable[[Site], bool]] = {
    "square": lambda site: site.in_features == site.out_features,
    "linear": lambda site: True,
}


def select(sites: Sequence[Site], targets: Any, exclude: Any, left_alone: Mapping[str, str]) -> list[Site]:
    """The sites that `targets` names and `exclude` does not; every pattern of both must match something.

    `left_alone` says of the names that are no sites why they are not, for the error messages.
    """
    chosen = set(_matched(sites, targets, "targets", left_alone))
    dropped = set(_matched(sites, exclude, "exclude", left_alone))
    left = [site for site in sites if site in chosen and site not in dropped]
    if not left:
        raise NoSiteError(f"No linear call is left to adapt: targets={targets!r}, exclude={exclude!r}. {_hint(sites)}")
    return left


def _matched(sites: Sequence[Site], patterns: Any, argument: str, left_alone: Mapping[str, str]) -> list[Site]:
    found: list[Site] = []
    for pattern in as_list(patterns):
        test = _predicate(pattern, argument)
        matched = [site for site in sites if test(site)]
        if not matched:
            why = _hint(sites, pattern, left_alone)
            raise NoSiteError(f"No linear call matches {argument}={_shown(pattern)}. {why}")
        found += matched
    return found


def as_list(patterns: Any) -> list[Any]:
    """One pattern or several, as a list; None is none."""
    if patterns is None:
        return []
    return list(patterns) if isinstance(patterns, (list, tuple, set, frozenset)) else [patterns]


def _predicate(pattern: Any, argument: str) -> Callable[[Site], bool]:
    if isinstance(pattern, str):
        return SELECTORS.get(pattern) or (lambda site: any(name_matches(pattern, name) for name in site.names))
    if isinstance(pattern, re.Pattern):
        return lambda site: any(pattern.fullmatch(name) for name in site.names)
    if callable(pattern) and not isinstance(pattern, type):
        return lambda site: bool(pattern(site))
    raise ConfigError(f"{argument} takes names, globs, compiled regular expressions or a function of a Site, "
                      f"not {pattern!r}.")


def name_matches(pattern: str, name: str) -> bool:
    """Whether a pattern is this dotted name, a dotted suffix of it, or a glob that fits it."""
    return name == pattern or name.endswith("." + pattern) or fnmatch.fnmatchcase(name, pattern)


def _hint(sites: Sequence[Site], pattern: Any = None, left_alone: Mapping[str, str] = MappingProxyType({})) -> str:
    """What the model has instead: why the name meant is no site, or the nearest sites, or what stands in their way."""
    named = isinstance(pattern, str)
    reasons = {name: why for name, why in left_alone.items() if named and name_matches(pattern, name)}
    if not reasons and not sites:
        reasons = dict(left_alone)
    if reasons:
        name, reason = next(iter(reasons.items()))
        return f"{name!r} cannot be adapted: {reason}."
    if not sites:
        return "This model makes no linear call on a weight of its own."
    names = near(pattern, [name for site in sites for name in site.names])
    count = f"{len(sites)} site" + "s" * (len(sites) > 1)
    return f"This model has {count}, such as {names}. lorafx.sites(model) lists them."


def near(pattern: Any, names: Iterable[str], count: int = 3) -> str:
    """The names most like the pattern, by their last parts too, quoted; the first ones where none is alike."""
    names = list(dict.fromkeys(names))
    found: list[str] = []
    if isinstance(pattern, str):
        last = pattern.rpartition(".")[2]
        by_last: dict[str, str] = {}
        for name in names:
            by_last.setdefault(name.rpartition(".")[2], name)
        found = difflib.get_close_matches(pattern, names, count)
        found += [by_last[part] for part in difflib.get_close_matches(last, by_last, count)]
        found = list(dict.fromkeys(found))
    return ", ".join(map(repr, (found or names)[:count]))


def _shown(pattern: Any) -> str:
    return repr(pattern.pattern if isinstance(pattern, re.Pattern) else pattern)
