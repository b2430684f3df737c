"""What a picture of a model holds: parsed, counted, and measured for what would overlap."""

import itertools
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import lorafx
from tests.support.oracle import randomise

SVG = "{http://www.w3.org/2000/svg}"
VOID = {"meta", "!doctype"}


class Attention(nn.Module):
    """A graph break."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        scores = self.q(x) @ self.k(x).mT
        if mask is not None:
            scores = scores + mask
        return self.o(scores.softmax(-1) @ x)


class Gated(nn.Module):
    """A region, in which gate and up are computed together."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 7), nn.Linear(6, 7), nn.Linear(7, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x).to(x.dtype).reshape(x.shape[0], 7))


class Layer(nn.Module):
    """Straight-line code with a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention, self.mlp = nn.LayerNorm(6), Attention(), Gated()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


class Decoder(nn.Module):
    """Layers in a loop, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layers = nn.Embedding(9, 6), nn.ModuleList([Layer(), Layer(), Layer()])
        self.head = nn.Linear(6, 9)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.fixture
def decoder() -> nn.Module:
    return randomise(lorafx.inject(Decoder(), rank=2, targets="linear"))


def svg(model: nn.Module, module: str | None = None) -> ElementTree.Element:
    """The root of a picture."""
    lorafx.draw(model, "picture.svg", module)
    return ElementTree.parse("picture.svg").getroot()


def texts(root: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in root.iter(f"{SVG}text")]


def rectangles(root: ElementTree.Element, *kinds: str) -> list[tuple[float, float, float, float]]:
    """(left, top, right, bottom) of those of these kinds, but for the legend's."""
    in_legend = set(root.find(f"{SVG}g[@class='legend']"))
    found = []
    for rect in root.iter(f"{SVG}rect"):
        if rect.get("class") in kinds and rect not in in_legend:
            x, y, width, height = (float(rect.get(name))
                                   for name in ("x", "y", "width", "height"))
            found.append((x, y, x + width, y + height))
    return found


def inside(inner, outer) -> bool:
    return all(outer[i] <= inner[i] for i in (0, 1)) and all(inner[i] <= outer[i] for i in (2, 3))


def disjoint(first, second) -> bool:
    return (first[2] <= second[0] or second[2] <= first[0] or first[3] <= second[1]
            or second[3] <= first[1])


def check_geometry(root: ElementTree.Element) -> None:
    """Nothing overlaps, no text is cut, and all is on the paper."""
    leaves = rectangles(root, "frozen", "trained", "branch", "operator", "input", "output")
    frames = rectangles(root, "region", "break", "module", "joined")
    width, height = (float(root.get(name)) for name in ("width", "height"))
    paper = (0, 0, width, height)
    assert all(inside(rect, paper) for rect in leaves + frames)
    for first, second in itertools.combinations(leaves, 2):
        assert disjoint(first, second), (first, second)
    for first, second in itertools.combinations(frames, 2):
        assert disjoint(first, second) or inside(first, second) or inside(second, first)
    for leaf, frame in itertools.product(leaves, frames):
        assert disjoint(leaf, frame) or inside(leaf, frame)
    for text in root.iter(f"{SVG}text"):
        wide = sum(letter > "\u2e80" for letter in text.text)
        length, x, y = 7.23 * (len(text.text) + wide), float(text.get("x")), float(text.get("y"))
        if text.get("class") == "title":
            length *= 15 / 12
        left = x - length / 2 if text.get("text-anchor") == "middle" else x
        box = (left, y - 9, left + length, y + 3)
        assert inside(box, paper), text.text
        for leaf in leaves:
            assert disjoint(box, leaf) or inside(box, leaf), text.text


