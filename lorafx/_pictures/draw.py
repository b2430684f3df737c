"""`draw`: an injected model as a picture of one block, or as a page of the whole."""

import html
import os
from collections.abc import Callable
from pathlib import Path

from torch import nn

from .._adapter.letters import width as width_of
from .._adapter.names import closest_names
from .._errors import ConfigError, NoSiteError
from .._model.flat import in_shape
from .._model.program import read_program
from .._model.record import injection
from .._storage.durable import write_whole
from .._summary import summary
from .block import box_of
from .elements import LETTER, STYLE, rectangle, text
from .modules import Modules
from .tree import page_of

_MARGIN = 20.0
_SMALLEST = 0.7  # of its size, at which a page that is less wide still shows a picture


def draw(model: nn.Module, path: str | os.PathLike[str], module: str | None = None) -> None:
    """Write a picture of an injected model to a file: `.svg` of one block, `.html` of the whole.

    An `.svg` shows a module as it was rewritten, from its inputs to its output: W grey with what
    the adapters add beside it in blue, what they train whole in blue by itself, the sites that are
    computed together in an orange box, graph breaks in dashed frames, with what they hold in the
    order of registration. An `.html` is a tree of all modules that opens and closes, with each site
    and the code of each region, and that picture on top. Both are one file each that needs no other
    and no network.

    Args:
        model: an injected model.
        path: where to write; a file there is replaced.
        module: the dotted path of the module to show; by default the first that holds sites and has
            siblings of its class that do, such as the first layer of a decoder, else the model.

    Raises:
        NotInjectedError: the model was not made by lorafx.
        ConfigError: the ending is another, or the model has no such module.
        NoSiteError: the module holds no adapted site.

    Example:
        >>> import pathlib, tempfile, torch, lorafx
        >>> model = lorafx.inject(torch.nn.Linear(4, 4), rank=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     picture = pathlib.Path(folder, "linear.svg")
        ...     lorafx.draw(model, picture)
        ...     print(picture.read_text()[:4])
        <svg
    """
    injection(model)
    target = Path(path)
    if target.suffix.lower() not in _ENDINGS:
        raise ConfigError(f"lorafx.draw writes .svg (one block) and .html (the whole model), not "
                          f"'{target.name}'.")
    with in_shape(model):
        modules = Modules(read_program(model), summary(model))
        shown = _module(modules, module)
        content = _ENDINGS[target.suffix.lower()](modules, shown)
    write_whole(target, content.encode())


def _module(modules: Modules, wanted: str | None) -> str:
    """The path of the module to show."""
    if wanted is None:
        wanted = modules.repeated()
    if wanted not in modules.users:
        names = closest_names(wanted, [path for path in modules.users if modules.sites_in(path)])
        hint = f"; near it: {names}" if names else ""
        raise ConfigError(f"The model has no module {wanted!r}{hint}.")
    if not modules.sites_in(wanted):
        holding = [path for path in modules.users if path and modules.sites_in(path)]
        names = closest_names(wanted, holding)
        hint = f" There are some in {names}." if names else ""
        raise NoSiteError(f"There is no adapted site in {wanted or 'the model'!r} to draw.{hint}")
    return wanted


def svg_of(modules: Modules, path: str) -> str:
    """Return the picture of a module as a document that stands by itself."""
    box = box_of(modules, path)
    legend = _Legend("".join(box.draw(0, 0)))
    title = path or "the model"
    kind = modules.class_name(path)
    alike = _alike(modules, path)
    heading = f"{title} ({kind}{alike})"
    width = max(box.width, legend.width, width_of(heading) * LETTER * 1.25) + 2 * _MARGIN
    height = box.height + legend.height + 86
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="lorafx" width="{width:.0f}" '
        f'height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'style="min-width: {_SMALLEST * width:.0f}px">',
        f"<title>{html.escape(heading)}</title>", f"<style>{STYLE}</style>",
        f'<rect class="paper" width="{width:.0f}" height="{height:.0f}"/>',
        text(heading, _MARGIN, 30, "title"), *box.draw((width - box.width) / 2, 46),
        *legend.draw(_MARGIN, box.height + 66), "</svg>"]
    return "\n".join(parts) + "\n"


def _alike(modules: Modules, path: str) -> str:
    """Of how many siblings of its class a module is one."""
    if not path:
        return ""
    siblings = modules.children(path.rpartition(".")[0])
    count = sum(modules.class_name(other) == modules.class_name(path) for other in siblings)
    return f", one of {count}" if count > 1 else ""


class _Legend:
    """What the colours and frames in some elements mean, in a line."""

    _ENTRIES = (("frozen", "frozen"), ("branch", "LoRA"), ("trained", "trained"),
                ("joined", "computed together"),
                ("break", "graph break: stays Python, which orders the calls"))
    height = 22.0

    def __init__(self, drawn: str) -> None:
        self.entries = [(kind, words) for kind, words in self._ENTRIES
                        if f'<rect class="{kind}"' in drawn]
        self.width = sum(len(words) * LETTER + 54 for _, words in self.entries)

    def draw(self, x: float, y: float) -> list[str]:
        found = ['<g class="legend">']
        for kind, words in self.entries:
            found += [rectangle(kind, x, y, 22, 14, 3), text(words, x + 29, y + 11, "soft")]
            x += len(words) * LETTER + 54
        return [*found, "</g>"]


_ENDINGS: dict[str, Callable[[Modules, str], str]] = {
    ".svg": svg_of, ".html": lambda modules, path: page_of(modules, path, svg_of(modules, path))}
