"""`summary`: what was adapted, what trains, what was left alone and why."""

import dataclasses
import html
from collections.abc import Mapping, Sequence

from torch import nn

from ._model.branches import branches, factors_at
from ._model.program import read_program
from ._model.record import injection
from ._model.regions import Region


@dataclasses.dataclass(frozen=True)
class SiteRow:
    """One adapted site: its weight is (out, in); `ranks` and `scales` have an entry for each adapter at the site."""

    name: str
    in_features: int
    out_features: int
    calls: int
    ranks: Mapping[str, int]
    scales: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Summary:
    """What `lorafx.summary` returns; str() is a table, and notebooks show it as one.

    `trainable` and `total` count parameters, `skipped` says of each matrix that is not adapted why, `breaks` of each
    module that stays Python why, and `code` is the generated forward of each distinct region, once.
    """

    sites: Sequence[SiteRow]
    active: Mapping[str, float]
    trainable: int
    total: int
    skipped: Mapping[str, str]
    breaks: Mapping[str, str]
    code: str

    def rows(self) -> list[tuple[str, str, str, str]]:
        """The table's cells: site, out x in, ranks, scales."""
        return [(site.name or "(the model)", f"{site.out_features} x {site.in_features}",
                 ", ".join(f"{name} {rank}" for name, rank in site.ranks.items()),
                 ", ".join(f"{scale:g}" for scale in site.scales.values())) for site in self.sites]

    def headline(self) -> str:
        """One line of totals."""
        active = ", ".join(f"{name} x {weight:g}" for name, weight in self.active.items()) or "none"
        share = 100 * self.trainable / max(self.total, 1)
        count = f"{len(self.sites)} site" + "s" * (len(self.sites) != 1)
        return (f"{count} adapted, active: {active}; {self.trainable:,} of {self.total:,} parameters train "
                f"({share:.2f} %)")

    def __str__(self) -> str:
        table = [_HEADER, *self.rows()]
        widths = [max(len(row[column]) for row in table) for column in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table]
        for title, reasons in (("skipped", self.skipped), ("graph breaks", self.breaks)):
            if reasons:
                lines += ["", f"{title}:", *(f"  {name or '(the model)'}: {why}" for name, why in reasons.items())]
        return "\n".join([self.headline(), "", *lines])

    def _repr_html_(self) -> str:
        def cells(row: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

        body = "".join(cells(row, "td") for row in self.rows())
        return f"<p>{html.escape(self.headline())}</p><table>{cells(_HEADER, 'th')}{body}</table>"


_HEADER = ("site", "out x in", "rank", "scale")


def summary(model: nn.Module) -> Summary:
    """What an injected model is: its sites, its parameters, what was left alone and why.

    Example:
        >>> import torch, lorafx
        >>> model = lorafx.inject(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Conv1d(4, 4, 1)), rank=2)
        >>> print(lorafx.summary(model))
        1 site adapted, active: default x 1; 16 of 56 parameters train (28.57 %)
        <BLANKLINE>
        site  out x in  rank       scale
        0     4 x 4     default 2  1
        <BLANKLINE>
        skipped:
          1: no linear call on it was found, and its module is a graph break: Conv1d: it calls ...
        <BLANKLINE>
        graph breaks:
          (the model): Sequential: forward loops ...
          1: Conv1d: it calls `Conv1d._conv_forward`: _conv_forward branches or loops ...
    """
    record = injection(model)
    program = read_program(model)
    rows = []
    for name, branch in branches(model).items():
        present = {adapter: factors_at(branch, adapter) for adapter in record.configs}
        factors = {adapter: f for adapter, f in present.items() if f is not None}
        if factors:
            first = next(iter(factors.values()))
            ranks = {adapter: f.A.shape[-2] for adapter, f in factors.items()}
            scales = {adapter: f.scale for adapter, f in factors.items()}
            site = program.site(name)
            calls = len(site.calls) if site is not None else 0
            rows.append(SiteRow(name, first.A.shape[-1], first.B.shape[-2], calls, ranks, scales))
    regions = [module for module in model.modules() if isinstance(module, Region)]
    code = {type(module): f"# {type(module).__name__}\n{module.code}" for module in regions}
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    return Summary(rows, dict(record.active), trainable, total, record.skipped, record.breaks, "\n".join(code.values()))
