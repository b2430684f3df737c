"""An injected model as an HTML page: a tree of its modules that opens and closes, with their code.
"""

import html

from torch import fx

from .._adapter.letters import counted
from .._adapter.names import split_block
from .._model.overview import relative_name
from .._summary import SiteRow
from .modules import Modules

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1f2328; --soft: #57606a;
  --edge: #d0d7de; --code: #f6f8fa; --branch: #cfe6fb; --branch-edge: #0072b2; --joined: #a84800;
  --frozen: #e4e6e9; }
@media (prefers-color-scheme: dark) { :root { --paper: #15191e; --ink: #e6e9ed; --soft: #a3adb8;
  --edge: #3a424c; --code: #1d2229; --branch: #0d3a5c; --branch-edge: #56b4e9; --joined: #f0a050;
  --frozen: #363c44; } }
body { margin: 2rem auto; max-width: 75rem; padding: 0 1.25rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, 'Segoe UI', 'Liberation Sans', sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .25rem; }
p { margin: .25rem 0 1rem; color: var(--soft); }
code, pre, span.name { font-size: 13px; font-family: ui-monospace, SFMono-Regular, Menlo, Consolas,
  'DejaVu Sans Mono', monospace; }
span.name { font-weight: 600; }
figure { margin: 1rem 0; overflow-x: auto; border: 1px solid var(--edge); border-radius: 8px; }
figure svg { display: block; max-width: 100%; height: auto; margin: 0 auto; }
details, div.site, div.frozen { margin: .2rem 0 .2rem .55rem; padding-left: .8rem;
  border-left: 2px solid var(--edge); }
details.break { border-left-style: dashed; border-left-color: var(--soft); }
details.code { border-left-color: transparent; }
summary { cursor: pointer; }
summary:hover { background: var(--code); }
.class, .count, .why, div.frozen { color: var(--soft); }
.badge { border: 1px solid var(--soft); border-radius: 9px; padding: 0 .5em; font-size: 12px; }
details.break > summary .badge { border-style: dashed; }
.w, .lora { color: var(--ink); border-radius: 4px; padding: .1em .5em; margin-right: .4em; }
.w { background: var(--frozen); }
.lora { background: var(--branch); border: 1px solid var(--branch-edge); }
.site .joined { color: var(--joined); font-weight: 600; }
.why { margin: .1rem 0; }
pre { background: var(--code); border: 1px solid var(--edge); border-radius: 6px; padding: .7rem;
  overflow-x: auto; }
"""


def page_of(modules: Modules, shown: str, picture: str) -> str:
    """Return the page: the picture of the module that is shown, and the tree."""
    kind = modules.class_name("")
    headline = html.escape(modules.summary.headline())
    opened = {path for path in modules.users if f"{path}.".startswith(f"{shown}." if shown else "")}
    path = shown
    while path:
        path = path.rpartition(".")[0]
        opened.add(path)
    skipped = [f"<li><code>{html.escape(name or 'the model')}</code>: {html.escape(why)}</li>"
               for name, why in modules.summary.skipped.items()]
    parts = [
        "<!DOCTYPE html>", '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(kind)} with LoRA</title>", f"<style>{STYLE}</style></head><body>",
        f"<h1>{html.escape(kind)}</h1>", f"<p>{headline}</p>", f"<figure>{picture}</figure>",
        *_module(modules, "", "the model", opened)]
    if skipped:
        parts += ['<details class="skipped"><summary>skipped, and why</summary><ul>', *skipped,
                  "</ul></details>"]
    return "\n".join([*parts, "</body></html>"]) + "\n"


def _module(modules: Modules, path: str, name: str, opened: set[str]) -> list[str]:
    """A module and all in it; one without adapted sites is a line."""
    sites, label = modules.sites_in(path), html.escape(modules.class_name(path))
    named = f'<span class="name">{html.escape(name)}</span> <span class="class">{label}</span>'
    if not sites:
        trained = _trained(modules.trained_in(path))
        return [f'<div class="frozen" data-path="{html.escape(path)}">{named}{trained}</div>']
    words, kind = modules.kind_in_words(path), modules.kind(path)
    badge = f' <span class="badge">{words}</span>' if words else ""
    count = counted(len(sites), "site")
    state = " open" if path in opened else ""
    found = [f'<details class="{kind}" data-path="{html.escape(path)}"{state}><summary>{named}'
             f'{badge} <span class="count">{count}</span>'
             f"{_trained(modules.own_trained(path))}</summary>"]
    if kind == "break":
        found.append(f'<div class="why">stays Python: {html.escape(modules.why(path))}</div>')
    found += [_site(modules, modules.rows[site]) for site in modules.own_sites(path)]
    for child in modules.children(path):
        found += _module(modules, child, child.rpartition(".")[2], opened)
    module = modules.users[path]
    if isinstance(module, fx.GraphModule):
        code = html.escape(module.code.strip())
        found.append('<details class="code"><summary>the code that runs</summary>'
                     f"<pre>{code}</pre></details>")
    return [*found, "</details>"]


def _trained(names: str) -> str:
    """What is trained whole, if anything is."""
    return f' <span class="lora">trained: {html.escape(names)}</span>' if names else ""


def _site(modules: Modules, row: SiteRow) -> str:
    """A site in a line: W, what adapters add, and how much that is."""
    parts = [f'<span class="w">W {row.out_features} × {row.in_features}</span>']
    if row.experts is not None:
        parts = [f'<span class="w">W {row.experts} × {row.out_features} × {row.in_features}</span>']
    block = split_block(row.name)[1]
    for adapter, rank in row.ranks.items():
        weight = modules.summary.active.get(adapter)
        state = "not active" if weight is None else f"× {weight * row.scales[adapter]:.3g}"
        words = html.escape(f"{block} {adapter}: rank {rank}, {state}".strip())
        parts.append(f'<span class="lora">{words}</span>')
    if row.role is not None:
        parts.insert(0, f'<span class="class">{html.escape(row.role)}</span>')
    if row.relative_norm is not None:
        parts.append(f"|sBA| / |W| = {row.relative_norm:#.3g}")
    if row.joined:
        others = ", ".join(relative_name(name, row.name) for name in row.joined)
        parts.append(f'<span class="joined">computed together with {html.escape(others)}</span>')
    return f'<div class="site" data-site="{html.escape(row.name)}">{" ".join(parts)}</div>'
