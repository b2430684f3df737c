"""Call sites and sites, and which sites a user means."""

import dataclasses
import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias

from torch import fx

from .._adapter.letters import counted
from .._adapter.names import closest_names, name_matches, split_block
from .._errors import ConfigError, NoSiteError
from .rules import linear_call


@dataclasses.dataclass(frozen=True)
class Call:
    """A call site: the node that computes x W^T + b in the graph of the region at this path.

    The weight is the tensor `attribute` of the module at `owner`, a path below the region. In a
    caller's GraphModule the node may be a `call_module` of a module whose forward is one linear
    call of its only input.
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
        arguments = (*self.node.args, *self.node.kwargs.values())
        value = call.input if call is not None else arguments[0]
        assert isinstance(value, fx.Node)
        return value

    def __str__(self) -> str:
        return f"{self.region or '(the model)'}: {self.node.name}"


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """One weight matrix used by linear calls, under the name of the module that owns it.

    `lorafx.sites` returns them, and a function given as `targets` or `exclude` is asked about each.

    Attributes:
        name: dotted, as in `named_modules`; of a weight not called `weight`, its own full name.
        in_features, out_features: A is (rank, in_features), B is (out_features, rank).
        kind: the kind of its first linear call ("linear", "addmm", "matmul", ...), or "weight" if
            no graph makes one: then Python does, and reads W + s B A.
        calls: the linear calls that graphs make with it; each prints as `module: node`.
        transposed: W is stored as (in, out), as all of its calls compute x W; else as (out, in).
        aliases: other names of the same weight by which linear calls read it; one branch is for
            all.
        tied_to: names under which something else has the weight, such as an embedding.
        experts: the number of weights in a stack, (experts, out, in), each with its own A and B;
            None for one matrix.
        rows: (first, number) of the rows of W that the site is; None for all.
        blocks: {block: (first, number)} of rows that may be a site by themselves, `name[block]`.
        role: as for `lorafx.sites`, joined by "+" if it has several; None if it has none, or where
            roles were not looked for.

    Example:
        >>> import torch, lorafx
        >>> [site] = lorafx.sites(torch.nn.Sequential(torch.nn.Linear(3, 5)))
        >>> isinstance(site, lorafx.Site), site.name, site.in_features, site.out_features
        (True, '0', 3, 5)
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
    role: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All names that mean this site."""
        return self.name, *self.aliases

    def block(self, key: str) -> "Site | None":
        """The site of some rows of this weight: a named block, `q`, or [start, stop), `0:64`."""
        rows = self.blocks.get(key)
        match = re.fullmatch(r"(\d+):(\d+)", key)
        if rows is None and match and int(match[1]) < int(match[2]) <= self.out_features:
            rows = int(match[1]), int(match[2]) - int(match[1])
            key = next((name for name, block in self.blocks.items() if block == rows), key)
        if rows is None or self.rows is not None:
            return None
        name, *aliases = [f"{name}[{key}]" for name in self.names]
        return dataclasses.replace(self, name=name, aliases=tuple(aliases), out_features=rows[1],
                                   rows=rows, blocks={})


# What `targets` and `exclude` take: "square", "linear", a name, a dotted suffix or a glob; a
# compiled regular expression that matches the whole name; a function of a Site; or several.
Target: TypeAlias = str | re.Pattern[str] | Callable[[Site], object]
Targets: TypeAlias = Target | Collection[Target]


def sort_key(names: Iterable[str]) -> Callable[[Site], int]:
    """A key that sorts sites in the order of these names, a block of rows where its weight is."""
    order = {name: position for position, name in enumerate(names)}
    return lambda site: order.get(site.name, order.get(split_block(site.name)[0], -1))


SELECTORS: dict[str, Callable[[Site], bool]] = {
    "square": lambda site: site.in_features == site.out_features,
    "linear": lambda site: True,
}


def select(
    sites: Sequence[Site], targets: Any, exclude: Any, left_alone: Mapping[str, str],
    argument: str = "targets",
) -> list[Site]:
    """The sites that `targets` names and `exclude` does not; every pattern must match something.

    `left_alone` gives the reasons of names that are not sites, for the error messages, and
    `argument` is what they call `targets`.
    """
    targeted = {site.name: site for site in _matched(sites, targets, argument, left_alone)}
    excluded = {site.name for site in _matched(sites, exclude, "exclude", left_alone)}
    selected = [site for name, site in targeted.items() if name not in excluded]
    selected.sort(key=sort_key(site.name for site in sites))
    if not selected:
        raise NoSiteError(f"No linear call is left to adapt: {argument}={targets!r}, "
                          f"exclude={exclude!r}. {_hint(sites)}")
    return selected


def blocks_matching(sites: Iterable[Site], pattern: Any) -> list[Site]:
    """The blocks of rows that a pattern such as `qkv[q]` or `*.qkv[0:64]` means."""
    match = re.fullmatch(r"(.*)\[([^\[\]]+)\]", pattern) if isinstance(pattern, str) else None
    if match is None:
        return []
    blocks: list[Site] = []
    for site in sites:
        if any(name_matches(match[1], name) for name in site.names):
            block = site.block(match[2])
            if block is not None:
                blocks.append(block)
    return blocks


def _matched(
    sites: Sequence[Site], patterns: Any, argument: str, left_alone: Mapping[str, str]
) -> list[Site]:
    found: list[Site] = []
    for pattern in as_list(patterns):
        is_meant = _predicate(pattern, argument)
        matched = [site for site in sites if is_meant(site)] or blocks_matching(sites, pattern)
        if not matched:
            shown = repr(pattern.pattern if isinstance(pattern, re.Pattern) else pattern)
            raise NoSiteError(f"No linear call matches {argument}={shown}. "
                              f"{_hint(sites, pattern, left_alone)}")
        found += matched
    return found


def as_list(patterns: Any) -> list[Any]:
    """One pattern or several, as a list; None is none."""
    if patterns is None:
        return []
    return list(patterns) if isinstance(patterns, (list, tuple, set, frozenset)) else [patterns]


def _predicate(pattern: Any, argument: str) -> Callable[[Site], bool]:
    if isinstance(pattern, str):
        return SELECTORS.get(pattern) or (
            lambda site: any(name_matches(pattern, name) for name in site.names))
    if isinstance(pattern, re.Pattern):
        return lambda site: any(pattern.fullmatch(name) for name in site.names)
    if callable(pattern) and not isinstance(pattern, type):
        return lambda site: bool(pattern(site))
    raise ConfigError(f"{argument} takes names, globs, compiled regular expressions or a function "
                      f"of a Site, not {pattern!r}.")


def _hint(
    sites: Sequence[Site], pattern: Any = None,
    left_alone: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """What the model has instead: why the name meant is not a site, or the sites of nearest names.

    Of a model without sites, any reason will do.
    """
    refused: list[str] = []
    if isinstance(pattern, str):
        refused = [name for name in left_alone if name_matches(pattern, name)]
    if not refused and not sites:
        refused = list(left_alone)
    if refused:
        return f"{refused[0]!r} cannot be adapted: {left_alone[refused[0]]}."
    if not sites:
        return "This model makes no linear call on a weight of its own."
    names = closest_names(pattern, [name for site in sites for name in site.names])
    selectors: list[str] = []
    if isinstance(pattern, str):
        selectors = difflib.get_close_matches(pattern, SELECTORS.keys() - {pattern}, 1)
    meant = f"Did you mean {selectors[0]!r}? " if selectors else ""
    return (f"{meant}This model has {counted(len(sites), 'site')}, such as {names}. "
            "lorafx.sites(model) lists them.")