def test_a_block_shows_each_of_its_sites_and_what_is_joined_and_what_stays_python(decoder, here):
    root = svg(decoder)
    assert root.tag == f"{SVG}svg"
    sites = [group.get("data-site") for group in root.iter(f"{SVG}g") if group.get("data-site")]
    below = "layers.0."
    assert Counter(sites) == Counter(
        row.name for row in lorafx.summary(decoder).sites if row.name.startswith(below))
    assert len(rectangles(root, "branch")) == len(sites) == 6
    assert len(rectangles(root, "frozen")) == len(sites) + 1  # with the norm
    [joined] = rectangles(root, "joined")
    glyphs = {group.get("data-site"): rectangles_of(group) for group in root.iter(f"{SVG}g")
              if group.get("data-site")}
    held = {name for name, rects in glyphs.items() if all(inside(rect, joined) for rect in rects)}
    assert held == {"layers.0.mlp.gate", "layers.0.mlp.up"}
    [broken] = rectangles(root, "break")
    held = {name for name, rects in glyphs.items() if all(inside(rect, broken) for rect in rects)}
    assert held == {"layers.0.attention.q", "layers.0.attention.k", "layers.0.attention.o"}
    shown = texts(root)
    assert "layers.0 (Layer, one of 3)" in shown
    assert any(text.startswith("graph break: forward branches") for text in shown)
    assert {"gate", "6 → 7", "7 → 6", "rank 2, × 1", "silu", "×", "+"} <= set(shown)
    assert not {"shape", "getattr", "getitem"} & set(shown)  # which compute nothing
    check_geometry(root)


def rectangles_of(group: ElementTree.Element) -> list[tuple[float, float, float, float]]:
    found = []
    for rect in group.iter(f"{SVG}rect"):
        x, y, width, height = (float(rect.get(name)) for name in ("x", "y", "width", "height"))
        found.append((x, y, x + width, y + height))
    return found


def test_lines_lead_where_the_graph_says(decoder, here):
    """Of the gated block each line begins below one item and ends on top of another."""
    root = svg(decoder, "layers.1.mlp")
    leaves = rectangles(root, "frozen", "operator", "input", "output", "joined")
    heads = [path for path in root.iter(f"{SVG}path") if path.get("class") == "head"]
    ends = {tuple(map(float, re.match(r"M([\d.]+) ([\d.]+)", path.get("d")).groups()))
            for path in heads}
    on_top = [any(abs(y - rect[1]) < 0.2 and rect[0] <= x <= rect[2] for rect in leaves)
              for x, y in ends]
    assert all(on_top) and len(ends) == 3 + 4  # three sites; silu, to and reshape, ×, output
    assert {"to", "reshape"} <= set(texts(root))
    glyphs = {group.get("data-site"): rectangles_of(group)[0] for group in root.iter(f"{SVG}g")
              if group.get("data-site")}
    labels = {text.text: float(text.get("x")) for text in root.iter(f"{SVG}text")}
    [joined] = rectangles(root, "joined")
    ways = {}  # from x at the lower edge of the joined sites to where that line ends
    for path in root.iter(f"{SVG}path"):
        data = path.get("d")
        start = re.match(r"M([\d.]+) ([\d.]+)", data)
        if path.get("class") == "line" and float(start[2]) == pytest.approx(joined[3]):
            bends = re.findall(r"C[\d.]+ [\d.]+ [\d.]+ [\d.]+ ([\d.]+)", data)
            ways[float(start[1])] = float([start[1], *bends][-1])
    for site, first in (("gate", "silu"), ("up", "to")):
        left, _, right, _ = glyphs[f"layers.1.mlp.{site}"]
        [end] = [end for x, end in ways.items() if abs(x - (left + right) / 2) < 0.2]
        assert end == pytest.approx(labels[first], abs=0.2)


def test_the_legend_tells_what_is_there(decoder, here):
    for module, kinds in (("layers.0", {"frozen", "LoRA", "computed together", "graph break"}),
                          ("layers.0.mlp", {"frozen", "LoRA", "computed together"}),
                          ("head", {"frozen", "LoRA"})):
        legend = svg(decoder, module).find(f"{SVG}g[@class='legend']")
        found = [text.text.partition(":")[0] for text in legend.iter(f"{SVG}text")]
        assert set(found) == kinds and len(found) == len(list(legend.iter(f"{SVG}rect")))


