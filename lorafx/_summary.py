"""`summary`: what was adapted, what trains, what was left alone and why."""

import dataclasses
import html
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.export import ExportedProgram

from ._adapter.letters import counted, padded, width
from ._adapter.names import split_block
from ._graph.modules import submodule
from ._model.branches import Branch, branches, factors_at
from ._model.exported_program import takes_exported
from ._model.flat import in_shape
from ._model.overview import joined_sites, relative_name, relative_norm, surroundings
from ._model.program import Program, read_program
from ._model.record import injection, used_here
from ._model.regions import Region, users_class


@dataclasses.dataclass(frozen=True)
class SiteRow:
    """One adapted site, a weight (out, in), or a stack of such if `experts` says how many.

    `ranks` and `scales` are those of its adapters, which have `parameters` together. `place` is
    the region whose graph computes it, or the graph break whose Python does, as `region MLP`;
    `joined` are the sites that are computed together with it. `relative_norm` is what the active
    adapters add over W, |sum w s B A| / |W| in Frobenius norms; None where that is not known.
    `role` is None if it has none, or where roles were not looked for.
    """

    name: str
    in_features: int
    out_features: int
    calls: int
    ranks: Mapping[str, int]
    scales: Mapping[str, float]
    experts: int | None
    parameters: int
    place: str
    joined: tuple[str, ...]
    relative_norm: float | None
    role: str | None

    @property
    def size(self) -> str:
        """The shape of the weight, out x in."""
        experts = "" if self.experts is None else f"{self.experts} x "
        return f"{experts}{self.out_features} x {self.in_features}"


def _joined_with(site: SiteRow) -> str:
    return ", ".join(relative_name(name, site.name) for name in site.joined)


def _role(site: SiteRow) -> str:
    """The role in short: `attention.query+key+value` of a fused projection."""
    first, *others = (site.role or "").split("+")
    return "+".join([first, *(role.rpartition(".")[2] for role in others)])


def _relative_norm(site: SiteRow) -> str:
    return "" if site.relative_norm is None else f"{site.relative_norm:#.3g}"


class _Column(NamedTuple):
    """A column of the table; one that is empty for every site is left out."""

    header: str
    cell: Callable[[SiteRow], str]
    is_number: bool = False


_COLUMNS = (
    _Column("site", lambda site: site.name or "(the model)"),
    _Column("role", _role),
    _Column("out x in", lambda site: site.size),
    _Column("rank", lambda site: ", ".join(f"{name} {rank}" for name, rank in site.ranks.items())),
    _Column("scale", lambda site: ", ".join(f"{scale:g}" for scale in site.scales.values())),
    _Column("parameters", lambda site: f"{site.parameters:,}", is_number=True),
    _Column("in", lambda site: site.place),
    _Column("joined with", _joined_with),
    _Column("|sBA| / |W|", _relative_norm, is_number=True),
)


@dataclasses.dataclass(frozen=True)
class Summary:
    """What `lorafx.summary` returns; print() and notebooks show a table, and what was skipped.

    Attributes:
        sites: of each adapted site, its `name`, `in_features`, `out_features`, `experts`, the
            number of `calls` in graphs, by adapter its `ranks` and `scales`, its `parameters`,
            the `place` where it is computed, such as `region MLP` or `break Attention`, the
            names of those `joined` with it, computed together, and `relative_norm`,
            |sum w s B A| / |W| of the active adapters, in Frobenius norms; and its `role`, where
            inject or add were given `example_inputs` or a role.
        active: {adapter: weight} of what forward adds, as given to `lorafx.activate`.
        trainable, total: numbers of parameters, those of all adapters among the total.
        trained: {name of a tensor, or of rows of one: the adapters that train it whole}.
        skipped: {name: why} of each matrix that is not adapted: it cannot be, or roles were named,
            and it has none.
        breaks: {module: why} of each module that stays Python; its layers are adapted all the same.
        code: the generated forward of each distinct region, once.

    Example:
        >>> import torch, lorafx
        >>> model = lorafx.inject(torch.nn.Sequential(torch.nn.Linear(4, 4)), rank=2)
        >>> found = lorafx.summary(model)
        >>> isinstance(found, lorafx.Summary), found.trainable, found.total
        (True, 16, 36)
        >>> for module, why in found.breaks.items():
        ...     print(module or "(the model)", why, sep=": ")
        (the model): Sequential: forward loops ...
    """

    sites: Sequence[SiteRow]
    active: Mapping[str, float]
    trainable: int
    total: int
    trained: Mapping[str, Sequence[str]]
    skipped: Mapping[str, str]
    breaks: Mapping[str, str]
    code: str

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table's cells, those of `columns` for each site."""
        columns = self._columns()
        return [tuple(column.cell(site) for column in columns) for site in self.sites]

    def columns(self) -> tuple[str, ...]:
        """Return the table's header: site, role, out x in, rank, scale, parameters, in, ..."""
        return tuple(column.header for column in self._columns())

    def _columns(self) -> list[_Column]:
        """The columns that say something of a site."""
        found = [column for column in _COLUMNS if any(map(column.cell, self.sites))]
        return found or list(_COLUMNS[:1])

    def headline(self) -> str:
        """Return one line of totals."""
        active = ", ".join(f"{name} x {weight:g}" for name, weight in self.active.items())
        count = f"{counted(len(self.sites), 'site')} adapted, "
        if self.trained:
            count += f"{counted(len(self.trained), 'tensor')} trained whole, "
        share = 100 * self.trainable / max(self.total, 1)
        return (f"{count}active: {active or 'none'}; {self.trainable:,} of {self.total:,} "
                f"parameters train ({share:.2f} %)")

    def _lists(self) -> list[tuple[str, str, list[tuple[str, str]]]]:
        """What stands below the table: a heading, that of what is said, and (name, what)."""
        trained = [(name, ", ".join(adapters)) for name, adapters in self.trained.items()]
        skipped = [(name or "(the model)", why) for name, why in self.skipped.items()]
        lists = [("trained whole", "by", trained), ("skipped", "why", skipped)]
        return [one for one in lists if one[2]]

    def __str__(self) -> str:
        columns, table = self._columns(), [self.columns(), *self.rows()]
        widths = [max(map(width, column)) for column in zip(*table)]
        lines = [self.headline(), ""]
        for row in table:
            cells = []
            for cell, places, column in zip(row, widths, columns):
                cells.append(padded(cell, places, to_the_right=column.is_number))
            lines.append("  ".join(cells).rstrip())
        for heading, _, rows in self._lists():
            lines += ["", f"{heading}:", *(f"  {name}: {what}" for name, what in rows)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        numbers = {column.header for column in self._columns() if column.is_number}
        parts = [f"<p>{html.escape(self.headline())}</p>",
                 _html_table(self.columns(), self.rows(), numbers)]
        for heading, what, rows in self._lists():
            parts.append(_html_table((heading, what), rows))
        return "".join(parts)


def _html_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Collection[str] = ()
) -> str:
    """A table; each cell says where its text begins, as notebooks would move all to the right."""
    def line(cells: Sequence[str], tag: str) -> str:
        parts = []
        for name, cell in zip(header, cells):
            side = "right" if name in numbers else "left"
            parts.append(f'<{tag} style="text-align: {side}">{html.escape(cell)}</{tag}>')
        return f"<tr>{''.join(parts)}</tr>"

    head, body = line(header, "th"), "".join(line(row, "td") for row in rows)
    return f"<table>{head}{body}</table>"


