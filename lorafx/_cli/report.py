"""`lorafx show --plot`: an adapter in pictures, as one file that needs no other and no network."""

import argparse
import base64
import html
import math
from collections.abc import Sequence

from .._adapter.adapter import Adapter
from .._adapter.letters import counted
from .._checkpoint.norms import weight_norms
from .._errors import MismatchError
from .._formats.table import read_adapter
from .._storage.durable import write_whole
from .conversions import table_of
from .drawing import fonts_for
from .figures import WIDTH, Panel, SiteFacts, facts_of, panels_of, png_of, svg_of

_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1f2328; --soft: #57606a;
  --edge: #d0d7de; --head: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --paper: #15191e; --ink: #e6e9ed; --soft: #a3adb8;
  --edge: #3a424c; --head: #1d2229; } }
body { margin: 2rem auto; max-width: 72rem; padding: 0 1.25rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, 'Segoe UI', 'Liberation Sans', sans-serif; }
h1 { font-size: 1.45rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 0; }
p { margin: .25rem 0 .75rem; color: var(--soft); }
img { display: block; width: 100%; min-width: 44rem; height: auto; background: #ffffff;
  border-radius: 6px; border: 1px solid var(--edge); box-sizing: border-box; padding: .5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem .7rem; border-bottom: 1px solid var(--edge);
  white-space: nowrap; vertical-align: top; }
th { background: var(--head); } .number { text-align: right; }
td.values { white-space: normal; min-width: 24rem; }
summary { cursor: pointer; font-size: 1.1rem; font-weight: 600; margin: 2rem 0 .5rem; }
"""


def plot(options: argparse.Namespace) -> str:
    """Write the pictures that `show --plot` asks for, and return a line that says what they are."""
    adapter, _ = read_adapter(options.file)
    other = None if options.other is None else read_adapter(options.other)[0]
    norms: dict[str, float] | None = None
    shown = adapter
    if options.base is not None:
        shown, norms = weight_norms(options.base, adapter, f"'{options.file}'", table_of)
        if other is not None and shown is not adapter:  # the checkpoint has other names
            other = weight_norms(options.base, other, f"'{options.other}'", table_of)[0]
    if not shown.pairs:
        raise MismatchError(f"'{options.file}' has no site to plot: it only has tensors that were "
                            "trained whole.")
    if other is not None and shown.pairs.keys().isdisjoint(other.pairs):
        raise MismatchError(f"'{options.file}' and '{options.other}' have no site in common, such "
                            f"as '{next(iter(shown.pairs))}': there is nothing to compare.")
    facts = facts_of(shown, norms, other)
    panels = panels_of(facts, other is not None)
    title = f"Adapter '{adapter.name}'"
    if other is not None:
        title += f", beside '{other.name}' of {options.other}"
    said = _in_words(facts, shown, other)
    below = f"{options.file}: {said}"
    with fonts_for("".join([title, below, *(site.name for site in facts)])):
        if options.plot.suffix.lower() == ".png":
            content = png_of(title, below, panels)
        else:
            content = _page(title, below, facts, panels).encode()
    write_whole(options.plot, content)
    return f"{options.plot}: {said}"


def _in_words(facts: Sequence[SiteFacts], adapter: Adapter, other: Adapter | None) -> str:
    """What the pictures say on the whole, in a line."""
    used = [site.effective / site.rank for site in facts]
    parts = [counted(len(facts), "site"),
             f"{100 * sum(used) / len(used):.0f} % of the rank used"]
    relative = [site.relative for site in facts
                if site.relative is not None and math.isfinite(site.relative)]
    if relative:
        parts.append(f"|sBA| / |W| from {min(relative):.2g} to {max(relative):.2g}")
    if other is not None:
        cosines = [site.cosine for site in facts if site.cosine is not None]
        if cosines:
            parts.append(f"cosine {sum(cosines) / len(cosines):.2f} in the mean of "
                         f"{len(cosines)} common")
        only = len(adapter.pairs.keys() ^ other.pairs.keys())
        if only:
            parts.append(f"{only} in one adapter only")
    if adapter.trained:
        parts.append(f"{counted(len(adapter.trained), 'tensor')} trained whole, not shown")
    return ", ".join(parts)


def _page(title: str, said: str, facts: Sequence[SiteFacts], panels: Sequence[Panel]) -> str:
    """The report as HTML, its pictures in it."""
    parts = [
        "<!DOCTYPE html>", '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title>", f"<style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(said)}</p>"]
    for panel in panels:
        picture = base64.b64encode(svg_of(panel)).decode()
        size = f'width="{96 * WIDTH:.0f}" height="{96 * panel.height:.0f}"'
        parts += [f"<h2>{html.escape(panel.title)}</h2>", f"<p>{html.escape(panel.caption)}</p>",
                  f'<div class="wide"><img alt="{html.escape(panel.title)}" {size} '
                  f'src="data:image/svg+xml;base64,{picture}"></div>']
    parts += ['<details open><summary>The numbers</summary><div class="wide">', *_table(facts),
              "</div></details></body></html>"]
    return "\n".join(parts) + "\n"


def _table(facts: Sequence[SiteFacts]) -> list[str]:
    """All numbers, a row for each site; columns that none has are left out."""
    columns: dict[str, list[str]] = {
        "rank": [str(site.rank) for site in facts],
        "effective rank": [f"{site.effective:.2f}" for site in facts],
        "|sBA|": [f"{site.norm:.4g}" for site in facts],
        "|sBA| / |W|": [_number(site.relative) for site in facts],
        "cosine": [_number(site.cosine) for site in facts]}
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    head = "".join(f'<th class="number">{html.escape(name)}</th>' for name in columns)
    found = [f"<table><tr><th>site</th>{head}<th>singular values</th></tr>"]
    for number, site in enumerate(facts):
        cells = "".join(f'<td class="number">{cells[number]}</td>' for cells in columns.values())
        spectra = site.values.reshape(-1, site.values.shape[-1]).tolist()
        values = "; ".join(" ".join(f"{value:.3g}" for value in one) for one in spectra)
        name = html.escape(site.name or "(the model)")
        found.append(f'<tr><td>{name}</td>{cells}<td class="values">{values}</td></tr>')
    return [*found, "</table>"]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