def test_adapters_and_their_weights_are_named(here):
    model = lorafx.inject(nn.Linear(6, 8), rank=2, targets="linear")
    for number in range(4):
        lorafx.add(model, f"more{number}", rank=number + 1, targets="linear")
    lorafx.activate(model, {"default": 0.5})
    shown = texts(svg(model))
    assert {"rank 2, × 0.5", "more0", "rank 1, not active", "and 2 more"} <= set(shown)


def test_a_call_without_an_adapter_among_those_computed_together(here):
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.q(x) @ self.k(x).mT) @ self.v(x)

    root = svg(lorafx.inject(Three(), rank=1, targets=["q", "v"]))
    assert len(rectangles(root, "branch")) == 2
    check_geometry(root)


def test_a_graph_of_functions_and_a_callers_graph(here):
    class Functions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.a), x @ self.b

    model = lorafx.inject(Functions(), rank=1, targets=["a[0:2]", "a[2:4]", "b"])
    root = svg(model)
    assert {"LoRA [0:2]", "LoRA [2:4]", "a", "b", "matmul", "linear"} <= set(texts(root))
    check_geometry(root)
    graph = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    root = svg(lorafx.inject(graph, targets="linear"))
    assert len(rectangles(root, "branch")) == 2 and "ReLU" in texts(root)
    check_geometry(root)


def test_what_is_trained_whole_is_not_shown_as_frozen(here):
    model = lorafx.inject(Decoder(), rank=2, targets=["gate", "up"],
                          trainable=["head", "layers.0.mlp.up.bias", "layers.0.norm"])
    root = svg(model, "")
    assert len(rectangles(root, "trained")) == 2  # norm and head
    shown = texts(root)
    assert shown.count("trained: weight, bias") == 2 and "trained: bias" in shown
    assert "trained" in shown  # in the legend
    check_geometry(root)
    lorafx.draw(model, "page.html")
    content = Path("page.html").read_text()
    assert content.count(">trained: weight, bias</span>") == 2
    assert content.count(">trained: bias</span>") == 1


def test_long_and_wide_names_stay_in_their_boxes(here):
    names = ["a_name_of_very_many_letters_" * 5 + end for end in "12"] + ["注意力" * 8]
    model = lorafx.inject(nn.ModuleDict({name: nn.Linear(4, 4) for name in names}), rank=1)
    root = svg(model)
    check_geometry(root)
    shown = [text for text in texts(root) if "…" in text]
    assert len(set(shown)) == len(shown) == 3 and {text[-1] for text in shown} == {"1", "2", "力"}
    assert [title.text for title in root.iter(f"{SVG}title")][1:] == names


def test_the_style_of_the_page_leaves_the_letters_of_the_picture_alone(decoder, here):
    """A letter's width in it is known; the page's own classes are those of HTML elements."""
    lorafx.draw(decoder, "page.html")
    page = Path("page.html").read_text().partition("</style>")[0]
    sizes = re.findall(r"([^{}]+){[^{}]*font-size", page)
    assert sizes and not any(re.search(r"(^|,)\s*\.name", rule) for rule in sizes)


def test_a_wide_picture_is_not_shrunk_until_it_cannot_be_read(decoder, here):
    root = svg(decoder)
    assert float(re.search(r"min-width: (\d+)px", root.get("style"))[1]) >= (
        0.7 * float(root.get("width")) - 1)


