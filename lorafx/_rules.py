"""What counts as a linear call, y = x W^T + b, in a graph; and which sites a user means. Reads graphs, writes none."""

import dataclasses
import difflib
import fnmatch
import inspect
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

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

    def operands(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """The input and the weight among the arguments of a call; None, None if it has arguments of other names."""
        given = dict(zip(self.signature, args)) | {_SPELLINGS.get(name, name): kwargs[name] for name in kwargs}
        if not given.keys() <= set(self.signature) or len(args) > len(self.signature):
            return None, None
        return given.get("input"), given.get("weight")


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
    Rule("bmm", torch.bmm, _PRODUCT, transposed=True),
    Rule("bmm", "bmm", _PRODUCT, transposed=True),
    Rule("baddbmm", torch.baddbmm, ("bias", "input", "weight"), transposed=True),
    Rule("aten.linear", torch.ops.aten.linear.default, _LINEAR),
    Rule("aten.addmm", torch.ops.aten.addmm.default, ("bias", "input", "weight"), transposed=True),
    Rule("aten.matmul", torch.ops.aten.matmul.default, _PRODUCT, transposed=True),
    Rule("aten.mm", torch.ops.aten.mm.default, _PRODUCT, transposed=True),
)}


class Role(NamedTuple):
    """What an argument of a function is to it: a weight, (in, out) if `transposed`, perhaps of several equal blocks of
    rows that are weights by themselves."""

    transposed: bool = False
    blocks: tuple[str, ...] = ()


# Functions that make linear calls of no rule: {function: {argument that is a weight: Role}}.
COMPOSITES: dict[Any, dict[str, Role]] = {
    F.multi_head_attention_forward: {
        "in_proj_weight": Role(blocks=("q", "k", "v")), "q_proj_weight": Role(), "k_proj_weight": Role(),
        "v_proj_weight": Role(), "out_proj_weight": Role()},
    F.grouped_mm: {"mat_b": Role(transposed=True)},
}


def roles(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[Any, Role]]:
    """(argument, Role) of each weight among the arguments of a call."""
    if function in COMPOSITES:
        given = {**dict(zip(inspect.signature(function).parameters, args)), **kwargs}
        yield from ((given[name], role) for name, role in COMPOSITES[function].items() if name in given)


# The names that torch gives some of these arguments.
_SPELLINGS = {"mat1": "input", "mat2": "weight", "other": "weight", "batch1": "input", "batch2": "weight"}

# Ways of transposing a matrix: {target: the other arguments with which it does, as a set of alternatives}.
_SWAPS = ((0, 1), (1, 0), (-1, -2), (-2, -1))
TRANSPOSES: dict[Any, tuple[tuple[Any, ...], ...]] = {
    getattr: (("T",), ("mT",)), "t": ((),), torch.t: ((),), torch.ops.aten.t.default: ((),),
    "transpose": _SWAPS, torch.transpose: _SWAPS, torch.ops.aten.transpose.int: _SWAPS,
    "permute": ((1, 0), ((1, 0),)), torch.permute: (((1, 0),),), torch.ops.aten.permute.default: (([1, 0],),),
}
SWAPS_BY_NAME = frozenset({"T", "mT", "t", "transpose", "permute", "swapaxes"})  # where only the name is known


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
    `tied_to` names other owners of the weight, such as an embedding. `kind` is the kind of its first linear call, or
    "weight" if no graph makes one: then Python does, and reads W + s B A. A stack of `experts` weights, (experts, out,
    in), has a branch an expert. `rows` are the first and the number of the rows of W that the site is, if not all;
    `blocks` names blocks of rows that may be sites by themselves, `name[block]`.
    """

    name: str
    in_features: int
    out_features: int
    kind: str
    calls: tuple[Call, ...]
    transposed: bool = False
    aliases: tuple[str, ...] = ()
    tied_to: tuple[str, ...] = ()
    experts: int | None = None
    rows: tuple[int, int] | None = None
    blocks: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """All names that mean this site."""
        return self.name, *self.aliases

    def block(self, key: str) -> "Site | None":
        """The site of some rows of this one's weight: a named block, `q`, or rows [start, stop), `0:64`."""
        rows = self.blocks.get(key)
        match = re.fullmatch(r"(\d+):(\d+)", key)
        if rows is None and match and int(match[1]) < int(match[2]) <= self.out_features:
            rows = int(match[1]), int(match[2]) - int(match[1])
            key = next((name for name, block in self.blocks.items() if block == rows), key)
        if rows is None or self.rows is not None:
            return None
        names = [f"{name}[{key}]" for name in self.names]
        return dataclasses.replace(self, name=names[0], aliases=tuple(names[1:]), out_features=rows[1], rows=rows,
                                   blocks={})


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
    x, weight = rule.operands(node.args, node.kwargs)
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node):
        return None
    if rule.transposed and untransposed(x)[0].op == "get_attr":
        return None  # with a matrix on the left there is no row of inputs
    matrix, swapped = untransposed(weight)
    return LinearCall(rule, x, matrix, rule.transposed != swapped)


