"""`summary`: what was adapted, what trains, what was left alone and why."""

import dataclasses
import html
from collections.abc import Mapping, Sequence

from torch import nn

from ._model.branches import Branch, branches, factors_at
from ._model.flat import in_shape
from ._model.program import read_program
from ._model.record import injection
from ._model.regions import Region


_HEADER = ("site", "out x in", "rank", "scale")


@dataclasses.dataclass(frozen=True)
class SiteRow:
    """One adapted site, a weight (out, in); `ranks` and `scales` are those of its adapters."""

    name: str
    in_features: int
    out_features: int
    calls: int
    ranks: Mapping[str, int]
    scales: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Summary:
    """What `lorafx.summary` returns; print() and notebooks show a table, and what was skipped.

    Attributes:
        sites: of each adapted site, its `name`, `in_features`, `out_features`, the number of
            `calls` in graphs, and by adapter its `ranks` and `scales`.
        active: {adapter: weight} of what forward adds, as given to `lorafx.activate`.
        trainable, total: numbers of parameters, those of all adapters among the total.
        skipped: {name: why} of each matrix that is not adapted.
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
    skipped: Mapping[str, str]
    breaks: Mapping[str, str]
    code: str

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Return the table's cells: site, out x in, ranks, scales."""
        rows = []
        for site in self.sites:
            ranks = ", ".join(f"{adapter} {rank}" for adapter, rank in site.ranks.items())
            scales = ", ".join(f"{scale:g}" for scale in site.scales.values())
            size = f"{site.out_features} x {site.in_features}"
            rows.append((site.name or "(the model)", size, ranks, scales))
        return rows

    def headline(self) -> str:
        """Return one line of totals."""
        active = ", ".join(f"{name} x {weight:g}" for name, weight in self.active.items())
        count = f"{len(self.sites)} site" + "s" * (len(self.sites) != 1)
        share = 100 * self.trainable / max(self.total, 1)
        return (f"{count} adapted, active: {active or 'none'}; {self.trainable:,} of "
                f"{self.total:,} parameters train ({share:.2f} %)")

    def __str__(self) -> str:
        table = [_HEADER, *self.rows()]
        widths = [max(map(len, column)) for column in zip(*table)]
        lines = [self.headline(), ""]
        for row in table:
            lines.append("  ".join(map(str.ljust, row, widths)).rstrip())
        if self.skipped:
            lines += ["", "skipped:"]
            for name, reason in self.skipped.items():
                lines.append(f"  {name or '(the model)'}: {reason}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        parts = [f"<p>{html.escape(self.headline())}</p>", _html_table(_HEADER, self.rows())]
        if self.skipped:
            rows = [(name or "(the model)", reason) for name, reason in self.skipped.items()]
            parts.append(_html_table(("skipped", "why"), rows))
        return "".join(parts)


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(header, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def summary(model: nn.Module) -> Summary:
    """Return what an injected model is: its sites, its parameters, what was left alone and why.

    Example:
        >>> import torch, lorafx
        >>> nn = torch.nn
        >>> model = lorafx.inject(nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1)), rank=2)
        >>> print(lorafx.summary(model))
        1 site adapted, active: default x 1; 16 of 56 parameters train (28.57 %)
        <BLANKLINE>
        site  out x in  rank       scale
        0     4 x 4     default 2  1
        <BLANKLINE>
        skipped:
          1: a convolution (Conv1d), which lorafx does not adapt yet
    """
    with in_shape(model):
        return _summary(model)


def _summary(model: nn.Module) -> Summary:
    record = injection(model)
    program = read_program(model)
    rows = []
    for name, branch in branches(model).items():
        site = program.site(name)
        row = _row(name, branch, list(record.configs), 0 if site is None else len(site.calls))
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
    return Summary(rows, dict(record.active), trainable, total, record.skipped, record.breaks,
                   "\n".join(code.values()))


def _row(name: str, branch: Branch, adapters: Sequence[str], calls: int) -> SiteRow | None:
    """The row of a site, or None if no adapter is there (they were removed)."""
    ranks, scales, shape = {}, {}, None
    for adapter in adapters:
        factors = factors_at(branch, adapter)
        if factors is not None:
            ranks[adapter], scales[adapter] = factors.A.shape[-2], factors.scale
            shape = shape or (factors.A.shape[-1], factors.B.shape[-2])
    return None if shape is None else SiteRow(name, *shape, calls, ranks, scales)
