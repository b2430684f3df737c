"""The part that each site plays in a model: in attention, in a feed-forward block, as the head.

It is found in the dataflow of one run of the base, and never in names.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._adapter.names import name_matches, split_block
from .._errors import ConfigError, NoSiteError
from .._kernels.private import tree_iter, tree_map
from .._graph.modules import Place
from .._graph.sites import Site, Targets, as_list, select
from .copies import CopyNonLeaves, share
from .flow import Flow
from .graph_inputs import inputs_in_graph, run_graph
from .places import places_of
from .program import Program
from .quantised import is_packed
from .record import Injection
from .recording import Recorder, recording
from .role_calls import KEY, MLP, QUERY, ROLES, VALUE, RoleCalls


# What `targets` takes; "attention" is all of its four.
WORDS = {prefix + word: word for prefix in ("", "role:") for word in ("attention", *ROLES)}


@dataclasses.dataclass(frozen=True)
class Undecided:
    """A site of which it is open whether it has one of these roles, and why."""

    between: frozenset[str]
    reason: str


@dataclasses.dataclass(frozen=True)
class Roles:
    """The roles of sites that have some, by name, those left open, and why others have none."""

    of: Mapping[str, frozenset[str]]
    undecided: Mapping[str, Undecided]
    none: Mapping[str, str]

    def named(self) -> dict[str, str]:
        """{site: its role}: of a fused one "attention.query+attention.key+attention.value"."""
        named = {}
        for site, own in self.of.items():
            named[site] = "+".join(role for role in ROLES if role in own)
        return named


def roles(program: Program, example_inputs: Any) -> dict[str, str | None]:
    """Return {site: its role, or None if it has none or that is undecided}.

    Args:
        program: what `read_program` found in a model.
        example_inputs: a tuple of arguments, or a dict of keyword arguments, of its forward; None
            for a graph that knows the shapes of its inputs.

    Raises:
        ConfigError: the model cannot be run on them.
    """
    named = find_roles(program, example_inputs).named()
    return {site.name: named.get(site.name) for site in program.sites}


def find_roles(program: Program, example_inputs: Any) -> Roles:
    """The roles of a model's sites, by one run of its base on these inputs."""
    flow = _record(program, example_inputs)
    reading = RoleCalls(flow)
    by_site: dict[str, set[str]] = {site.name: set() for site in program.sites}
    unsure: set[str] = set()
    open_: set[str] = set()
    reasons: dict[str, str] = {}  # of sites that the run reached
    for bit, call in flow.calls.items():
        for name in call.sites:
            by_site[name] |= reading.roles_of(bit)
            reasons[name] = reading.why_none(bit)
            if bit & reading.unsure:
                unsure.add(name)
            if bit & reading.open:
                open_.add(name)
    found: dict[str, frozenset[str]] = {}
    undecided: dict[str, Undecided] = {}
    for name, own in by_site.items():
        if name not in reasons:
            undecided[name] = Undecided(
                frozenset(ROLES), "the model does not call it on these inputs")
        elif name in unsure and not own & {QUERY, KEY}:
            undecided[name] = Undecided(
                frozenset({QUERY, KEY}), "which of two is the query could not be followed")
        elif len(own) > 1 and not own <= {QUERY, KEY, VALUE}:
            undecided[name] = Undecided(
                frozenset(own), f"its calls differ: {' and '.join(sorted(own))}")
        elif own:
            found[name] = frozenset(own)
        elif name in open_:
            undecided[name] = Undecided(frozenset({MLP}), (
                "its block's result is added to what it was computed from, but not to what the "
                "block began with"))
    none = {name: why for name, why in reasons.items()
            if name not in found and name not in undecided}
    return Roles(found, undecided, none)


def _record(program: Program, example_inputs: Any) -> Flow:
    """The flow of a run of the base on these inputs, in a copy, in eval, without gradients.

    Without inputs, a graph is run that knows what its own are like.
    """
    base: Any = share(program.model, ejecting=True)
    for module in base.modules():
        module.training = False
    places = places_of(base)
    call, args, kwargs = _call(base, example_inputs)
    with torch.random.fork_rng(), recording() as recorder:
        for site in program.sites:
            _make_known(recorder, places[split_block(site.name)[0]], site)
        for leaf in tree_iter((args, kwargs)):
            if isinstance(leaf, Tensor):
                recorder.input(leaf)
        try:
            result = call(*args, **kwargs)
        except Exception as error:
            raise ConfigError(
                f"This {type(base).__name__} cannot be run on example_inputs: "
                f"{type(error).__name__}: {error}. Pass a tuple of the arguments of its forward, "
                "or a dict of its keyword arguments.") from error
        recorder.returned(result)
    return recorder.flow


def _call(
    base: Any, example_inputs: Any
) -> tuple[Callable[..., Any], Sequence[Any], Mapping[str, Any]]:
    """What runs a model, and a copy of the arguments for it."""
    if example_inputs is None:
        return functools.partial(run_graph, base), inputs_in_graph(base) or [], {}
    args, kwargs = _arguments(example_inputs)
    with CopyNonLeaves():
        return base, tree_map(_copied, args), tree_map(_copied, kwargs)