@takes_exported
def summary(model: nn.Module | ExportedProgram, *, norms: bool = True) -> Summary:
    """Return what an injected model is: its sites, its parameters, what was left alone and why.

    Active are the adapters that forward uses here: within `lorafx.using` what that chose.

    Args:
        model: an injected model.
        norms: give |sum w s B A| / |W| of each site, for which every adapted weight is read once.
            It is None where a weight is spread over processes, or has no values yet.

    Raises:
        NotInjectedError: the model was not made by lorafx.
        AdapterError: it is asked within `lorafx.rows`, where rows use adapters of their own.

    Example:
        >>> import torch, lorafx
        >>> nn = torch.nn
        >>> model = lorafx.inject(nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1)), rank=2)
        >>> print(lorafx.summary(model))
        1 site adapted, active: default x 1; 16 of 56 parameters train (28.57 %)
        <BLANKLINE>
        site  out x in  rank       scale  parameters  in                |sBA| / |W|
        0     4 x 4     default 2  1              16  break Sequential         0.00
        <BLANKLINE>
        skipped:
          1: a convolution (Conv1d), which lorafx does not adapt yet
    """
    assert not isinstance(model, ExportedProgram)  # takes_exported saw to that
    with in_shape(model):
        return _summary(model, norms)


def _summary(model: nn.Module, norms: bool) -> Summary:
    record, active = injection(model), used_here(model, "A summary")
    program = read_program(model)
    joined: dict[str, tuple[str, ...]] = {}
    for group in joined_sites(model):
        for name in group:
            joined[name] = tuple(other for other in group if other != name)
    rows = []
    for name, branch in branches(model).items():
        row = _row(program, name, branch, joined.get(name, ()), active if norms else None)
        if row is not None:
            rows.append(row)
    code: dict[type, str] = {}
    for module in model.modules():
        if isinstance(module, Region) and type(module) not in code:
            code[type(module)] = f"# {type(module).__name__}\n{module.code}"
    trainable = total = 0
    for parameter in model.parameters():
        total += parameter.numel()
        trainable += parameter.numel() if parameter.requires_grad else 0
    adapted, skipped = {row.name for row in rows}, dict(record.skipped)
    for name, why in record.without_role.items():
        if name not in adapted:
            skipped[name] = why
    trained: dict[str, list[str]] = {}
    for adapter, names in record.trained.items():
        for name in names:
            trained.setdefault(name, []).append(adapter)
    return Summary(rows, active, trainable, total, trained, skipped, record.breaks,
                   "\n".join(code.values()))


def _row(
    program: Program, name: str, branch: Branch, joined: tuple[str, ...],
    active: Mapping[str, float] | None,
) -> SiteRow | None:
    """The row of a site, or None if no adapter is there (they were removed).

    It has the norm of what the active adapters add, where these are given.
    """
    model, record = program.model, injection(program.model)
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    shapes: list[tuple[torch.Size, torch.Size]] = []
    for adapter in record.configs:
        factors = factors_at(branch, adapter)
        if factors is not None:
            ranks[adapter], scales[adapter] = factors.A.shape[-2], factors.scale
            shapes.append((factors.A.shape, factors.B.shape))
    if not shapes:
        return None
    (*stack, _, width), (*_, height, _) = shapes[0]
    site = program.site(name)
    is_break, path = surroundings(program, name)
    kind = users_class(submodule(model, path)).__name__
    place = program.places.get(split_block(name)[0])
    return SiteRow(
        name, width, height, 0 if site is None else len(site.calls), ranks, scales,
        experts=stack[0] if stack else None,
        parameters=sum(A.numel() + B.numel() for A, B in shapes),
        place=f"{'break' if is_break else 'region'} {kind}", joined=joined,
        relative_norm=None if active is None else relative_norm(branch, place, active),
        role=record.roles.get(name))