def untransposed(node: fx.Node) -> tuple[fx.Node, bool]:
    """The node of the matrix that this one is a transpose of, if it is, and whether it is."""
    swapped = False
    while is_transpose(node):
        node, swapped = node.all_input_nodes[0], not swapped
    return node, swapped


def is_transpose(node: fx.Node) -> bool:
    """Whether this node is the transpose of its first argument, taken as a matrix."""
    return node.args[1:] in TRANSPOSES.get(node.target, ())


def readers_of(node: fx.Node, path: tuple[fx.Node, ...] = ()) -> Iterator[tuple[tuple[fx.Node, ...], fx.Node]]:
    """What uses a matrix, each with the transposes through which it does."""
    for user in node.users:
        if is_transpose(user):
            yield from readers_of(user, (*path, user))
        else:
            yield path, user


def blocks_of(node: fx.Node, width: int) -> dict[str, tuple[int, int]]:
    """The blocks into which a graph splits the last dimension of a value, {name: (start, length)}: by chunk and split.

    A block goes by the name of the variable to which forward assigns it, and by its number.
    """
    found = {}
    for user in node.users:
        lengths = _lengths(user, width)
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        for item in [item for part in user.users for item in (part, *part.users)] if lengths else ():
            if item.target is operator.getitem and isinstance(item.args[1], int):
                at = range(len(lengths))[item.args[1]]
                name = re.sub(r"_\d+$", "", item.name)
                found[name if name != "getitem" else str(at)] = starts[at], lengths[at]
        blocks = {str(i): block for i, block in enumerate(zip(starts, lengths))}
        found |= {name: block for name, block in blocks.items() if block not in found.values()}
    return found


def _lengths(node: fx.Node, width: int) -> list[int]:
    """The lengths of the parts into which this node cuts its first argument's last dimension, [] if it does not."""
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    size = node.args[1] if node.args[1:] else node.kwargs.get("chunks", node.kwargs.get("split_size", 0))
    dim = node.args[2] if node.args[2:] else node.kwargs.get("dim", 0)
    if name not in ("chunk", "split") or dim != -1 or not size:
        return []
    if isinstance(size, int):
        step = -(-width // size) if name == "chunk" else size
        return [min(step, width - start) for start in range(0, width, step)]
    sizes = list(size) if isinstance(size, (list, tuple)) else []
    return sizes if all(isinstance(length, int) for length in sizes) and sum(sizes) == width else []


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
    chosen = {site.name: site for site in _matched(sites, targets, "targets", left_alone)}
    dropped = {site.name for site in _matched(sites, exclude, "exclude", left_alone)}
    order = {site.name: position for position, site in enumerate(sites)}
    left = [site for name, site in chosen.items() if name not in dropped]
    left.sort(key=lambda site: order.get(site.name, order.get(site.name.rpartition("[")[0], -1)))
    if not left:
        raise NoSiteError(f"No linear call is left to adapt: targets={targets!r}, exclude={exclude!r}. {_hint(sites)}")
    return left


def blocks_matching(sites: Iterable[Site], pattern: Any) -> list[Site]:
    """The blocks of rows that a pattern such as `qkv[q]` or `*.qkv[0:64]` means."""
    match = re.fullmatch(r"(.*)\[([^\[\]]+)\]", pattern) if isinstance(pattern, str) else None
    if match is None:
        return []
    found = [site.block(match[2]) for site in sites if any(name_matches(match[1], name) for name in site.names)]
    return [block for block in found if block is not None]


def _matched(sites: Sequence[Site], patterns: Any, argument: str, left_alone: Mapping[str, str]) -> list[Site]:
    found: list[Site] = []
    for pattern in as_list(patterns):
        test = _predicate(pattern, argument)
        matched = [site for site in sites if test(site)] or blocks_matching(sites, pattern)
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