def _arguments(example_inputs: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    raise ConfigError("example_inputs takes a tuple of the arguments of the model's forward, such "
                      "as (x,), or a dict of its keyword arguments, not "
                      f"{type(example_inputs).__name__}.")


def _copied(leaf: Any) -> Any:
    """A copy of an input, since a forward may write into it, as into a cache."""
    return leaf.detach().clone() if isinstance(leaf, Tensor) else copy.deepcopy(leaf)


def _make_known(recorder: Recorder, place: Place, site: Site) -> None:
    """Let a recorder know the tensors of which a site is made, or the layer that has it packed."""
    module, attribute = place
    if is_packed(module):
        def note(layer: nn.Module, args: Any, result: Any) -> None:
            recorder.layer(site.name, args[0], result)

        module.register_forward_hook(note)
    elif parametrize.is_parametrized(module, attribute):
        originals: Any = module.parametrizations
        for tensor in originals[attribute].parameters():
            recorder.weight(tensor, site.name)
    else:
        recorder.weight(getattr(module, attribute), site.name, site.rows)


@dataclasses.dataclass(frozen=True)
class Resolved:
    """Targets without words for roles, and the roles that were found, if they were looked for.

    `by_role` says whether a word was among the targets.
    """

    targets: Targets
    exclude: Targets
    roles: Roles | None
    by_role: bool

    def note(self, record: Injection) -> None:
        """Let an injected model remember the roles, and which sites the words left out, and why."""
        if self.roles is not None:
            record.roles |= self.roles.named()
        if self.roles is not None and self.by_role:
            for name, why in self.roles.none.items():
                record.without_role[name] = f"it has no role: {why}"


def with_roles(
    program: Program, targets: Targets, exclude: Targets, example_inputs: Any
) -> Resolved:
    """These targets with each word for a role as the sites that have it.

    A word that names sites means these, unless there are example inputs: then it means the role,
    and is an error if the sites of that name are others. After "role:" it is never a name.
    """
    patterns = [*as_list(targets), *as_list(exclude)]
    words = [word for word in patterns if isinstance(word, str) and word in WORDS]
    if example_inputs is None:
        words = [word for word in words if not _named(program.sites, word)]
        if not words:
            return Resolved(targets, exclude, None, False)
        if inputs_in_graph(program.model) is None:
            raise NoSiteError(
                f"{words[0]!r} is a role, found by running the model once, and no site's name: "
                "pass example_inputs=, a tuple of the arguments of its forward or a dict of its "
                "keyword arguments.")
    found = find_roles(program, example_inputs)
    if not words:
        return Resolved(targets, exclude, found, False)
    plain = [pattern for pattern in as_list(exclude) if pattern not in words]
    excluded = select(program.sites, plain, (), program.left_alone) if plain else []
    names = {site.name for site in excluded}
    chosen = {word: _having(program.sites, found, word, names) for word in words}

    def replaced(patterns: Targets) -> list[Any]:
        return [chosen.get(pattern, pattern) if isinstance(pattern, str) else pattern
                for pattern in as_list(patterns)]

    by_role = any(word in words for word in as_list(targets))
    return Resolved(replaced(targets), replaced(exclude), found, by_role)


class _SitesOfRole:
    """A target: the sites that have a role."""

    def __init__(self, word: str, names: Collection[str]) -> None:
        self.word, self.names = word, names

    def __call__(self, site: Site) -> bool:
        return site.name in self.names

    def __repr__(self) -> str:
        return repr(self.word)


def _named(sites: Iterable[Site], word: str) -> set[str]:
    """The sites that this word names."""
    return {site.name for site in sites if any(name_matches(word, name) for name in site.names)}


def _having(
    sites: Sequence[Site], found: Roles, word: str, excluded: Collection[str]
) -> _SitesOfRole:
    """The sites of a role, or an error where there is none, or where one is undecided."""
    word, written = WORDS[word], word
    meant = {role for role in ROLES if role == word or role.startswith(f"{word}.")}
    open_ones = [name for name, undecided in found.undecided.items()
                 if undecided.between & meant and name not in excluded]
    if open_ones:
        first = open_ones[0]
        more = f" and {len(open_ones) - 1} more" if open_ones[1:] else ""
        raise NoSiteError(
            f"Whether {first!r}{more} is {word!r} cannot be decided: "
            f"{found.undecided[first].reason}. Pass example_inputs that use all of the model, name "
            "the sites, or exclude those by name.")
    names = {name for name, own in found.of.items() if own & meant}
    if not names:
        others = sorted(set().union(*found.of.values()))
        raise NoSiteError(
            f"No linear call of this model is {word!r} in the run on example_inputs. Its sites "
            f"are {', '.join(map(repr, others)) or 'of no role'}: name them, lorafx.sites(model) "
            "lists them.")
    named = _named(sites, written)
    if named and named != names:
        raise ConfigError(
            f"{word!r} is the name of {min(named)!r} and the role of {min(names)!r}: write "
            f"'*{word}' for the name, 'role:{word}' for the role.")
    return _SitesOfRole(written, names)