class Page(HTMLParser):
    """The elements of a page, with what they are in; each must be closed in its turn."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.stack: list[tuple[str, dict[str, str | None]]] = []
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(content)
        assert not self.stack

    def handle_starttag(self, tag, attrs):
        above = [attributes.get("data-path") for _, attributes in self.stack
                 if "data-path" in attributes]
        self.words: list[str] = []
        self.found.append((tag, dict(attrs), self.words, above))
        if tag not in VOID:
            self.stack.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs), [], []))

    def handle_endtag(self, tag):
        assert self.stack.pop()[0] == tag

    def handle_data(self, data):
        if hasattr(self, "words"):
            self.words.append(data)


def test_a_page_holds_every_module_site_and_code(decoder, here):
    lorafx.draw(decoder, "page.html")
    content = Path("page.html").read_text()
    page = Page(content)
    sites = {attributes["data-site"]: above for tag, attributes, _, above in page.found
             if tag == "div" and "data-site" in attributes}
    rows = {row.name: row for row in lorafx.summary(decoder).sites}
    assert sites.keys() == rows.keys()
    assert all(above[-1] == name for name, above in sites.items())  # each in its own layer
    kinds = {attributes["data-path"]: attributes["class"] for tag, attributes, _, _ in page.found
             if tag == "details" and "data-path" in attributes}
    assert {path for path, kind in kinds.items() if kind == "break"} == {
        "", *(f"layers.{number}.attention" for number in range(3))}
    assert kinds["layers"] == "module" and kinds["layers.0.mlp"] == kinds["head"] == "region"
    code = ["".join(words).strip() for tag, _, words, _ in page.found if tag == "pre"]
    regions = [module.code.strip() for module in decoder.modules()
               if isinstance(module, fx.GraphModule)]
    assert Counter(code) == Counter(regions)
    for row in rows.values():
        assert f"|sBA| / |W| = {row.relative_norm:#.3g}" in content
    assert content.count('class="joined">computed together with up<') == 3
    opened = {attributes["data-path"] for tag, attributes, _, _ in page.found
              if tag == "details" and "open" in attributes}
    assert {"", "layers", "layers.0", "layers.0.mlp.up"} <= opened and "layers.1" not in opened
    assert "embedding" in content and "skipped, and why" in content


def test_a_page_tells_roles_where_they_are_known(here):
    model = lorafx.inject(Gated(), rank=1, targets="linear", example_inputs=(torch.ones(2, 6),))
    lorafx.draw(model, "page.html")
    assert "mlp" not in Path("page.html").read_text()  # it has no residual connection

    class Residual(Gated):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + super().forward(x)

    model = lorafx.inject(Residual(), rank=1, targets="mlp", example_inputs=(torch.ones(2, 6),))
    lorafx.draw(model, "page.html")
    assert Path("page.html").read_text().count('<span class="class">mlp</span>') == 3


def test_a_file_needs_no_other_and_no_network(decoder, here):
    for path in ("page.html", "block.svg"):
        lorafx.draw(decoder, path)
        content = Path(path).read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|<script|<link|src=|href=|@import|url\(", content)


def test_names_are_escaped(here):
    model = lorafx.inject(nn.ModuleDict({"a<b>&": nn.Linear(4, 4)}), rank=1)
    assert "a<b>&" in texts(svg(model))
    lorafx.draw(model, "page.html")
    assert "<b>" not in Path("page.html").read_text()


def test_errors(decoder, here):
    with pytest.raises(lorafx.NotInjectedError):
        lorafx.draw(Decoder(), "picture.svg")
    with pytest.raises(lorafx.ConfigError, match=r"writes \.svg .* and \.html .*, not 'a\.pdf'"):
        lorafx.draw(decoder, "a.pdf")
    with pytest.raises(lorafx.ConfigError, match="no module 'layers.7'; near it: 'layers.2'"):
        lorafx.draw(decoder, "picture.svg", "layers.7")
    with pytest.raises(lorafx.NoSiteError, match="no adapted site in 'embedding' to draw"):
        lorafx.draw(decoder, "picture.svg", "embedding")
    lorafx.remove(decoder, "default")
    with pytest.raises(lorafx.NoSiteError, match="no adapted site in 'the model' to draw.$"):
        lorafx.draw(decoder, "picture.svg")
    assert not list(Path().iterdir())
