"""Call sites and sites, and which sites a user means."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import fx

from .._adapter.names import name_matches, near, split_block
from .._errors import ConfigError, NoSiteError
from .rules import linear_call


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


def sort_key(names: Iterable[str]) -> Callable[[Site], int]:
    """Where a site is in the order of these names; a block of rows is where its weight is."""
    order = {name: position for position, name in enumerate(names)}
    return lambda site: order.get(site.name, order.get(split_block(site.name)[0], -1))


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
    left = [site for name, site in chosen.items() if name not in dropped]
    left.sort(key=sort_key(site.name for site in sites))
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


def _shown(pattern: Any) -> str:
    return repr(pattern.pattern if isinstance(pattern, re.Pattern) else pattern)
